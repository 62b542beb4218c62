"""`segpipe export`: exports of images that are finished, without their files."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from segpipe.cleaning import find_images
from segpipe.compute import open_engine
from segpipe.errors import SegpipeError, SettingsError, Stopped
from segpipe.footprint import SMALL_JOB_PIXELS
from segpipe.machine import usable_cores
from segpipe.records import locked
from segpipe.results import counted
from segpipe.settings import ExportSettings
from segpipe.stages.exported import OUTLINES, check_formats
from segpipe.stages.exports import Results, make_exports
from segpipe.stages.places import work_folder
from segpipe.stopping import stop_on_signals

log = logging.getLogger(__name__)


def export_images(
    out: Path, wanted: Sequence[str], settings: ExportSettings, workers: int | None
) -> int:
    """Make exports of the images of OUT, or of those wanted; the exit code.

    Raises
    ------
    SettingsError
        When OUT holds no results, no image has such a name, or a package is lacking.
    Stopped
        After SIGINT or SIGTERM; the same call goes on.
    """
    if not settings.formats:
        raise SettingsError("no format: name one by --format, such as --format geojson,csv")
    check_formats(settings.formats)
    out = out.resolve()
    names = [one.name for one in find_images(out)]
    for name in wanted:
        if name not in names:
            raise SettingsError(f"{out} holds no image '{name}'; it holds {_some(names)}")
    chosen = list(dict.fromkeys(wanted)) or names
    failed = 0
    kind, count = _engine_of(out, chosen, settings, workers)
    with stop_on_signals() as stop, open_engine(kind, count, 1) as engine:
        stop.watch(engine)
        for name in chosen:
            try:
                with locked(work_folder(out, name), name):
                    make_exports(out, name, settings, engine)
            except Stopped:
                raise
            except SegpipeError as error:
                log.error("%s", error)
                failed += 1
    done = len(chosen) - failed
    log.info(
        "%s exported as %s, %d failed", counted(done, "image"), ", ".join(settings.formats), failed
    )
    return 1 if failed else 0


def _engine_of(
    out: Path, names: Sequence[str], settings: ExportSettings, workers: int | None
) -> tuple[str, int]:
    """Processes only where there are outlines to trace, and many of them."""
    if workers is None:
        pixels = 0
        for name in names if any(one in OUTLINES for one in settings.formats) else ():
            try:
                pixels = max(pixels, math.prod(Results.of(out, name).lattice.shape))
            except SegpipeError:
                continue  # said when its turn comes
        workers = 1 if pixels < SMALL_JOB_PIXELS else usable_cores()
    return ("serial", 1) if workers == 1 else ("local", workers)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
