"""`--model auto`: the table at the top of segpipe.choosing, and that the choice is told."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

import segpipe
from fields import labels_of, run
from segpipe import choosing
from segpipe.choosing import choose_for_colours, choose_model, look
from segpipe.errors import InputError
from segpipe.exchange.example import example_image
from segpipe.geometry import Box
from segpipe.models.card import parse_card
from segpipe.models.modelfile import find_model, read_card
from segpipe.settings import Settings
from segpipe.slide import open_slide

DATA = Path(__file__).parents[2] / "shared/data/dsb2018"
SMALL = ("tile.chunk=64", "tile.core=128", "tile.region=128", "infer.model=auto")


def glowing(size=96):
    """(size, size) uint8: nuclei on a dark ground."""
    light = example_image(read_card(find_model("nuclei-fluorescence")), size)[0].astype(float)
    return np.rint(255 * np.clip(light / light.max(), 0, 1)).astype(np.uint8)


def stained(size=96):
    """(3, size, size) uint8: nuclei in haematoxylin on eosin."""
    card = read_card(find_model("nuclei-fluorescence")).model_dump(mode="json")
    card |= {"channels": ["red", "green", "blue"], "normalisation": {"kind": "fixed"}}
    return example_image(parse_card(card, "card"), size)


def blue(plane):
    return np.stack([np.zeros_like(plane), plane // 8, plane])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("dark grey", lambda: np.stack([glowing()] * 3)),
        ("dark grey", lambda: np.zeros((3, 40, 40), np.uint8)),
        ("dark", lambda: blue(glowing())),
        ("bright grey", lambda: 255 - np.stack([glowing()] * 3)),
        ("bright", stained),
        ("bright", lambda: np.full((3, 40, 40), 245, np.uint8)),  # the glass of a slide
    ],
)
def test_what_colours_look_like(kind, make, dtype):
    pixels = make().astype(dtype) * (257 if dtype is np.uint16 else 1)
    assert look(pixels.astype(dtype), np.dtype(dtype)) == kind


def test_made_and_where_there_are_any_real_images_are_told_apart():
    expected = {"fluo": "dark grey", "brig": "bright grey", "hist": "bright", "he_p": "bright"}
    seen = {"fluo": [np.stack([glowing()] * 3)], "hist": [stained()]}
    index = DATA / "index.csv"
    rows = list(csv.DictReader(index.read_text().splitlines()))[::9] if index.exists() else []
    for row in rows:
        pixels = tifffile.imread(next((DATA / "train/images").glob(f"{row['id']}*")))
        colours = np.stack([pixels] * 3) if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
        seen.setdefault(row["type"][:4], []).append(colours)
    for kind, images in seen.items():
        assert {look(colours, colours.dtype) for colours in images} == {expected[kind]}


def test_jpeg_of_a_grey_picture_is_grey_still(tmp_path):
    picture = Image.fromarray(np.stack([glowing(200)] * 3, axis=-1))
    picture.save(tmp_path / "a.jpg", quality=60)
    with open_slide(tmp_path / "a.jpg") as slide:
        choice = choose_model(slide, Settings())
    assert (choice.model, choice.channels) == ("nuclei-fluorescence", (0,))


def test_a_grey_picture_with_alpha_is_segmented_as_one_channel_and_it_is_said(tmp_path, caplog):
    """As the Data Science Bowl stored its images."""
    plane = glowing(130)
    rgba = np.stack([plane, plane, plane, np.full_like(plane, 255)], axis=-1)
    Image.fromarray(rgba).save(tmp_path / "colour.png")
    Image.fromarray(plane).save(tmp_path / "grey.png")
    pixels = np.moveaxis(stained(70), 0, -1)
    Image.fromarray(pixels).save(tmp_path / "stained.png")
    caplog.set_level("INFO")
    given = [tmp_path / name for name in ("colour.png", "grey.png", "stained.png")]
    result = segpipe.predict(given, tmp_path / "out", _settings())
    assert result.exit_code == 0
    assert labels_of(tmp_path / "out", "colour").max() > 5
    found = [labels_of(tmp_path / "out", name) for name in ("colour", "grey")]
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(
        segpipe.segment(np.stack([plane] * 3), settings=_settings()),
        labels_of(tmp_path / "out", "colour"),
    )
    told = json.loads((tmp_path / "out" / "run.json").read_text())["images"]
    chosen = {name: (one["model"], one["model_chosen"]) for name, one in told.items()}
    assert chosen == {
        "colour": ("nuclei-fluorescence", "grey on a dark ground, stored as RGB"),
        "grey": ("nuclei-fluorescence", "channels are not colours"),
        "stained": ("nuclei-he", "colours on a bright ground"),
    }
    assert told["colour"]["channels"] == ["red"]
    assert (
        "model auto: nuclei-he for 1 of 3 images (colours on a bright ground): stained"
        in caplog.text
    )


def test_one_colour_alone_on_a_dark_ground_is_taken_and_it_is_said(tmp_path):
    """As scanners store DAPI."""
    plane = glowing(130)
    pixels = np.stack([plane // 100, plane // 60, plane])
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(pixels, 0, -1), photometric="rgb")
    tifffile.imwrite(tmp_path / "b.tif", plane)
    result = segpipe.predict(
        [tmp_path / "a.tif", tmp_path / "b.tif"], tmp_path / "out", _settings()
    )
    assert result.exit_code == 0
    found = [labels_of(tmp_path / "out", name) for name in "ab"]
    assert found[0].max() > 5
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(segpipe.segment(pixels, settings=_settings()), found[0])
    told = json.loads((tmp_path / "out" / "run.json").read_text())["images"]["a"]
    assert told["channels"] == ["blue"]
    assert told["model_chosen"] == "blue alone on a dark ground, stored as RGB"


def _settings():
    return segpipe.load_settings(None, [*SMALL, "engine.kind=serial", "measure.preview=false"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: blue(glowing()), r"ground is dark.*\(--channel blue\?\) for nuclei-fluorescence"),
        (lambda: 255 - np.stack([glowing()] * 3), "grey on a bright ground"),
        (lambda: stained().astype(np.uint16) * 257, "RGB of uint16"),
    ],
)
def test_what_no_shipped_model_is_for_is_refused_in_one_line(tmp_path, make, message):
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(make(), 0, -1), photometric="rgb")
    result = run(tmp_path / "a.tif", tmp_path / "out", *SMALL)
    with pytest.raises(InputError, match=f"a.tif: .*{message}") as caught:
        raise InputError(result.images[0].error)
    assert result.exit_code == 1 and "\n" not in str(caught.value)
    with pytest.raises(InputError, match=message):
        segpipe.segment(make())


def test_a_named_model_is_not_questioned(tmp_path, rgb_model):
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(blue(glowing()), 0, -1), photometric="rgb")
    result = run(tmp_path / "a.tif", tmp_path / "out", f"infer.model={rgb_model}")
    assert result.exit_code == 0
    told = json.loads((tmp_path / "out" / "run.json").read_text())["images"]["a"]
    assert told["model"] == "untrained-rgb" and told["model_chosen"] is None


def test_settings_that_say_what_is_black_allow_16_bits():
    pixels = stained().astype(np.uint16) * 257
    settings = segpipe.load_settings(None, ["infer.normalise=[0,65535]"])
    assert choose_for_colours(pixels, pixels.dtype, settings, "a").model == "nuclei-he"


@pytest.mark.parametrize("length", [1, 40, 256, 257, 1000, 100_000])
def test_squares_lie_inside_and_over_the_whole(length):
    starts = choosing._starts(length)
    assert starts[0] >= 0 and max(starts) + min(choosing.SIDE, length) <= length
    assert len(starts) == (1 if length <= 256 else 2 if length == 257 else 3)


def test_a_damaged_square_does_not_decide(monkeypatch, tmp_path):
    pixels = np.moveaxis(stained(900), 0, -1)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(64, 64))
    with open_slide(tmp_path / "a.tif") as slide:
        real = type(slide).read

        def read(self, box: Box, channels=None):
            if box.y0 < 300:
                raise InputError("a.tif: damaged")
            return real(self, box, channels)

        monkeypatch.setattr(type(slide), "read", read)
        assert choose_model(slide, Settings()).model == "nuclei-he"
        monkeypatch.setattr(choosing, "_starts", lambda _: [0])
        with pytest.raises(InputError, match="damaged"):
            choose_model(slide, Settings())
