"""Arrays on disk: OME-Zarr 0.5 images with labels, and the work arrays beside them.

The write unit is the shard, and a shard has one writer. Metadata are made up front by one process.
Shards are replaced atomically (zarr's LocalStore writes a temporary name and renames it), then file
and folder are synchronised, then the completion record is appended (records.py).
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore, StorePath

from segpipe.coroutines import run_here
from segpipe.errors import SegpipeError
from segpipe.geometry import Box, ceil_to
from segpipe.ngff import (
    Space,
    array_metadata,
    image_metadata,
    label_list_metadata,
    label_metadata,
    with_contrast,
)
from segpipe.whole_file import write_whole

zarr.config.set({"threading.max_workers": 1, "async.concurrency": 4})

Array = np.ndarray[Any, np.dtype[Any]]
METADATA = "zarr.json"
LABEL_GROUP = "labels/instances"
STRIP = 256
"""Rows of a pyramid level that are made at once."""


@dataclass(frozen=True)
class Grid:
    """Storage sizes of a plane: (Y, X) of the array, its shards and its inner chunks."""

    shape: tuple[int, int]
    shard: tuple[int, int]
    chunk: tuple[int, int]

    @classmethod
    def fitting(cls, shape: tuple[int, int], region: int, chunk: int) -> Grid:
        """Chunks and shards of these sizes, no larger than the image asks for."""
        chunks = tuple(min(chunk, size) for size in shape)
        shards = tuple(
            min(region, ceil_to(size, inner)) if inner == chunk else inner
            for size, inner in zip(shape, chunks, strict=True)
        )
        return cls(shape, (shards[0], shards[1]), (chunks[0], chunks[1]))

    @property
    def levels(self) -> list[tuple[int, int]]:
        """Shapes of the pyramid, finest first: ceil(n / 2^l), down to one chunk."""
        shapes = [self.shape]
        while any(size > inner for size, inner in zip(shapes[-1], self.chunk, strict=True)):
            shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
        return shapes

    def level(self, number: int) -> Grid:
        """The grid of one pyramid level: shards of the same size."""
        shape = self.levels[number]
        chunk = (min(self.chunk[0], shape[0]), min(self.chunk[1], shape[1]))
        shard = tuple(
            min(outer, ceil_to(size, inner))
            for outer, size, inner in zip(self.shard, shape, chunk, strict=True)
        )
        if any(outer % inner for outer, inner in zip(shard, chunk, strict=True)):
            shard = tuple(ceil_to(outer, inner) for outer, inner in zip(shard, chunk, strict=True))
        return Grid(shape, (shard[0], shard[1]), chunk)


def create_array(
    path: Path,
    planes: tuple[int, ...],
    grid: Grid,
    dtype: np.dtype[Any],
    dimension_names: Sequence[str] | None = None,
) -> None:
    """Write the metadata of an array of shape `planes + grid.shape`; a shard holds all planes, an
    inner chunk one."""
    names = None if dimension_names is None else tuple(dimension_names)
    _write_metadata(path, _array_text(planes, grid, dtype, names))


@lru_cache(maxsize=64)
def _array_text(
    planes: tuple[int, ...], grid: Grid, dtype: np.dtype[Any], names: tuple[str, ...] | None
) -> str:
    """Metadata of an array as JSON; of many small images it is the same."""
    shape, shard = (*planes, *grid.shape), (*planes, *grid.shard)
    chunk = (*(1 for _ in planes), *grid.chunk)
    return json.dumps(array_metadata(shape, shard, chunk, dtype, names))


def _write_metadata(folder: Path, text: str) -> None:
    """Write the metadata of an array or group into its folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METADATA).write_text(text)


@lru_cache(maxsize=64)
def _opened(path: str, _metadata: tuple[int, int]) -> zarr.Array[Any]:
    folder = Path(path)
    return zarr.Array(_array(folder, _parsed((folder / METADATA).read_bytes())))


@lru_cache(maxsize=64)
def _parsed(content: bytes) -> Any:
    """Metadata as zarr has them: those of many small images are the same, and take long to parse."""
    return _array(Path(), json.loads(content)).metadata


def _array(path: Path, metadata: Any) -> zarr.AsyncArray[Any]:
    # Otherwise zarr compares every chunk with the fill value, and writing takes 1.7 times as long.
    config: Any = {"write_empty_chunks": True}
    return zarr.AsyncArray(metadata, StorePath(LocalStore(path)), config)


