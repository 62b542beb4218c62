"""Images whose pixels are not as large as the model's: worked on at its scale, told at their own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner
from PIL import Image

from fields import SIZES, labels_of, nuclei, run, table_of, threshold_model
from segpipe.cli import main
from segpipe.errors import SettingsError
from segpipe.export import preview
from segpipe.geometry import Box
from segpipe.plan import plan_job
from segpipe.plan_text import plan_text
from segpipe.settings import load_settings

UM = 0.25


def disc(path, *, centre=(203.0, 118.0), radius=60.0, shape=(330, 270), um=UM, **more):
    """A bright disc on a dark ground, at 0.25 um a pixel where nothing else is said."""
    y, x = np.indices(shape)
    inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2
    pixels = np.where(inside, 200, 10).astype(np.uint8)
    size = {"resolution": (1e4 / um, 1e4 / um), "resolutionunit": "CENTIMETER"} if um else {}
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="minisblack", **size, **more)
    return path


@pytest.mark.parametrize("factor", [0.5, 0.37, 1.7])
def test_a_disc_is_as_large_and_where_it_is_whatever_the_scale(tmp_path, factor):
    disc(tmp_path / "disc.tif")
    run(tmp_path / "disc.tif", tmp_path / "out", f"tile.scale={factor}")
    (row,) = table_of(tmp_path / "out", "disc").to_pylist()
    area = np.pi * 60.0**2
    assert row["area_px"] == pytest.approx(area, rel=0.04)
    assert row["area_um2"] == pytest.approx(area * UM**2, rel=0.04)
    assert row["equivalent_diameter_px"] == pytest.approx(120, rel=0.02)
    assert row["equivalent_diameter_um"] == pytest.approx(30, rel=0.02)
    for axis, centre in (("y", 203.0), ("x", 118.0)):
        assert row[f"centroid_{axis}_px"] == pytest.approx(centre, abs=0.15)
        assert row[f"centroid_{axis}_um"] == pytest.approx(centre * UM, abs=0.15 * UM)
        assert row[f"bbox_{axis}0_px"] == pytest.approx(centre - 60, abs=1 / factor + 1)
        assert row[f"bbox_{axis}1_px"] == pytest.approx(centre + 61, abs=1 / factor + 1)
    assert not row["touches_border"]
    found = labels_of(tmp_path / "out", "disc")
    assert found.shape == tuple(np.ceil(np.array([330, 270]) * factor))
    told = json.loads((tmp_path / "out" / "run.json").read_text())["images"]["disc"]
    assert told["shape"] == [1, 330, 270] and told["working_shape"] == [1, *found.shape]
    assert told["scale"] == 1 / factor


def in_space(group, mask_of):
    """Where the mean of the marked pixels lies, in um, by the metadata of each level alone."""
    for dataset in group.attrs["ome"]["multiscales"][0]["datasets"]:
        pixels = mask_of(group[dataset["path"]][:])
        scale, shift = (one for one in dataset["coordinateTransformations"])
        places = np.argwhere(pixels).mean(axis=0)
        yield places * scale["scale"][-2:] + np.array(shift["translation"][-2:])


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.37, 1.7])
def test_image_and_labels_lie_where_the_metadata_say_at_every_level(tmp_path, factor):
    disc(tmp_path / "disc.tif")
    run(tmp_path / "disc.tif", tmp_path / "out", f"tile.scale={factor}")
    group = zarr.open_group(tmp_path / "out" / "disc.ome.zarr", mode="r")
    centre = np.array([203.0, 118.0]) * UM
    levels = list(in_space(group, lambda pixels: pixels[0] > 105))
    labels = list(in_space(group["labels/instances"], lambda pixels: pixels > 0))
    assert len(levels) == len(labels) > 2
    for level, (place, label) in enumerate(zip(levels, labels, strict=True)):
        pixel = UM / factor * 2**level
        assert np.abs(place - centre).max() < 0.2 * pixel, level
        assert np.abs(label - centre).max() < 0.35 * pixel + UM / 4, level
    row = table_of(tmp_path / "out", "disc").to_pylist()[0]
    assert labels[0] == pytest.approx([row["centroid_y_um"], row["centroid_x_um"]], abs=1e-9)


def test_an_image_twice_as_large_has_the_same_objects_at_twice_the_coordinates(tmp_path):
    path = nuclei(tmp_path / "small.tif", (400, 380))
    run(path, tmp_path / "out")
    pixels = tifffile.imread(path)
    tifffile.imwrite(tmp_path / "large.tif", pixels.repeat(2, 0).repeat(2, 1), tile=(64, 64))
    run(tmp_path / "large.tif", tmp_path / "out", "tile.scale=0.5")
    small, large = (table_of(tmp_path / "out", name).to_pandas() for name in ("small", "large"))
    assert labels_of(tmp_path / "out", "large").shape == (400, 380)
    assert len(small) > 40 and abs(len(large) - len(small)) <= 0.1 * len(small)
    keys = ["centroid_y_px", "centroid_x_px"]
    wanted = 2 * small[keys].to_numpy() + 0.5
    apart = np.linalg.norm(wanted[:, None] - large[keys].to_numpy()[None], axis=2)
    near = apart.min(axis=1) < 3
    assert near.mean() > 0.85
    ratio = large["area_px"].to_numpy()[apart.argmin(1)[near]] / small["area_px"].to_numpy()[near]
    assert np.median(ratio) == pytest.approx(4, rel=0.1)


def test_regions_do_not_show_in_what_was_resampled(tmp_path):
    path = nuclei(tmp_path / "field.tif", (700, 610))
    found = []
    for region in (64, 192, 1024):
        out = tmp_path / f"out{region}"
        run(path, out, "tile.scale=0.61", f"tile.region={region}")
        pixels = zarr.open_array(out / "field.ome.zarr" / "0", mode="r")[:]
        found.append((pixels.tobytes(), labels_of(out, "field").tobytes()))
        assert pixels.shape == (1, 427, 373)
    assert found[0] == found[1] == found[2]
    assert labels_of(tmp_path / "out64", "field").max() > 20


def test_a_level_of_the_file_is_taken_as_it_is_where_it_is_near_enough(tmp_path):
    rng = np.random.default_rng(0)
    levels = [rng.integers(0, 255, (400 >> n, 320 >> n), np.uint8) for n in (0, 1, 2)]
    with tifffile.TiffWriter(tmp_path / "pyramid.ome.tif", bigtiff=True) as file:
        file.write(levels[0], tile=(64, 64), subifds=2, metadata={"axes": "YX"})
        for level in levels[1:]:
            file.write(level, tile=(64, 64), subfiletype=1)
    for factor, expected in ((0.51, levels[1]), (0.25, levels[2])):
        out = tmp_path / str(factor)
        run(tmp_path / "pyramid.ome.tif", out, f"tile.scale={factor}", stages=("tile",))
        pixels = zarr.open_array(out / "pyramid.ome.zarr" / "0", mode="r")[0]
        assert np.array_equal(pixels, expected)
    run(tmp_path / "pyramid.ome.tif", tmp_path / "third", "tile.scale=0.333", stages=("tile",))
    told = json.loads((tmp_path / "third" / "manifests" / "pyramid.tile.json").read_text())
    assert told["facts"]["shape"] == [1, 134, 107]
    lines = "\n".join(plan_text(plan([tmp_path / "pyramid.ome.tif"], "tile.scale=0.333")))
    assert "worked on 3.003 times narrower" in lines and "level 1 of the file is resampled" in lines


def plan(inputs, *more):
    return plan_job(inputs, None, load_settings(None, [*SIZES, *more]), sampled=False)


def test_the_plan_knows_the_scale(tmp_path):
    disc(tmp_path / "disc.tif")
    found = plan([tmp_path / "disc.tif"], "tile.scale=0.5")
    (image,) = found.images
    assert image.shape == (1, 165, 135) and image.full_shape == (330, 270)
    assert image.tiles == 9
    assert "worked on 2 times narrower" in "\n".join(plan_text(found))
    assert found.to_json()["images"][0]["resolution"]["scale"] == 2.0
    assert "scale  " not in "\n".join(plan_text(plan([tmp_path / "disc.tif"])))


def test_the_diameter_and_the_pixel_size_scale_to_what_the_model_knows(tmp_path):
    disc(tmp_path / "disc.tif")
    for setting, model in (
        ("tile.diameter=120", threshold_model(diameter_px=60.0)),
        ("tile.pixel_size_um=null", threshold_model(pixel_size_um=0.5)),
        ("tile.pixel_size_um=0.125", threshold_model(pixel_size_um=0.25)),
    ):
        (image,) = plan([tmp_path / "disc.tif"], setting, f"infer.model={model}").images
        assert image.resolution.scale == pytest.approx(2.0), setting
    near = threshold_model(pixel_size_um=0.26)
    (image,) = plan([tmp_path / "disc.tif"], f"infer.model={near}").images
    assert image.resolution.scale == 1.0  # 4 % are not resampled


def test_a_pixel_size_that_nobody_states_is_an_error_that_names_the_setting(tmp_path):
    (tmp_path / "in").mkdir()
    disc(tmp_path / "in" / "stated.tif", um=0.5)
    disc(tmp_path / "in" / "silent.tif", um=None)
    model = f"infer.model={threshold_model(pixel_size_um=0.5)}"
    result = run(tmp_path / "in", tmp_path / "out", model)
    assert {one.name: one.status for one in result.images} == {"stated": "done", "silent": "failed"}
    (bad,) = result.failed
    assert "--pixel-size UM" in bad.error and "silent" in bad.error and "\n" not in bad.error
    again = run(tmp_path / "in" / "silent.tif", tmp_path / "out", model, "tile.scale=1")
    assert again.exit_code == 0
    options = [str(tmp_path / "in" / "silent.tif"), "-o", str(tmp_path / "cli"), "-s", model]
    sizes = [word for one in SIZES[:-1] for word in ("-s", one)]
    told = CliRunner().invoke(main, ["predict", *options, *sizes, "--pixel-size", "0.25"])
    assert told.exit_code == 0, told.output
    assert labels_of(tmp_path / "cli", "silent").shape == (165, 135)
    told = CliRunner().invoke(main, ["predict", *options, *sizes, "--pixel-size", "500"])
    assert told.exit_code == 1 and "1,000 times as wide" in told.output


def test_what_cannot_go_together_is_said_before_anything_is_started(tmp_path):
    disc(tmp_path / "disc.tif")
    with pytest.raises(SettingsError, match="give one of them"):
        run(tmp_path / "disc.tif", tmp_path / "out", "tile.scale=2", "tile.diameter=30")
    with pytest.raises(SettingsError, match="does not say which diameter"):
        run(tmp_path / "disc.tif", tmp_path / "out", "tile.diameter=30")
    assert not list((tmp_path / "out").glob("*.zarr"))


def test_another_scale_is_another_result(tmp_path):
    disc(tmp_path / "disc.tif")
    run(tmp_path / "disc.tif", tmp_path / "out", "tile.scale=0.5")
    run(tmp_path / "disc.tif", tmp_path / "out", "tile.scale=0.25")
    assert labels_of(tmp_path / "out", "disc").shape == (83, 68)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    run(tmp_path / "disc.tif", tmp_path / "out", "tile.scale=0.25")
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")
    }


@pytest.mark.parametrize("copy", ["always", "never"])
@pytest.mark.parametrize("factor", [1.0, 0.6, 1.3])
def test_the_picture_shows_objects_and_pixels_at_one_place(tmp_path, factor, copy, monkeypatch):
    """Overview and detail, whatever was worked on and wherever it is read: both agree with the file."""
    height, width = 2300, 1750
    y, x = np.indices((height, width))
    near = np.hypot(y % 290 - 130, x % 310 - 170) <= 60
    near &= (y // 290 + 2 * (x // 310)) % 3 == 0  # no row and no column is as another
    pixels = np.where(near, 200, 10).astype(np.uint8)
    tifffile.imwrite(tmp_path / "discs.tif", pixels, tile=(256, 256), photometric="minisblack")
    shown = []

    def compose(*views):
        shown.append(views[:2])
        return composed(*views)

    composed = preview.compose
    monkeypatch.setattr(preview, "compose", compose)
    sizes = ["tile.chunk=128", "tile.core=256", "tile.region=512", "measure.preview=true"]
    sizes += [f"tile.scale={factor}", f"tile.copy={copy}"]
    assert run(tmp_path / "discs.tif", tmp_path / "out", *sizes).exit_code == 0
    ((overview, detail),) = shown
    assert overview.box == Box(0, 0, height, width)
    assert detail.box.area < height * width / 4
    for view in (overview, detail):
        rows, columns = (
            (start + (np.arange(count) + 0.5) * (stop - start) / count).astype(int)
            for start, stop, count in (
                (view.box.y0, view.box.y1, view.labels.shape[0]),
                (view.box.x0, view.box.x1, view.labels.shape[1]),
            )
        )
        truth = near[np.ix_(rows, columns)]
        bright = view.display.min(axis=2) > 128
        assert truth.any() and not truth.all()
        for found in (view.labels > 0, bright):
            assert (found & truth).sum() / (found | truth).sum() > 0.93
    with Image.open(tmp_path / "out" / "discs.png") as picture:
        assert picture.size[0] > 1000
