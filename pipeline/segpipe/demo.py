"""Images to try segpipe on, as TIFF files: a synthetic field of any size, and a real section."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from segpipe.errors import SettingsError
from segpipe.evaluate import count_matches
from segpipe.geometry import Box, Lattice
from segpipe.synthetic import NucleiField
from segpipe.whole_file import replacing

log = logging.getLogger(__name__)

DEMO_MODEL = "nuclei-fluorescence"
FIELD_PIXEL_SIZE_UM = 0.5
"""Pixel size that a synthetic field claims: nuclei of 6 to 14 um across at the default radii."""

_BLOCK = 4096  # pixels along x that are made at once: flat memory, few margins made twice

Progress = Callable[[int, int], None]
"""Called with (tiles made, tiles in all)."""

_Maker = Callable[[Box], NDArray[Any]]


def write_field(
    field: NucleiField,
    path: Path,
    tile: int = 512,
    compression: str | None = "zlib",
    truth: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the field as a tiled TIFF, tile by tile, in memory that does not grow with the field.

    The files appear under their names when they are complete, and replace what was there.

    Parameters
    ----------
    field
        What to write.
    path
        The image: one channel, BigTIFF when it may exceed 4 GiB, 0.5 um per pixel in its
        resolution tags.
    tile
        Pixels a side of the TIFF's tiles, a multiple of 16.
    compression
        A lossless one, as tifffile names it, or None.
    truth
        Where to write the labels, uint32, in the same way; not written when None.
    progress
        Called after each tile.

    Raises
    ------
    SettingsError
        When the tile is not a positive multiple of 16.
    OSError
        When a file cannot be written.
    """
    if tile < 16 or tile % 16:
        raise SettingsError(f"tile {tile} of a TIFF must be a positive multiple of 16")
    images: list[tuple[Path, np.dtype[Any], _Maker]] = [(path, np.dtype(field.dtype), field.pixels)]
    if truth is not None:
        images.append((truth, np.dtype(np.uint32), field.labels))
    total = len(images) * len(Lattice(field.shape, (tile, tile)))
    done = 0

    def counted(make: _Maker) -> Iterator[NDArray[Any]]:
        nonlocal done
        for pixels in _tiles(field.shape, tile, make):
            done += 1
            if progress is not None:
                progress(done, total)
            yield pixels

    for target, dtype, make in images:
        _write_tiff(target, counted(make), field.shape, dtype, tile, compression)


def _tiles(shape: tuple[int, int], tile: int, make: _Maker) -> Iterator[NDArray[Any]]:
    """The tiles of an image in raster order; those at its lower and right border may be ragged."""
    width = max(_BLOCK // tile, 1) * tile
    for block in Lattice(shape, (tile, width)):
        pixels = make(block.box)
        for x in range(0, pixels.shape[1], tile):
            yield pixels[:, x : x + tile]


def _write_tiff(
    path: Path,
    tiles: Iterator[NDArray[Any]],
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    tile: int,
    compression: str | None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    per_cm = 10_000 / FIELD_PIXEL_SIZE_UM
    # The size that compression leaves is not known before: the bound is that of the pixels.
    large = shape[0] * shape[1] * dtype.itemsize > 2**32 - 2**26
    with (
        replacing(path, durable=False) as partial,
        tifffile.TiffWriter(partial, bigtiff=large) as writer,
    ):
        writer.write(
            tiles,
            shape=shape,
            dtype=dtype,
            tile=(tile, tile),
            photometric="minisblack",
            compression=compression,
            predictor=compression is not None,
            resolution=(per_cm, per_cm),
            resolutionunit="CENTIMETER",
            software="segpipe",
            metadata=None,
        )


def real_image(path: Path) -> None:
    """Write the nuclei of a real tissue section, as a TIFF of 512 x 512 uint16, bright on dark.

    It is the haematoxylin of the section of colonic glands that scikit-image ships
    (`skimage.data.immunohistochemistry`; FHL2 in brown, haematoxylin in blue), parted from the
    brown by colour deconvolution (Ruifrok and Johnston, 2001) and smoothed by one pixel, because
    its JPEG past leaves blocks. Acquired at the Center for Microscopy And Molecular Imaging (CMMI);
    scikit-image's documentation states "No known copyright restrictions". Its pixel size is not
    known and none is written. A hard image for a model of fluorescent nuclei, and an honest one.

    Raises
    ------
    SettingsError
        When scikit-image is not installed.
    OSError
        When the file cannot be written.
    """
    try:
        color, data = import_module("skimage.color"), import_module("skimage.data")
    except ImportError as error:
        raise SettingsError(
            "the real image of the demo comes with scikit-image, which is not installed; "
            "pip install 'segpipe[demo]'"
        ) from error
    from scipy.ndimage import gaussian_filter

    stains = color.separate_stains(data.immunohistochemistry(), color.hdx_from_rgb)
    stain = gaussian_filter(stains[..., 0], 1.0)
    counts = np.clip(np.rint(stain * 500_000), 0, 65535).astype(np.uint16)  # its maximum is near .1
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, counts, photometric="minisblack", compression="zlib", metadata=None)


def run_demo(out: Path, size: int) -> int:
    """Segment a made field and a real section into `out`; the exit code of `predict`.

    Prints what to look at, and how the made field compares with its truth.
    """
    from segpipe.run import predict
    from segpipe.settings import load_settings

    images, results = out / "images", out / "results"
    field, truth = images / "field.tif", out / "truth.tif"
    made = NucleiField((size, size))
    if not (truth.exists() and _shape_of(field) == made.shape):
        log.info("making a field of nuclei of %d x %d pixels", size, size)
        write_field(made, field, truth=truth)
    section = images / "section.tif"
    if not section.exists():
        real_image(section)
    result = predict([images], results, load_settings(None, [], {"infer.model": DEMO_MODEL}))
    if result.exit_code == 0:
        log.info("made field against its truth: %s", _compared(results, made))
        for name in ("field", "section"):
            log.info("look at %s", results / f"{name}.png")
    return result.exit_code


def _shape_of(path: Path) -> tuple[int, ...] | None:
    try:
        with tifffile.TiffFile(path) as tiff:
            return tuple(tiff.pages[0].shape)
    except (tifffile.TiffFileError, OSError, IndexError):
        return None


def _compared(results: Path, made: NucleiField) -> str:
    """How many objects of the truth were found, over the first 4096 pixels of each axis."""
    from segpipe.store import LABEL_GROUP, read_box

    box = Box(0, 0, *made.shape).intersect(Box(0, 0, 4096, 4096))
    predicted = read_box(results / "field.ome.zarr" / LABEL_GROUP / "0", box)
    counts = count_matches(made.labels(box), predicted)
    return (
        f"{counts.tp} of {counts.tp + counts.fn} nuclei found, {counts.fp} false, "
        f"AP at IoU .5 {counts.average_precision:.3f}"
    )
