"""Levels of a pyramid: each reads as it was written, and one that is wrong is left out aloud."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st

from segpipe.errors import InputError
from segpipe.geometry import Box
from segpipe.slide import Level, open_slide
from segpipe.slide.source import downsample_of

Pixels = np.ndarray[Any, np.dtype[Any]]
STEPS = (1, 2, 4)
TILE: dict[str, Any] = {"tile": (16, 16)}


def noise(*shape: int, dtype: str = "uint8") -> Pixels:
    return np.random.default_rng(0).integers(1, 200, shape).astype(dtype)


def write_ome(path: Path) -> list[Pixels]:
    levels = [noise(2, 96, 144, dtype="uint16")[:, ::step, ::step] for step in STEPS]
    with tifffile.TiffWriter(path, ome=True) as tiff:
        options: dict[str, Any] = {**TILE, "photometric": "minisblack"}
        tiff.write(levels[0], subifds=2, metadata={"axes": "CYX"}, **options)
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, **options)
    return levels


def write_pages(path: Path) -> list[Pixels]:
    levels = [noise(97, 143)[::step, ::step] for step in STEPS]
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate(levels):
            tiff.write(level, subfiletype=min(number, 1), metadata=None, **TILE)
    return [level[None] for level in levels]


def write_svs(path: Path) -> list[Pixels]:
    levels = [noise(96, 144, 3)[::step, ::step] for step in STEPS]
    with tifffile.TiffWriter(path) as tiff:
        common: dict[str, Any] = {"photometric": "rgb", "metadata": None}
        tiff.write(levels[0], description="Aperio Image |MPP = 0.5", **TILE, **common)
        tiff.write(noise(12, 18, 3), description="Aperio thumbnail", **common)
        for level in levels[1:]:
            tiff.write(level, description="Aperio level", **TILE, **common)
        tiff.write(noise(30, 20, 3), subfiletype=1, description="Aperio label", **common)
        tiff.write(noise(31, 90, 3), subfiletype=9, description="Aperio macro", **common)
    return [np.moveaxis(level, -1, 0) for level in levels]


def write_qptiff(path: Path) -> list[Pixels]:
    levels = [noise(2, 96, 144, dtype="uint16")[:, ::step, ::step] for step in STEPS]
    names = ("DAPI", "CD8")
    with tifffile.TiffWriter(path) as tiff:
        common: dict[str, Any] = {"software": "PerkinElmer-QPI", "metadata": None}
        for number, level in enumerate(levels):
            for name, plane in zip(names, level, strict=True):
                kind = "ReducedResolution" if number else "FullResolution"
                xml = f"<ImageType>{kind}</ImageType><Name>{name}</Name>"
                description = (
                    f"<PerkinElmer-QPI-ImageDescription>{xml}</PerkinElmer-QPI-ImageDescription>"
                )
                tiff.write(
                    plane, description=description, subfiletype=min(number, 1), **TILE, **common
                )
            if number == 0:
                tiff.write(noise(12, 18, 3), photometric="rgb", subfiletype=1, **common)
        tiff.write(noise(30, 90, 3), photometric="rgb", **common)
    return levels


def write_zarr(path: Path, version: str = "0.5") -> list[Pixels]:
    levels = [noise(2, 96, 144, dtype="uint16")[:, ::step, ::step] for step in STEPS]
    root = zarr.open_group(str(path), mode="w", zarr_format=3 if version == "0.5" else 2)
    for number, level in enumerate(levels):
        array = root.create_array(
            str(number), shape=level.shape, chunks=(1, 32, 32), dtype="uint16"
        )
        array[:] = level
    axes = [{"name": axis, "type": "space" if axis != "c" else "channel"} for axis in "cyx"]
    datasets = [{"path": str(number)} for number in range(len(levels))]
    multiscales = [{"axes": axes, "datasets": datasets, "version": version}]
    root.attrs.update(
        {"ome": {"version": version, "multiscales": multiscales}}
        if version == "0.5"
        else {"multiscales": multiscales}
    )
    return levels


WRITERS: dict[str, Callable[[Path], list[Pixels]]] = {
    "a.ome.tif": write_ome,
    "a.tif": write_pages,
    "a.svs": write_svs,
    "a.qptiff": write_qptiff,
    "a.ome.zarr": write_zarr,
    "b.ome.zarr": lambda path: write_zarr(path, "0.4"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_level_reads_as_it_was_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    levels = WRITERS[name](path)
    with open_slide(path) as slide:
        assert slide.levels == tuple(
            Level((level.shape[1], level.shape[2]), float(step))
            for level, step in zip(levels, STEPS, strict=True)
        )
        assert slide.warnings == ()
        for number, level in enumerate(levels):
            full = slide.read(Box(0, 0, *level.shape[1:]), level=number)
            np.testing.assert_array_equal(full, level)
            box = Box(3, 5, 20, 31)
            part = slide.read(box, [level.shape[0] - 1], number)
            np.testing.assert_array_equal(part[0], level[(-1, *box.slices)])
        with pytest.raises(ValueError, match="not inside level 2"):
            slide.read(Box(0, 0, 40, 40), level=2)
        with pytest.raises(IndexError, match="level 3"):
            slide.read(Box(0, 0, 4, 4), level=3)


# --- levels that are wrong ------------------------------------------------------------------------


def test_a_tiff_level_without_pixels_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    levels = write_svs(path)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        counts = tiff.series[0].levels[1].keyframe.tags[325]
        counts.overwrite([0] * counts.count)
    with open_slide(path) as slide:
        assert [level.downsample for level in slide.levels] == [1.0, 4.0]
        (warning,) = slide.warnings
        assert warning.startswith("level 1 of the pyramid is left out: holds no pixels")
        np.testing.assert_array_equal(slide.read(Box(0, 0, 24, 36), level=1), levels[2])


def test_a_level_that_is_no_copy_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(noise(96, 144), subifds=2, **TILE)
        tiff.write(noise(48, 60), subfiletype=1, **TILE)
        tiff.write(noise(24, 36), subfiletype=1, **TILE)
    with open_slide(path) as slide:
        assert slide.levels == (Level((96, 144), 1.0), Level((24, 36), 4.0))
        assert "level 1 of the pyramid is left out: 48 x 60 (1 x uint8)" in slide.warnings[0]


def test_a_zarr_level_that_is_not_there_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.zarr"
    levels = write_zarr(path)
    (path / "1" / "zarr.json").unlink()
    with open_slide(path) as slide:
        assert [level.downsample for level in slide.levels] == [1.0, 4.0]
        assert slide.warnings[0].startswith("level 1 of the pyramid is left out")
        np.testing.assert_array_equal(slide.read(Box(0, 0, 24, 36), level=1), levels[2])
    (path / "0" / "zarr.json").unlink()
    with pytest.raises(InputError, match=r"can be read|cannot be read"):
        open_slide(path)


def test_levels_halved_along_z_hold_no_planes_of_the_image(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.zarr"
    write_zarr(path)
    metadata = json.loads((path / "zarr.json").read_text())
    root = zarr.open_group(str(path), mode="a")
    for number in range(3):
        del root[str(number)]
        shape = (8 >> number, 96 >> number, 144 >> number)
        root.create_array(str(number), shape=shape, chunks=(1, 32, 32), dtype="uint16")
    axes = metadata["attributes"]["ome"]["multiscales"][0]["axes"]
    axes[0] = {"name": "z", "type": "space"}
    root.attrs.update(metadata["attributes"])
    from segpipe.slide import Plane

    with open_slide(path, Plane(z=0)) as slide:
        assert slide.levels == (Level((96, 144), 1.0),)
        assert slide.warnings == ()


# --- downsample -----------------------------------------------------------------------------------


@given(
    st.tuples(st.integers(200, 200_000), st.integers(200, 200_000)),
    st.sampled_from((2, 3, 4, 8, 16)),
    st.booleans(),
)
def test_rounded_sizes_of_levels_give_the_whole_factor(
    full: tuple[int, int], factor: int, up: bool
) -> None:
    shape = tuple(-(-side // factor) if up else side // factor for side in full)
    # Of a short side the factor could be another whole one too; the longer one then decides.
    if max(full) >= 2 * factor * factor:
        assert downsample_of(full, (shape[0], shape[1])) == factor


def test_a_factor_that_is_not_whole_stays_what_it_is() -> None:
    assert downsample_of((3000, 2000), (2000, 1333)) == 1.5
    assert downsample_of((3000, 2000), (3000, 2000)) is None
    assert downsample_of((3000, 2000), (1000, 2001)) is None
    assert downsample_of((3000, 2000), (1500, 900)) is None