def open_array(path: Path) -> zarr.Array[Any]:
    """The array at `path`; opened once per process for as long as its metadata file is the same."""
    # Strings, since paths take as long to join and to hash as the file to ask for; it is asked often.
    place = os.fspath(path)
    stat = os.stat(f"{place}/{METADATA}")  # noqa: PTH116
    return _opened(place, (stat.st_ino, stat.st_mtime_ns))


def read_box(path: Path, box: Box, planes: Sequence[int] | None = None) -> Array:
    """Pixels of a box inside the array: (..., h, w), of all planes or of those asked for.

    Raises
    ------
    SegpipeError
        When a shard does not decode or its checksum is wrong.
    """
    array = open_array(path).async_array

    def read(plane: Any) -> Array:
        return np.asarray(run_here(array.getitem((plane, *box.slices))))

    try:
        if planes is None:
            return read(...)
        chosen = list(planes)
        if chosen == list(range(chosen[0], chosen[-1] + 1)):  # one call: half the time of two
            return read(slice(chosen[0], chosen[-1] + 1))
        return np.stack([read(plane) for plane in chosen])
    except (ValueError, RuntimeError, OSError) as error:
        raise SegpipeError(
            f"{path} is damaged at {box} ({' '.join(str(error).split())}); run again with --restart"
        ) from error


@dataclass(frozen=True)
class Shard:
    """What a record says of a written shard: bytes on disk and their crc32; 0 when empty."""

    length: int
    checksum: int

    @property
    def empty(self) -> bool:
        """All of it is background, so zarr keeps no file."""
        return self.length == 0


