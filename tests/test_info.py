"""`segpipe info`: what a file is, and what predict would do with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner, Result

from segpipe.cli import main

Pixels = np.ndarray[Any, np.dtype[Any]]


def info(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["info", *(str(argument) for argument in arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def noise(*shape: int, dtype: str = "uint8") -> Pixels:
    return np.random.default_rng(0).integers(1, 200, shape).astype(dtype)


@pytest.fixture
def svs(tmp_path: Path) -> Path:
    """Tissue with two levels, a thumbnail and a label; its second level has no bytes."""
    path = tmp_path / "a.svs"
    pixels = np.full((1300, 1100, 3), 235, np.uint8)
    pixels[300:900, 300:900] = noise(600, 600, 1) // 3 + np.uint8([90, 40, 110])
    common: dict[str, Any] = {"photometric": "rgb", "metadata": None, "compression": "zlib"}
    tile = {"tile": (256, 256)}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(pixels, description="Aperio Image |MPP = 0.25", **tile, **common)
        tiff.write(pixels[::8, ::8], description="Aperio thumbnail", **common)
        tiff.write(pixels[::2, ::2], description="Aperio level", **tile, **common)
        tiff.write(pixels[::4, ::4], description="Aperio level", **tile, **common)
        tiff.write(noise(30, 20, 3), subfiletype=1, description="Aperio label", **common)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        counts = tiff.series[0].levels[1].keyframe.tags[325]
        counts.overwrite([0] * counts.count)
    return path


def test_a_slide_is_described_for_people_and_machines(svs: Path) -> None:
    told = info(svs).stdout
    for line in (
        "size        1,100 x 1,300 px, uint8",
        "channels    3: red, green, blue",
        "pixel size  0.25 um, by Aperio's MPP",
        "levels      1,100 x 1,300 (1/1), 275 x 325 (1/4)",
        "compression adobe_deflate",
        "reader      tifffile/svs",
        "left out    Thumbnail 138 x 163, Label 20 x 30",
        "warning     level 1 of the pyramid is left out: holds no pixels",
        "predict     1 image: a",
        "  model     nuclei-he (colours on a bright ground)",
    ):
        assert line in told, told
    (found,) = json.loads(info("--json", svs).stdout)
    assert (found["width"], found["height"], found["dtype"]) == (1100, 1300, "uint8")
    assert found["levels"][1] == {"height": 325, "width": 275, "downsample": 4.0}
    assert found["left_out"] == ["Thumbnail 138 x 163", "Label 20 x 30"]
    assert (found["pixel_size_um"], found["pixel_size_from"]) == (0.25, "Aperio's MPP")
    assert len(found["warnings"]) == 1
    predict = found["predict"]
    assert (predict["images"], predict["model"], predict["channels"]) == (
        ["a"],
        "nuclei-he",
        [0, 1, 2],
    )
    assert predict["tiles"] >= 1


def test_why_predict_would_fail(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(3, 200, 150), photometric="minisblack", metadata={"axes": "CYX"})
    told = info(path).stdout
    assert "channels    3: 0, 1, 2" in told
    assert "predict     fails: is an image of 3 channels, and the model reads 1 channel" in told
    (found,) = json.loads(info(path, "--json").stdout)
    assert found["predict"]["error"].startswith("is an image of 3 channels")
    (found,) = json.loads(info(path, "--json", "-s", "tile.channel=[1]").stdout)
    assert found["predict"]["channels"] == [1]


def test_planes_that_are_chosen_are_described(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    pixels = noise(3, 60, 50, dtype="uint16")
    tifffile.imwrite(path, pixels, photometric="minisblack", ome=True, metadata={"axes": "ZYX"})
    (found,) = json.loads(info(path, "--json").stdout)
    assert list(found["predict"]["choices"]) == ["--planes each", "--planes max", "-s tile.z=[0]"]
    (found,) = json.loads(info(path, "--json", "-s", "tile.z=each").stdout)
    assert found["predict"]["images"] == ["a_z0", "a_z1", "a_z2"]
    assert "choices" not in found["predict"]
    assert "fails: has no z plane 5" in info(path, "-s", "tile.z=[5]").stdout


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_described(
    svs: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "<b>\x1b[2J.tif"
    bad.write_bytes(b"II*\0nothing")
    result = info(svs, bad, tmp_path / "none.tif")
    assert result.exit_code == 1
    assert "tifffile/svs" in result.stdout
    assert result.stderr.count("segpipe: ") == 2
    assert all("segpipe: " in line or " INFO " in line for line in result.stderr.splitlines())
    assert "\x1b" not in result.stderr and "none.tif" in result.stderr
