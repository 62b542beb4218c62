"""Headless Chromium for the tests of the viewer's page; without it they fail, and are not skipped."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from segpipe.viewer import Server
from segpipe.viewer.catalogue import Catalogue

ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-extensions "
    "--disable-background-networking --disable-component-update --disable-sync --no-first-run "
    "--force-device-scale-factor=1 --window-size=1300,800"
)
DRAWN = """
const world = window.segpipe?.slide && segpipe.viewer.world;
return !!world && world.getItemCount() === (segpipe.slide.labels ? 2 : 1)
  && [...Array(world.getItemCount()).keys()].every((n) => world.getItemAt(n).getFullyLoaded());
"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; a new profile each time."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        raise RuntimeError("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ARGUMENTS.split():
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    page = webdriver.Chrome(options=options, service=Service(driver))
    # An even canvas: a pixel of the image, at zoom 1 in the middle, is then one of the screen.
    size = {"width": 1280, "height": 720, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield page
    finally:
        page.quit()


@contextmanager
def serving(out: Path) -> Iterator[Server]:
    """A server of this OUT in a thread."""
    with Server(Catalogue(out)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def until(page: Any, script: str, seconds: float = 30) -> Any:
    """What a script gives once that is true."""
    end = time.monotonic() + seconds
    while not (found := page.execute_script(script)):
        if time.monotonic() > end:
            raise TimeoutError(f"never true in {seconds} s: {script}")
        time.sleep(0.03)
    return found
