"""The page of `segpipe view` in headless Chromium: what it draws, tells and asks for."""

from __future__ import annotations

import base64
import io
import json
import time
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from chromium import DRAWN, chromium, serving, until
from results_folder import add_image, discs, know
from segpipe.export.drawing import colours, contrast, outline

pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=alert(1)>"
SHAPE = (600, 700)
LABELS = discs(SHAPE)
for number, place in enumerate(  # edges along the lines between tiles, on both sides
    [
        np.s_[180:200, 376:384],
        np.s_[180:200, 384:392],
        np.s_[248:256, 300:320],
        np.s_[256:264, 300:320],
    ]
):
    LABELS[place] = 9001 + number
RAMP = np.indices(SHAPE).sum(0)
ODD = LABELS[:597, :699]  # the last pixels of coarse levels overhang it
FIRST = "0 by name"  # before all that can be shown
IMAGES = {
    "grey": (RAMP[None].astype(np.uint16), [(100.0, 1000.0)], False),
    "rgb": (np.stack([RAMP % 256, RAMP // 6, 255 - RAMP // 6]).astype(np.uint8), None, True),
    "floats": (np.stack([RAMP / 1300, 1 - RAMP / 1300]).astype(np.float32), None, False),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "OUT"
    for name, (pixels, ranges, rgb) in IMAGES.items():
        add_image(folder, name, pixels, LABELS, ranges=ranges, rgb=rgb, pixel_size_um=0.5)
    small = LABELS[:90, :100]
    lost = {"box": [0, 0, 40, 50], "error": HOSTILE}
    add_image(folder, HOSTILE, small[None].astype(np.uint8), small, failed=(lost,))
    add_image(folder, "torn", *IMAGES["grey"][:1], LABELS)
    shard = next(path for path in (folder / "torn.ome.zarr/0/c/0/0").glob("0"))
    data = bytearray(shard.read_bytes())
    data[200] ^= 255  # in the first chunk
    shard.write_bytes(data)
    know(folder, "broken", status="failed", error=f"{HOSTILE}.tif: is not an image")
    know(folder, FIRST, status="failed", error=f"/images/{FIRST}.tif: is not an image")
    pixels = IMAGES["grey"][0][:, : ODD.shape[0], : ODD.shape[1]]
    add_image(folder, "uncopied", pixels, ODD, finest=2)
    add_image(folder, "resampled", pixels, ODD, finest=1, scale=2.5)
    add_image(folder, "kinds", pixels, (ODD > 0).astype(np.uint32), classes=("ground", "disc"))
    return folder


@pytest.fixture(scope="module")
def server(out):
    with serving(out) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser):
    """The browser; what its console said and whom it asked is looked at when the test has ended."""
    yield browser
    messages = [one["message"] for one in browser.get_log("browser") if one["level"] == "SEVERE"]
    assert [text for text in messages if "status of 404" not in text] == []  # empty shards
    asked = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    urls = [
        one["params"]["request"]["url"]
        for one in asked
        if one["method"] == "Network.requestWillBeSent"
    ]
    hosts = {urlsplit(url).hostname for url in urls if url.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}


def show(page, server, name, place=""):
    page.get("about:blank")
    page.get(f"{server.url}#{quote(name, safe='')}{place}")
    until(page, DRAWN)


def screen(page, shape=(120, 160)):
    """The pixels of the middle of the canvas, (h, w, 3) uint8."""
    box = page.execute_script(
        "const b = document.getElementById('canvas').getBoundingClientRect();"
        "return [b.left, b.top, b.width, b.height]"
    )
    until(page, "return !segpipe.viewer.world.needsDraw()")
    picture = np.asarray(Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB"))
    y, x = int(box[1] + box[3] / 2), int(box[0] + box[2] / 2)
    half = [n // 2 for n in shape]
    return picture[y - half[0] : y + half[0], x - half[1] : x + half[1]].astype(int)


def differing(found, wanted):
    """Share of pixels that differ by more than rounding, at the best shift by a pixel: the viewer
    puts tiles at whole pixels of the screen."""
    shares = [
        (np.abs(np.roll(found, (dy, dx), (0, 1)) - wanted)[2:-2, 2:-2].max(-1) > 4).mean()
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    ]
    return min(shares)


TILES = """
const [layer, ...wanted] = arguments;
const drawn = segpipe.viewer.world.getItemAt(layer).getTilesToDraw().flat().map(({ tile }) => tile);
return wanted.map((url) => {
  const tile = drawn.find((one) => one.getUrl() === url);
  const { width, height } = tile.getCache().data.canvas;
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(tile.getCache().data.canvas, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  return [height, width, btoa(Array.from(data, (n) => String.fromCharCode(n)).join(""))];
});
"""


def painted(page, layer):
    """The tiles around the pixel (256, 384), where four of them meet, as the page has painted them:
    (256, 256, 4) uint8."""
    name = ("image", "labels")[layer]
    urls = [f"{name}/0/{y}/{x}" for y in (1, 2) for x in (2, 3)]
    tiles = [
        np.frombuffer(base64.b64decode(data), np.uint8).reshape(height, width, 4).astype(int)
        for height, width, data in page.execute_script(TILES, layer, *urls)
    ]
    return np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])


@pytest.mark.parametrize("name", ["grey", "rgb"])
def test_pixels_and_objects_are_painted_as_they_are(page, server, name):
    """Outlines do not show where tiles meet."""
    show(page, server, name, "?y=299.5&x=349.5&zoom=1")
    pixels, ranges, rgb = IMAGES[name]
    wanted = contrast(pixels, ranges or [(0.0, 255.0)] * 3, rgb)[128:384, 256:512]
    assert np.abs(painted(page, 0)[..., :3] - wanted).max() <= 1

    drawn = outline(LABELS)[128:384, 256:512]
    ids = LABELS[128:384, 256:512]
    found = painted(page, 1)
    assert np.array_equal(found[..., 3] == 255, drawn)
    assert np.array_equal(found[drawn][:, :3], colours(ids[drawn]))
    page.find_element(By.CSS_SELECTOR, "input[value=filled]").click()
    for _ in range(50):
        if ((found := painted(page, 1))[..., 3] > 0).sum() == (ids > 0).sum():
            break
    assert np.array_equal(found[ids > 0][:, :3], colours(ids[ids > 0]))


def test_outlines_are_right_where_a_tile_came_before_the_one_beside_it(page, server):
    show(page, server, "grey", "?y=190&x=330&zoom=8")  # one tile of the four, far inside
    for y, x in ((190, 440), (320, 440), (320, 330), (256, 384)):
        page.execute_script(f"segpipe.goTo({{y: {y}, x: {x}, zoom: 8}})")
        time.sleep(0.1)  # DRAWN is true until the next frame has asked for tiles
        until(page, DRAWN)
    drawn = outline(LABELS)[128:384, 256:512]
    for _ in range(50):
        if np.array_equal(painted(page, 1)[..., 3] == 255, drawn):
            break
    assert np.array_equal(painted(page, 1)[..., 3] == 255, drawn)


def differing_until(page, wanted, tries=40):
    for _ in range(tries):
        if (share := differing(screen(page), wanted())) < 0.01:
            break
    return share


def test_contrast_and_channels_can_be_changed(page, server):
    show(page, server, "floats", "?y=299.5&x=349.5&zoom=1")
    ActionChains(page).send_keys("l").perform()
    until(page, "return segpipe.viewer.world.getItemAt(1).getOpacity() === 0")
    channels = page.find_elements(By.CLASS_NAME, "channel")
    assert [one.text.split("\n")[0] for one in channels] == ["channel 0", "channel 1"]
    channels[1].find_element(By.CSS_SELECTOR, "input[type=checkbox]").click()
    page.execute_script(
        "const i = document.querySelector('.channel input[title=high]'); i.value = 0.6;"
        "i.dispatchEvent(new Event('input'));"
        "const c = document.querySelector('.channel input[type=color]'); c.value = '#ff0000';"
        "c.dispatchEvent(new Event('input'));"
    )
    light = np.clip(IMAGES["floats"][0][0][240:360, 270:430] / 0.6, 0, 1) * 255
    wanted = np.stack([light, 0 * light, 0 * light], -1)
    assert differing_until(page, lambda: wanted) < 0.01


def shown_row(page, wanted):
    """The row of an object as the page shows it, once it does: texts by column."""
    shown = until(
        page,
        "const t = document.getElementById('row').innerText; "
        f"return t.startsWith('id\\t{wanted}\\n') && t",
    )
    return dict(line.split("\t") for line in shown.splitlines())


def test_a_click_gives_the_row_of_the_object(out, page, server):
    show(page, server, "grey", "?y=299.5&x=349.5&zoom=2")
    rows = {row["id"]: row for row in pq.read_table(out / "grey.parquet").to_pylist()}
    canvas = page.find_element(By.ID, "canvas")
    for dy, dx in ((0, 0), (-60, 40), (100, -150)):
        ActionChains(page).move_to_element_with_offset(canvas, dx, dy).click().perform()
        wanted = int(LABELS[300 + dy // 2, 350 + dx // 2])
        until(page, f"return segpipe.style.selected === {wanted}")
        if wanted:
            found = shown_row(page, wanted)
            row = rows[wanted]
            assert found["area_px"] == f"{row['area_px']:,}"
            assert float(found["centroid_y_px"].replace(",", "")) == pytest.approx(
                row["centroid_y_px"], rel=1e-5
            )
    assert page.execute_script("return location.hash").startswith("#grey?")


@pytest.mark.parametrize(("name", "scale"), [("uncopied", 1.0), ("resampled", 2.5)])
def test_a_click_on_an_image_that_is_not_copied_gives_the_object_there(
    out, page, server, name, scale
):
    """Its image is coarser than its labels, so that two pyramids lie on each other."""
    rows = {row["id"]: row for row in pq.read_table(out / f"{name}.parquet").to_pylist()}
    even = [  # where a pixel more or less to any side makes no difference, and two do
        np.roll(ODD, shift, (0, 1)) == ODD for shift in ((1, 0), (-1, 0), (0, 1), (0, -1))
    ]
    ys, xs = np.nonzero(np.logical_and.reduce(even) & (outline(np.roll(ODD, 2, 1)) | (ODD > 9000)))
    chosen = np.random.default_rng(0).choice(len(ys), 5)
    far = np.argmax(ys * (xs > 640) * (ODD[ys, xs] > 0))  # where a wrong scale would show
    for place in [*chosen, far]:
        y, x = ((n + 0.5) * scale - 0.5 for n in (ys[place], xs[place]))
        show(page, server, name, f"?y={y}&x={x}&zoom={8 / scale}")
        page.execute_script("segpipe.style.selected = -1")
        ActionChains(page).click(page.find_element(By.ID, "canvas")).perform()
        wanted = int(ODD[ys[place], xs[place]])
        until(page, f"return segpipe.style.selected === {wanted}")
        if wanted:
            found = shown_row(page, wanted)
            for key in ("centroid_y_px", "centroid_x_px"):
                told = float(found[key].replace(",", ""))
                assert told == pytest.approx(rows[wanted][key], rel=1e-5)


@pytest.mark.parametrize("name", ["grey", "uncopied", "resampled"])
def test_the_key_1_shows_a_pixel_of_the_full_resolution_as_one_of_the_screen(page, server, name):
    show(page, server, name, "?y=200&x=200&zoom=3")
    ActionChains(page).send_keys("1").perform()
    until(page, "return location.hash.endsWith('&zoom=1')")


def test_the_first_image_that_can_be_shown_is_opened(page, server):
    page.get("about:blank")
    page.get(server.url)
    until(page, DRAWN)
    assert page.find_element(By.CSS_SELECTOR, "#list button").text.startswith(FIRST)
    assert page.execute_script("return segpipe.current.name") == HOSTILE
    assert not page.find_element(By.ID, "message").is_displayed()


def test_an_error_has_the_name_of_its_image_once(page, server):
    show(page, server, "grey")
    for name, said in ((FIRST, f"/images/{FIRST}.tif"), ("broken", f"broken: {HOSTILE}.tif")):
        page.find_element(By.CSS_SELECTOR, f"button[data-key='{quote(name)}']").click()
        wanted = f"{said}: is not an image"
        until(page, f"return document.getElementById('message').innerText === '{wanted}'")


def test_classes_are_not_told_as_objects(page, server):
    show(page, server, "kinds")
    for place in ("button[data-key=kinds]", "#facts"):
        told = page.find_element(By.CSS_SELECTOR, place).text
        assert "1 class" in told and "objects" not in told
    assert "objects" in page.find_element(By.CSS_SELECTOR, "button[data-key=grey]").text


def test_a_link_and_an_id_lead_to_the_place(page, server):
    show(page, server, "rgb", "?y=100&x=200&zoom=3&id=20")
    assert page.execute_script("return segpipe.style.selected") == 20
    box = page.find_element(By.ID, "number")
    box.send_keys("200\n")
    until(page, "return location.hash.includes('id=200')")
    ys, xs = np.nonzero(LABELS == 200)
    moved = "return m && m[1] !== '100.0' && m"  # the link has the id before the view has moved
    place = until(
        page, f"const m = location.hash.match(/y=([\\d.]+)&x=([\\d.]+)&zoom=3&/); {moved}"
    )
    assert abs(float(place[1]) - ys.mean()) < 0.2 and abs(float(place[2]) - xs.mean()) < 0.2
    assert "\u00b5m" in page.find_element(By.ID, "scale").text


def test_hostile_names_are_text_and_failures_are_told(page, server):
    show(page, server, HOSTILE)
    assert page.title.startswith(HOSTILE)
    assert page.find_element(By.ID, "name").text == HOSTILE
    assert HOSTILE in page.find_element(By.ID, "notes").text  # the error of the region
    assert len(page.find_elements(By.CLASS_NAME, "lost")) == 1
    assert page.find_elements(By.CSS_SELECTOR, "[onerror], img[src='x']") == []
    page.find_element(By.CSS_SELECTOR, "button[data-key=broken]").click()
    said = until(page, "return document.getElementById('message').innerText")
    assert "is not an image" in said
    assert "failed" in page.find_element(By.CSS_SELECTOR, "button[data-key=broken]").text


def test_a_damaged_tile_is_named_and_hatched(page, server):
    show(page, server, "torn", "?y=64&x=64&zoom=1")
    said = until(page, "return document.getElementById('message').innerText")
    assert "image, level 0, row 0, column 0: its checksum is wrong" in said
    found = screen(page, (60, 60)).reshape(-1, 3)
    assert (np.abs(found - (0x3B, 0x15, 0x12)).max(-1) <= 6).mean() > 0.3
