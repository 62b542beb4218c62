"""The promise: workers, order, region sizes and engines cannot be seen in the result."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from scipy import ndimage

import plain
import segpipe
from fields import CORE, SIZES, SMALL, labels_of, nuclei, run, table_of, threshold_model
from segpipe.components import to_byte
from segpipe.models.modelfile import read_card
from segpipe.settings import load_settings


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return nuclei(tmp_path_factory.mktemp("in") / "field.tif", (420, 610))


@pytest.fixture(scope="module")
def reference(image, tmp_path_factory):
    out = tmp_path_factory.mktemp("serial")
    assert run(image, out, "engine.kind=serial").exit_code == 0
    return out


def test_serial_gives_the_plain_decode_of_its_probabilities(reference):
    probabilities = zarr.open_array(
        reference / ".segpipe" / "field.work" / "probabilities.zarr", mode="r"
    )[:]
    decode = read_card(threshold_model()).decode
    expected = plain.instances(
        probabilities[0],
        probabilities[1],
        to_byte(decode.foreground),
        [to_byte(level) for level in decode.interior],
        decode.min_area,
        [to_byte(level) for level in decode.growth_levels],
        decode.growth_steps,
    )
    labels = labels_of(reference, "field")
    assert labels.max() > 20
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(
    "settings",
    [
        ("engine.kind=serial", f"tile.region={CORE}"),
        ("engine.kind=serial", f"tile.region={CORE * 8}"),
        ("engine.kind=serial", f"stitch.region={SMALL}"),
        ("engine.kind=local", "engine.workers=1"),
        ("engine.kind=local", "engine.workers=2", "stitch.region=96"),
        ("engine.kind=serial", "infer.threads=2"),
    ],
    ids=" ".join,
)
def test_the_same_bytes_and_the_same_table(image, reference, tmp_path, settings):
    assert run(image, tmp_path, *settings).exit_code == 0
    np.testing.assert_array_equal(labels_of(tmp_path, "field"), labels_of(reference, "field"))
    tables = [(out / "field.parquet").read_bytes() for out in (tmp_path, reference)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_an_array_in_memory_gives_the_labels_of_the_file(tmp_path, dtype):
    pixels = tifffile.imread(nuclei(tmp_path / "made.tif", (150, 300)))
    pixels = (pixels // 40).clip(0, 255) if dtype == "uint8" else pixels
    pixels = (pixels - 1000.5 if dtype == "float32" else pixels).astype(dtype)
    pixels[:, :CORE] = pixels[0, 0]  # one tile says nothing about intensities
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    assert run(tmp_path / "a.tif", tmp_path / "out").exit_code == 0
    labels = segpipe.segment(pixels, str(threshold_model()), load_settings(None, SIZES))
    assert labels.max() > 5
    np.testing.assert_array_equal(labels, labels_of(tmp_path / "out", "a"))


def test_holes_are_filled_alike_whatever_the_regions(tmp_path):
    pixels = tifffile.imread(nuclei(tmp_path / "made.tif", (150, 300)))
    y, x = np.mgrid[:150, :300]
    for radius in (4, 30):
        pixels[np.abs(np.hypot(y - 70, x - 130) - radius) < 2] = pixels.max()
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    holes = ("stitch.max_hole=3000", f"tile.region={CORE}", "stitch.region=32")
    assert run(tmp_path / "a.tif", tmp_path / "out", *holes).exit_code == 0
    filled = labels_of(tmp_path / "out", "a")
    settings = load_settings(None, [*SIZES, "stitch.max_hole=3000"])
    np.testing.assert_array_equal(filled, segpipe.segment(pixels, str(threshold_model()), settings))
    assert run(tmp_path / "a.tif", tmp_path / "out").exit_code == 0
    bare = labels_of(tmp_path / "out", "a")
    assert filled[70, 110] > 0 and bare[70, 110] == 0


def test_objects_are_dropped_alike_whatever_the_regions(image, reference, tmp_path):
    drops = ("stitch.max_area=400", "stitch.min_probability=0.9")
    for name, region in (("small", "stitch.region=32"), ("large", f"tile.region={CORE * 8}")):
        assert run(image, tmp_path / name, *drops, region).exit_code == 0
    labels = labels_of(tmp_path / "small", "field")
    np.testing.assert_array_equal(labels, labels_of(tmp_path / "large", "field"))
    table = table_of(tmp_path / "small", "field")
    assert table.equals(table_of(tmp_path / "large", "field"))
    pixels = tifffile.imread(image)
    settings = load_settings(None, [*SIZES, *drops])
    np.testing.assert_array_equal(labels, segpipe.segment(pixels, str(threshold_model()), settings))
    kept, whole = table.to_pydict(), table_of(reference, "field").to_pydict()
    stay = [
        place
        for place, area in enumerate(whole["area_px"])
        if area <= 400 and whole["mean_probability"][place] >= 0.9
    ]
    assert 0 < len(stay) < len(whole["id"])
    assert kept["id"] == list(range(1, len(stay) + 1))
    for column in ("area_px", "centroid_y_px", "mean_probability"):
        assert kept[column] == [whole[column][place] for place in stay]


def test_the_table_is_that_of_the_labels(reference):
    labels = labels_of(reference, "field")
    table = pq.read_table(reference / "field.parquet").to_pydict()
    assert table["id"] == list(range(1, labels.max() + 1))
    assert table["area_px"] == np.bincount(labels.ravel())[1:].tolist()
    centres = ndimage.center_of_mass(labels > 0, labels, table["id"])
    np.testing.assert_allclose(table["centroid_y_px"], [y for y, _ in centres])
    np.testing.assert_allclose(table["centroid_x_px"], [x for _, x in centres])
    np.testing.assert_allclose(table["centroid_x_um"], np.array(table["centroid_x_px"]) * 0.5)


def test_every_level_of_labels_is_every_second_pixel_of_the_one_above(reference):
    group = reference / "field.ome.zarr" / "labels" / "instances"
    levels = zarr.open_group(group, mode="r").attrs["ome"]["multiscales"][0]["datasets"]
    above = None
    for level in levels:
        here = zarr.open_array(group / level["path"], mode="r")[:]
        if above is not None:
            np.testing.assert_array_equal(here, above[::2, ::2])
        above = here
    assert len(levels) > 2


def test_every_level_of_the_image_is_the_mean_of_the_one_above(reference):
    group = reference / "field.ome.zarr"
    above = zarr.open_array(group / "0", mode="r")[:].astype(float)
    below = zarr.open_array(group / "1", mode="r")[:]
    height, width = above.shape[1:]
    assert (height % 2, width % 2) == (0, 0)
    mean = above.reshape(1, height // 2, 2, width // 2, 2).mean(axis=(2, 4))
    np.testing.assert_array_equal(below, np.floor(mean + 0.5))