def shard_path(path: Path, box: Box) -> Path:
    """File of the shard whose first pixel is the box's."""
    array = open_array(path)
    height, width = array.shards[-2:] if array.shards else array.chunks[-2:]
    planes = ("0",) * (array.ndim - 2)
    return path.joinpath("c", *planes, str(box.y0 // height), str(box.x0 // width))


def write_shard(path: Path, box: Box, pixels: Array) -> Shard:
    """Write one whole shard so that it is either the old one, absent, or the new one.

    The old file is removed first: zarr reads a shard before it rewrites it, and over a torn one it
    would fail for ever.

    Raises
    ------
    SegpipeError
        When the disk is full or cannot be written.
    """
    array = open_array(path).async_array
    file = shard_path(path, box)
    try:
        file.unlink(missing_ok=True)
        if not pixels.any():
            return Shard(0, 0)
        run_here(array.setitem((..., *box.slices), pixels))
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            data = opened.read()
        sync_folder(file.parent)
    except OSError as error:
        raise SegpipeError(f"cannot write {file}: {error.strerror or error}") from error
    return Shard(len(data), zlib.crc32(data))


def clear_shard(path: Path, box: Box) -> Shard:
    """Remove a shard: all of it is background.

    Raises
    ------
    SegpipeError
        When the file cannot be removed.
    """
    file = shard_path(path, box)
    try:
        file.unlink(missing_ok=True)
        if file.parent.exists():
            sync_folder(file.parent)
    except OSError as error:
        raise SegpipeError(f"cannot remove {file}: {error.strerror or error}") from error
    return Shard(0, 0)


def damaged_shard(path: Path, index: str, shard: Shard) -> Path | None:
    """The file of the shard of this `y_x` index if it is not what was recorded; None if it is."""
    planes = ("0",) * (open_array(path).ndim - 2)
    file = path.joinpath("c", *planes, *index.split("_"))
    data = file.read_bytes() if file.exists() else b""
    return None if (len(data), zlib.crc32(data)) == (shard.length, shard.checksum) else file


def shard_is_whole(path: Path, box: Box, shard: Shard, *, verify: bool = False) -> bool:
    """Whether the file is there with the recorded length (and, if asked, checksum)."""
    file = shard_path(path, box)
    try:
        length = file.stat().st_size
    except FileNotFoundError:
        return shard.empty
    if length != shard.length:
        return False
    return not verify or zlib.crc32(file.read_bytes()) == shard.checksum


def is_array(path: Path) -> bool:
    """Whether the metadata of an array are there, whole: a power failure may leave less of a file."""
    try:
        content = (path / METADATA).read_bytes()
    except FileNotFoundError:
        return False
    return content[:1] == b"{" and content[-1:] == b"}"


def disk_usage(path: Path) -> tuple[int, int] | None:
    """Number of shards of an array that are there, and their bytes; None when there is no array."""
    metadata = files = size = 0
    folders = [os.fspath(path)]
    while folders:
        try:
            found = os.scandir(folders.pop())
        except FileNotFoundError:
            return None
        with found as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name == METADATA:
                    metadata = entry.stat().st_size
                elif not entry.name.endswith(".partial"):
                    files, size = files + 1, size + entry.stat().st_size
    return (files, size) if metadata else None


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- pyramids -------------------------------------------------------------------------------------


def halve_mean(pixels: Array) -> Array:
    """Mean of 2 x 2 pixels, rounded half up for integers: (C, h, w) -> (C, ceil(h/2), ceil(w/2)).

    A ragged last row or column is averaged with itself.
    """
    channels, height, width = pixels.shape
    halved = np.empty((channels, -(-height // 2), -(-width // 2)), pixels.dtype)
    for row in range(0, halved.shape[1], STRIP):  # the sums are wider than the pixels
        strip = pixels[:, 2 * row : 2 * (row + STRIP)]
        halved[:, row : row + STRIP] = _halve_strip(strip)
    return halved


def _halve_strip(pixels: Array) -> Array:
    height, width = pixels.shape[-2:]
    even = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    wide: Array = even.astype(np.float64 if pixels.dtype.kind == "f" else np.uint32)
    total: Array = wide[:, ::2, ::2] + wide[:, 1::2, ::2] + wide[:, ::2, 1::2] + wide[:, 1::2, 1::2]
    if pixels.dtype.kind == "f":
        total /= 4
    else:
        total = (total + 2) // 4
    return total.astype(pixels.dtype)


def halve_nearest(labels: Array) -> Array:
    """Every second pixel: (..., h, w) -> (..., ceil(h/2), ceil(w/2)); ids are never mixed."""
    return labels[..., ::2, ::2]


# --- OME-Zarr 0.5 -----------------------------------------------------------------------------------


def create_image(
    path: Path,
    channels: Sequence[str],
    grid: Grid,
    dtype: np.dtype[Any],
    *,
    pixel_size_um: float | None,
    name: str,
    rgb: bool,
    scale: float = 1.0,
    finest: int = 0,
) -> None:
    """Write all metadata of an OME-Zarr 0.5 image (C, Y, X) with its pyramid, no pixels.

    Parameters
    ----------
    pixel_size_um
        Of the full resolution.
    scale
        Full-resolution pixels for each pixel of the image.
    finest
        The first level of the pyramid that there is to be; levels keep their numbers.
    """
    levels = range(finest, len(grid.levels))
    space = Space(pixel_size_um, scale)
    told = image_metadata(channels, levels, dtype, space, name=name, rgb=rgb)
    _write_metadata(path, json.dumps(told))
    for number in levels:
        create_array(
            path / str(number), (len(channels),), grid.level(number), dtype, ("c", "y", "x")
        )


def create_labels(
    path: Path,
    grid: Grid,
    *,
    pixel_size_um: float | None,
    scale: float = 1.0,
    classes: Sequence[str] = (),
) -> None:
    """Write all metadata of `labels/instances` (Y, X) uint32 in an OME-Zarr 0.5 image, no pixels.

    Parameters
    ----------
    pixel_size_um, scale
        As for `create_image`.
    classes
        What the numbers stand for, from 0, where they are no instances.
    """
    labels, levels = path / LABEL_GROUP, range(len(grid.levels))
    _write_metadata(labels.parent, json.dumps(label_list_metadata([labels.name])))
    space = Space(pixel_size_um, scale)
    told = label_metadata(labels.name, levels, space, classes=classes)
    _write_metadata(labels, json.dumps(told))
    for number in levels:
        create_array(labels / str(number), (), grid.level(number), np.dtype(np.uint32), ("y", "x"))


def set_contrast(
    path: Path, channels: Sequence[int], ranges: Sequence[tuple[float, float]]
) -> None:
    """Write the display ranges of these channels into the image's metadata."""
    file = path / METADATA
    told = with_contrast(json.loads(file.read_bytes()), channels, ranges)
    write_whole(file, json.dumps(told).encode(), durable=False)  # others may have it open
