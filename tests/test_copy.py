"""A slide that is read where it is: the same labels, and OUT holds no full-resolution image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
import zarr

from fields import SIZES, labels_of, run, table_of
from segpipe import image_layout
from segpipe.geometry import Box
from segpipe.plan import plan_job
from segpipe.plan_text import plan_text
from segpipe.settings import load_settings
from segpipe.store import Grid, create_image, halve_mean, read_box, write_shard
from segpipe.synthetic import NucleiField

SHAPE = (420, 364)


@pytest.fixture(scope="module", params=["jpeg", "ome-zarr"])
def slide(request, tmp_path_factory):
    """A pyramid of three levels at 0.5 um a pixel."""
    folder = tmp_path_factory.mktemp("in")
    if request.param == "jpeg":
        return jpeg(folder / "slide.ome.tif")
    return ome_zarr(folder / "slide.ome.zarr")


def jpeg(path):
    field = NucleiField(SHAPE, seed=3, empty=0.0).pixels(Box(0, 0, *SHAPE))
    pixels = np.clip(field / 10, 0, 255).astype(np.uint8)
    size = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    options = {"tile": (64, 64), "compression": "jpeg", "photometric": "minisblack"}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(pixels, subifds=2, metadata={"axes": "YX"}, **size, **options)
        for number in (1, 2):
            part = pixels[: SHAPE[0] >> number << number, : SHAPE[1] >> number << number]
            shape = (SHAPE[0] >> number, 1 << number, SHAPE[1] >> number, 1 << number)
            small = part.reshape(shape).mean((1, 3)).astype(np.uint8)
            file.write(small, subfiletype=1, **options)
    return path


def ome_zarr(path, chunk=128):
    pixels = NucleiField(SHAPE, seed=3, empty=0.0).pixels(Box(0, 0, *SHAPE))[None]
    grid = Grid.fitting(SHAPE, 4 * chunk, chunk)
    more = {"pixel_size_um": 0.5, "name": "slide", "rgb": False}
    create_image(path, ["nuclei"], grid, pixels.dtype, **more)
    for level, shape in enumerate(grid.levels):
        write_shard(path / str(level), Box(0, 0, *shape), pixels)
        pixels = halve_mean(pixels)
    return path


@pytest.fixture(scope="module", params=["tile.scale=1", "tile.scale=0.7"])
def results(request, slide, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    for copy in ("always", "never"):
        done = run(slide, out / copy, request.param, f"tile.copy={copy}", "measure.preview=true")
        assert done.exit_code == 0
    return out / "always", out / "never"


def test_labels_table_and_probabilities_are_the_same_bytes(results):
    copied, direct = results
    labels = labels_of(copied, "slide")
    assert labels.max() > 20
    assert labels.tobytes() == labels_of(direct, "slide").tobytes()
    assert table_of(copied, "slide").equals(table_of(direct, "slide"))
    inside = ".segpipe/slide.work/probabilities.zarr"
    one, other = (zarr.open_array(out / inside, mode="r")[:] for out in results)
    assert one.tobytes() == other.tobytes()


def test_only_coarse_levels_are_kept_and_they_lie_where_they_should(results):
    _, direct = results
    one, other = (zarr.open_group(out / "slide.ome.zarr", mode="r") for out in results)
    ours, theirs = (group.attrs["ome"]["multiscales"][0]["datasets"] for group in (other, one))
    assert [entry["path"] for entry in ours] == [entry["path"] for entry in theirs[1:]]
    assert ours == theirs[1:]  # scale and translation too
    assert not (direct / "slide.ome.zarr" / "0").exists()
    for entry in ours:
        fine, coarse = (group[entry["path"]][0].astype(float) for group in (one, other))
        assert fine.shape == coarse.shape
        assert (
            np.corrcoef(fine.ravel(), coarse.ravel())[0, 1] > 0.9
        )  # other filters, the same place
    used = [
        sum(
            path.stat().st_size
            for path in (out / "slide.ome.zarr").glob("[0-9]/**/*")
            if path.is_file()
        )
        for out in results
    ]
    assert used[1] < 0.5 * used[0]
    told = json.loads((direct / "run.json").read_text())["images"]["slide"]
    assert told["copied"] is False
    assert (direct / "slide.png").stat().st_size > 10_000


def test_it_is_done_and_goes_on_as_any_other(results, slide, request):
    _, direct = results
    scale = request.node.callspec.params["results"]
    again = run(slide, direct, scale, "tile.copy=never", "measure.preview=true")
    assert [one.status for one in again.images] == ["skipped"]
    (direct / "slide.ome.zarr" / "1" / "c" / "0" / "0" / "0").unlink()
    before = labels_of(direct, "slide")
    again = run(slide, direct, scale, "tile.copy=never", "measure.preview=true")
    assert [one.status for one in again.images] == ["done"]
    assert read_box(direct / "slide.ome.zarr" / "1", Box(0, 0, 9, 9)).any()
    np.testing.assert_array_equal(before, labels_of(direct, "slide"))


def planned(slide, *more):
    """Whether it is copied, and bytes on disk."""
    chosen = load_settings(None, [*SIZES, *more])
    found = plan_job([slide], None, chosen, sampled=False)
    text = "\n".join(plan_text(found))
    assert ("read where they are" in text) == (not found.images[0].copied)
    return found.images[0].copied, found.images[0].disk_bytes


def test_by_itself_only_a_large_compressed_slide_with_a_pyramid_is_read_where_it_is(
    tmp_path, monkeypatch
):
    slide = jpeg(tmp_path / "slide.ome.tif")

    def copied(*more):
        return planned(slide, *more)

    assert copied()[0]  # small
    monkeypatch.setattr(image_layout, "LARGE_COPY_BYTES", 1000)
    monkeypatch.setattr(image_layout, "MANY_TIMES", 0)
    assert not copied()[0]
    assert copied("tile.copy=always")[0]
    assert not copied("tile.scale=0.25")[0]  # a level as it is
    assert copied("tile.scale=0.4")[0]  # resampled
    assert copied()[1] < copied("tile.copy=always")[1]
    monkeypatch.setattr(image_layout, "MANY_TIMES", 1000)
    assert copied()[0]  # the file is not much smaller


def test_by_itself_a_large_ome_zarr_of_suitable_chunks_is_read_where_it_is(tmp_path, monkeypatch):
    good = ome_zarr(tmp_path / "good.ome.zarr")
    assert planned(good)[0]  # small
    monkeypatch.setattr(image_layout, "LARGE_ZARR_BYTES", 1000)
    assert not planned(good)[0]
    assert planned(good, "tile.copy=always")[0]
    assert not planned(good, "tile.scale=0.5")[0]  # a level as it is
    assert planned(good, "tile.scale=0.4")[0]  # resampled
    assert planned(good)[1] < planned(good, "tile.copy=always")[1]
    assert planned(ome_zarr(tmp_path / "small.ome.zarr", chunk=64))[0]
    stack = tmp_path / "stack.ome.zarr"
    for depth in (1, 2):  # planes in a chunk
        group = zarr.open_group(stack, mode="w")
        for level, side in enumerate((256, 128)):
            group.create_array(
                str(level), shape=(4, side, side), chunks=(depth, 128, 128), dtype="uint8"
            )
        axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
        datasets = [{"path": path} for path in "01"]
        multiscale = {"axes": axes, "datasets": datasets}
        group.attrs["ome"] = {"version": "0.5", "multiscales": [multiscale]}
        assert planned(stack, "tile.z=[1]")[0] == (depth > 1)
        assert planned(stack, "tile.z=max")[0]


def test_a_large_ome_zarr_is_shown_though_it_is_not_copied(tmp_path, monkeypatch):
    slide = ome_zarr(tmp_path / "slide.ome.zarr")
    monkeypatch.setattr(image_layout, "LARGE_ZARR_BYTES", 1000)
    out = tmp_path / "out"
    assert run(slide, out, "measure.preview=true").exit_code == 0
    assert not (out / "slide.ome.zarr" / "0").exists()
    multiscales = zarr.open_group(out / "slide.ome.zarr", mode="r").attrs["ome"]["multiscales"]
    for entry in multiscales[0]["datasets"]:  # what napari and others are told is there
        assert (out / "slide.ome.zarr" / entry["path"] / "zarr.json").is_file()
    assert 'src="data:image/jpeg' in (out / "report.html").read_text()
    same = run(slide, tmp_path / "copied", "tile.copy=always")
    assert same.exit_code == 0
    assert labels_of(out, "slide").tobytes() == labels_of(tmp_path / "copied", "slide").tobytes()


def test_an_image_of_one_tile_can_do_without_a_copy(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30), np.uint8)
    tifffile.imwrite(tmp_path / "tiny.tif", pixels)
    assert run(tmp_path / "tiny.tif", tmp_path / "out", "tile.copy=never").exit_code == 0
    assert np.array_equal(zarr.open_array(tmp_path / "out" / "tiny.ome.zarr" / "0")[0], pixels)
