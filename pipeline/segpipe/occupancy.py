"""What the windows of an image hold: a level and a contrast each, from a few numbers per cell.

A window in which the network can see nothing need not go through it. Two numbers describe a window,
both in normalised intensities (0 and 1 are what the image's low and high become):

    level      largest distance of a pixel from 0
    contrast   largest of  k * (largest - smallest mean of k x k pixels)  for k = 1, 2, 4, 8

Why this contrast: noise that differs from pixel to pixel by a standard deviation s has means that
differ by s / k, so it has the same contrast of about 10 s at each k, while an object of height h
that covers k x k pixels has k h. A maximum of the pixels alone would have to lie below the faintest
large object (.03 of the range for the shipped model), where no camera's noise does.

Below which level and contrast a model sees nothing is measured (`segpipe.calibration`) and written
in its card. It cannot be derived: bounds of the activations are lost within a few layers (for the
shipped model, pixels anywhere in [0, 1e-6] give logits in -3e3..1e3), and the true bound is of no
use (there are patterns in [0, .03], found by gradient ascent, that it takes for nuclei).

Brightfield is the other way round: the ground is bright, and what absorbs light is the object. There
a third number describes a window, in optical density (log10 of a ratio of intensities, so no range is
needed):

    density    log10 of (largest / smallest mean of 4 x 4 pixels), of the colour where it is largest

A window of glass has what noise, JPEG and uneven light leave, some 0.02; a nucleus in haematoxylin has
0.3 or more in red, and its edge shows in some square of 4 x 4 pixels however small it is, since squares
are compared and not the mean of a thumbnail. Nothing is compared between windows, so a slide that is
all tissue, or unevenly lit, or of two scans, has no threshold to go wrong, as Otsu's would (which is
what CLAM, HistoQC and others take, on a thumbnail). A window that is even but dark is not glass.

The stage `tile` keeps the extremes of the means for cells of 128 pixels. A window is given those of
all cells that it meets, so its level and contrast may come out too high, never too low. Cells and
windows lie on the lattice, so the regions do not show.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segpipe.geometry import Box, TileGrid

Array = np.ndarray[Any, np.dtype[Any]]
SCALES = (1, 2, 4, 8)
"""Sides k of the squares whose means are compared; each doubles the one before."""
CELL = 128
_BLOCK = SCALES[-1]
GLASS = 0.06
"""Optical density within which a window is all glass: 13 % of the light."""
GLASS_LIGHT = 0.6
"""Of the brightest square of the image in each colour: glass is nowhere darker."""


def cell_size(core: int) -> int | None:
    """Pixels a side of the cells for cores of this size; None where no cell fits them.

    Examples
    --------
    >>> cell_size(1024), cell_size(80), cell_size(100)
    (128, 16, None)
    """
    cell = math.gcd(core, CELL)
    return cell if cell % _BLOCK == 0 else None


def cell_extremes(pixels: Array, cell: int) -> NDArray[np.float32]:
    """Smallest and largest mean of k x k pixels in each cell: (2, scales, C, rows, columns) float32.

    The squares lie side by side; where they do not come out even, another row or column of them
    ends at the border. Pixels that are not finite make the extremes not finite.

    Parameters
    ----------
    pixels
        (C, h, w) of any real dtype; its first pixel is the corner of a cell.
    cell
        Pixels, a multiple of 8.
    """
    short = [max(0, _BLOCK - size) for size in pixels.shape[1:]]
    if any(short):
        pixels = np.pad(pixels, ((0, 0), (0, short[0]), (0, short[1])), mode="edge")
    height, width = pixels.shape[1:]
    shape = (2, len(SCALES), len(pixels), -(-height // cell), -(-width // cell))
    result = np.empty(shape, np.float32)
    result[0], result[1] = np.inf, -np.inf
    for y, rows in _even_parts(height, cell):
        for x, columns in _even_parts(width, cell):
            part, into = pixels[:, y, x], result[..., rows, columns]
            low, high = _even_extremes(part, rows.stop - rows.start, columns.stop - columns.start)
            np.minimum(into[0], low, out=into[0])
            np.maximum(into[1], high, out=into[1])
    return result


def _even_parts(size: int, cell: int) -> list[tuple[slice, slice]]:
    """Pixels that make whole squares, and the cells that they belong to, of equal size in a part."""
    whole, even = size // cell, size // _BLOCK * _BLOCK
    parts = [(slice(0, whole * cell), slice(0, whole))] if whole else []
    if even > whole * cell:
        parts.append((slice(whole * cell, even), slice(whole, whole + 1)))
    if size > even:
        last = (size - 1) // cell
        parts.append((slice(size - _BLOCK, size), slice(last, last + 1)))
    return parts


def _even_extremes(pixels: Array, rows: int, columns: int) -> tuple[Array, Array]:
    """Extremes over rows x columns equal cells: two arrays (scales, C, rows, columns)."""
    lows, highs = [], []
    values = pixels
    with np.errstate(invalid="ignore", over="ignore"):
        for scale in SCALES:
            if scale == 2:
                small = pixels.dtype in (np.uint8, np.uint16)
                values = values.astype(np.uint32 if small else np.float64)
            if scale > 1:
                values = values[:, ::2] + values[:, 1::2]
                values = values[:, :, ::2] + values[:, :, 1::2]
            channels, height, width = values.shape
            strips = values.reshape(channels, rows, height // rows, width)
            across = (channels, rows, columns, width // columns)
            lows.append(strips.min(2).reshape(across).min(3) / np.float64(scale * scale))
            highs.append(strips.max(2).reshape(across).max(3) / np.float64(scale * scale))
    return np.stack(lows), np.stack(highs)


def tile_occupancy(
    extremes: Array, cell: int, grid: TileGrid, ranges: Sequence[tuple[float, float]]
) -> NDArray[np.float32]:
    """Level and contrast of each tile's window: (2, rows, columns) float32; of the worst channel.

    Parameters
    ----------
    extremes
        (2, scales, C, cell rows, cell columns), of the whole image; see `cell_extremes`.
    cell
        Pixels.
    grid
        The tiles.
    ranges
        (low, high) of each channel, as for `segpipe.inference.normalise`.
    """
    widths = np.array([high - low for low, high in ranges])
    used = widths > 0  # a channel of no width becomes zeros
    if not used.any():
        return np.zeros((2, *grid.lattice.count), np.float32)
    lows = np.array([low for low, _ in ranges])[used]
    widths = widths[used]
    weights = np.array(SCALES)[:, np.newaxis]
    result = np.empty((2, *grid.lattice.count), np.float32)
    for tile in grid:
        y, x = _cells(tile.read, cell)
        low = extremes[0][:, used, y, x].min((-2, -1)).astype(np.float64)
        high = extremes[1][:, used, y, x].max((-2, -1)).astype(np.float64)
        with np.errstate(invalid="ignore"):
            result[0][tile.index] = np.abs((np.stack([low[0], high[0]]) - lows) / widths).max()
            result[1][tile.index] = (weights * (high - low) / widths).max()
    return result


def tile_density(extremes: Array, cell: int, grid: TileGrid) -> NDArray[np.float32]:
    """Optical density of each tile's window, as above: (rows, columns) float32.

    Infinite where it is darker than glass; NaN where pixels are not finite.

    Parameters
    ----------
    extremes, cell, grid
        As for `tile_occupancy`; intensities on a bright ground, where 0 is dark.
    """
    scale = SCALES.index(4)
    with np.errstate(invalid="ignore"):
        light = np.nanmax(extremes[1, -1], axis=(1, 2), initial=0.0)  # per channel
    result = np.empty(grid.lattice.count, np.float32)
    for tile in grid:
        y, x = _cells(tile.read, cell)
        low = extremes[0, scale][:, y, x].min((-2, -1)).astype(np.float64)
        high = extremes[1, scale][:, y, x].max((-2, -1)).astype(np.float64)
        if not np.isfinite([low, high]).all():
            result[tile.index] = np.nan
        elif (low <= 0).any() or (low < GLASS_LIGHT * light).any():
            result[tile.index] = np.inf
        else:
            result[tile.index] = np.log10(high / low).max()
    return result


def glass_tiles(density: Array) -> NDArray[np.bool_]:
    """The tiles whose windows are nothing but bright, even ground: (rows, columns); not what is NaN."""
    found: NDArray[np.bool_] = density <= GLASS
    return found


def _cells(box: Box, cell: int) -> tuple[slice, slice]:
    """The cells that meet a box inside the image."""
    return (
        slice(box.y0 // cell, -(-box.y1 // cell)),
        slice(box.x0 // cell, -(-box.x1 // cell)),
    )


def empty_tiles(occupancy: Array, level: float, contrast: float) -> NDArray[np.bool_]:
    """The tiles whose windows stay within level and contrast: (rows, columns); not what is NaN."""
    found: NDArray[np.bool_] = (occupancy[0] <= level) & (occupancy[1] <= contrast)
    return found


def to_text(occupancy: Array) -> dict[str, Any]:
    """For a manifest: 11 characters per tile."""
    data = occupancy.astype("<f4").tobytes()
    return {"shape": list(occupancy.shape), "float32": base64.b64encode(data).decode("ascii")}


def from_text(text: Mapping[str, Any]) -> NDArray[np.float32]:
    """What `to_text` made it of."""
    data = base64.b64decode(text["float32"])
    return np.frombuffer(data, "<f4").reshape(text["shape"]).astype(np.float32)
