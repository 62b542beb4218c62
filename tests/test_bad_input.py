"""Bad input gives one clear line, and nothing else is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image

from fields import SIZES, labels_of, nuclei, run, table_of
from segpipe.cli import main
from segpipe.errors import SettingsError
from segpipe.inputs import find_inputs

SETS = [part for size in SIZES for part in ("-s", size)]


def segpipe(*arguments: object):
    """Run the command line in this process; stderr must be lines, never a traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def predict(folder: Path, out: Path, *more: str):
    """The command over a folder; its messages come from the log."""
    return segpipe("predict", folder, "-o", out, *SETS, "--engine", "serial", *more)


def test_an_empty_folder(tmp_path):
    (tmp_path / "in").mkdir()
    result = predict(tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 2
    assert "no images in" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists(), "nothing was started"


def test_a_path_that_does_not_exist(tmp_path):
    result = predict(tmp_path / "none", tmp_path / "out")
    assert result.exit_code == 2
    assert "no such file or folder" in result.stderr


def test_bad_files_are_named_and_the_good_one_is_finished(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    good = nuclei(folder / "good.tif", (130, 150))
    (folder / "text.tif").write_text("not an image\n")
    (folder / "empty.tif").write_bytes(b"")
    (folder / "short.tif").write_bytes(good.read_bytes()[: good.stat().st_size // 3])
    result = run(folder, out)
    assert result.exit_code == 1
    failed = {one.name: str(one.error) for one in result.failed}
    assert sorted(failed) == ["empty", "short", "text"]
    for name, error in failed.items():
        assert f"{name}.tif" in error or name in error
        assert "\n" not in error
    assert labels_of(out, "good").max() > 0
    good.replace(folder / "short.tif")  # repaired: a rerun finishes it, and only it
    again = run(folder / "short.tif", out)
    assert again.exit_code == 0
    np.testing.assert_array_equal(labels_of(out, "short"), labels_of(out, "good"))


def test_one_corrupt_tile_is_named_and_the_rest_is_finished(tmp_path):
    path = nuclei(tmp_path / "field.tif", (256, 256))
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[5]
    data = bytearray(path.read_bytes())
    whole = tmp_path / "whole.tif"
    whole.write_bytes(data)
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    result = run(path, tmp_path / "out", "tile.region=128")
    assert result.exit_code == 1
    assert "field" in str(result.images[0].error) and "1 region failed" in str(
        result.images[0].error
    )
    assert [one["box"] for one in result.images[0].failed_regions] == [[0, 0, 128, 128]]
    assert labels_of(tmp_path / "out", "field").max() > 0
    path.write_bytes(whole.read_bytes())
    assert run(path, tmp_path / "out", "tile.region=128").exit_code == 0
    assert run(whole, tmp_path / "out", "tile.region=128").exit_code == 0
    np.testing.assert_array_equal(
        labels_of(tmp_path / "out", "field"), labels_of(tmp_path / "out", "whole")
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (7, 3), (33, 64)])
def test_tiny_images(tmp_path, shape):
    path = tmp_path / "tiny.tif"
    rng = np.random.default_rng(0)
    tifffile.imwrite(path, rng.integers(0, 1000, shape, dtype=np.uint16), photometric="minisblack")
    assert run(path, tmp_path / "out", "measure.preview=true").exit_code == 0
    assert labels_of(tmp_path / "out", "tiny").shape == shape
    with Image.open(tmp_path / "out/tiny.png") as picture:
        assert picture.size[0] > 100


def test_nan_and_inf_count_as_the_darkest_value_and_are_warned_of(tmp_path):
    path = nuclei(tmp_path / "clean.tif", (192, 192))
    pixels = tifffile.imread(path).astype(np.float32)
    low = np.percentile(pixels, 1, method="inverted_cdf")
    darkest = pixels.copy()
    holes = np.zeros(pixels.shape, bool)
    holes[10:14, 50:60] = holes[100, 7:30] = True
    darkest[holes] = np.nan
    darkest[100, 7:20] = np.inf
    tifffile.imwrite(tmp_path / "holes.tif", darkest, tile=(64, 64))
    result = run(tmp_path / "holes.tif", tmp_path / "out")
    assert result.exit_code == 0
    assert f"{holes.sum()} pixels are NaN or infinite" in result.images[0].warnings[0]
    finite = np.sort(pixels[~holes])
    filled = np.where(holes, finite[int(np.ceil(0.01 * finite.size)) - 1], pixels)
    assert abs(float(filled[holes][0]) - low) < 50
    tifffile.imwrite(tmp_path / "filled.tif", filled, tile=(64, 64))
    high = finite[int(np.ceil(0.998 * finite.size)) - 1]
    fixed = f"infer.normalise=[{filled[holes][0]}, {high}]"
    assert run(tmp_path / "filled.tif", tmp_path / "out", fixed).exit_code == 0
    np.testing.assert_array_equal(
        labels_of(tmp_path / "out", "holes"), labels_of(tmp_path / "out", "filled")
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_constant_image_has_no_objects_and_is_no_error(tmp_path, dtype):
    path = tmp_path / "flat.tif"
    tifffile.imwrite(path, np.full((150, 150), 7, dtype))
    result = run(path, tmp_path / "out")
    assert result.exit_code == 0
    assert result.images[0].objects == 0
    assert "constant" in result.images[0].warnings[0]
    assert table_of(tmp_path / "out", "flat").num_rows == 0


def test_a_few_objects_in_a_dark_field_are_not_lost_to_percentiles(tmp_path):
    """Both percentiles are background here; the maximum then serves as the high one."""
    pixels = np.zeros((512, 512), np.uint16)
    y, x = np.mgrid[:512, :512]
    pixels[np.hypot(y - 200, x - 210) < 10] = 900
    tifffile.imwrite(tmp_path / "sparse.tif", pixels)
    result = run(tmp_path / "sparse.tif", tmp_path / "out", "tile.core=512", "tile.region=512")
    assert result.images[0].objects == 1


def test_channels_that_do_not_fit_the_model(tmp_path, rgb_model):
    gray = nuclei(tmp_path / "gray.tif", (100, 100))
    result = run(gray, tmp_path / "out", f"infer.model={rgb_model}")
    assert result.exit_code == 1
    assert "gray.tif" in str(result.images[0].error) and "3" in str(result.images[0].error)
    colour = tmp_path / "colour.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 80, 3), np.uint8)).save(colour)
    result = run(colour, tmp_path / "out")
    assert result.exit_code == 1 and "--channel" in str(result.images[0].error)
    assert run(colour, tmp_path / "out", "tile.channel=[green]").exit_code == 0
    assert run(colour, tmp_path / "out2", f"infer.model={rgb_model}").exit_code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stitch:\n  min_aera: 4\n", "did you mean 'stitch.min_area'?"),
        ("stitch:\n  min_area: many\n", "stitch.min_area: input should be a valid integer"),
        ("stitch: [", "is not YAML"),
    ],
)
def test_a_wrong_yaml_is_named_before_anything_starts(tmp_path, text, message):
    config = tmp_path / "my.yaml"
    config.write_text(text)
    image = nuclei(tmp_path / "in/a.tif", (80, 80))
    result = segpipe("predict", image, "-o", tmp_path / "out", "-c", config)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_is_named(tmp_path):
    image = nuclei(tmp_path / "in/a.tif", (80, 80))
    result = predict(image, tmp_path / "out", "-m", "nuclei-fluoresence")
    assert result.exit_code == 2
    assert "nuclei-fluorescence" in result.stderr and result.stderr.count("\n") == 1


def test_an_output_folder_that_is_a_file(tmp_path):
    image = nuclei(tmp_path / "in/a.tif", (80, 80))
    (tmp_path / "out").write_text("")
    result = predict(image, tmp_path / "out")
    assert result.exit_code == 2
    assert "cannot write into" in result.stderr


def test_a_full_disk_is_named_and_the_rerun_goes_on(tmp_path, monkeypatch):
    """The third shard of probabilities finds the disk full."""
    image = nuclei(tmp_path / "in/a.tif", (400, 400))
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        if "probabilities" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            calls.append(handle)
            if len(calls) > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    result = run(image, tmp_path / "out")
    assert result.exit_code == 1
    assert "No space left on device" in str(result.images[0].error)
    monkeypatch.setattr(os, "fsync", real)
    assert run(image, tmp_path / "out").exit_code == 0
    assert run(image, tmp_path / "other").exit_code == 0
    np.testing.assert_array_equal(
        labels_of(tmp_path / "out", "a"), labels_of(tmp_path / "other", "a")
    )


def test_a_read_only_output_folder(tmp_path, monkeypatch):
    image = nuclei(tmp_path / "in/a.tif", (80, 80))

    def refuse(_path: Path, _data: bytes) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(SettingsError, match=r"cannot write into .* Read-only file system"):
        run(image, tmp_path / "out")


def test_names_with_spaces_unicode_dots_and_markup(tmp_path):
    folder, out = tmp_path / "in put", tmp_path / "out"
    names = [
        "a b.tif",
        "Zelle-äß-細胞.tif",
        "x..y.tif",
        "..z.tif".lstrip("."),
        "<img src=x>.tif",
        "-o.tif",
    ]
    for name in names:
        nuclei(folder / name, (70, 70))
    result = run(folder, out)
    assert result.exit_code == 0
    assert len(list(out.glob("*.parquet"))) == len(names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in put", "out"]


def test_names_cannot_leave_the_output_folder_and_stay_once_given(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ["a.png", "a.tif", "sub/a.tif", "b.ome.tif", "bad\nname.tif", "n" * 240 + ".tif"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    first = {one.source.name: one.name for one in find_inputs([folder], out)}
    assert first["a.png"] == "a" and first["b.ome.tif"] == "b"
    assert first["bad\nname.tif"] == "bad_name"
    assert {one.name for one in find_inputs([folder / "a.tif"], out)} == {"a.tif"}
    assert {one.name for one in find_inputs([folder / "sub" / "a.tif"], out)} == {"sub/a"}
    assert all(len(Path(name).name.encode()) <= 160 for name in first.values())
    (folder / "a.jpg").touch()
    after = {one.source.name: one.name for one in find_inputs([folder], out)}
    assert after | first == after
    assert after["a.jpg"] == "a.jpg"
    up = find_inputs([folder / "sub" / ".." / "a.png"], out)
    assert [one.name for one in up] == ["a"]


def test_results_inside_the_input_folder_are_not_inputs(tmp_path):
    image = nuclei(tmp_path / "a.tif", (80, 80))
    assert run(tmp_path, tmp_path / "out").exit_code == 0
    result = run(tmp_path, tmp_path / "out")
    assert [one.name for one in result.images] == ["a"]
    assert [one.source for one in find_inputs([tmp_path], tmp_path / "other")] == [image]


def test_help_answers_at_once():
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "segpipe.cli", "--help"], check=True, capture_output=True
        )
        seconds.append(time.perf_counter() - started)
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "segpipe.cli", "--help"],
        check=True,
        capture_output=True,
        text=True,
    ).stderr
    for heavy in ("torch", "numpy", "dask", "numba", "zarr", "pydantic"):
        assert f" {heavy}\n" not in loaded, f"{heavy} is imported for --help"
    assert min(seconds) < 0.3, os.fspath(sys.executable)
