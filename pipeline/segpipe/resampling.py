"""The working resolution: how large the model wants an image, and pixels of that size.

A working pixel w shows what lies around w' = (w + 1/2) s - 1/2 of the full resolution, where s, the
*scale*, counts full-resolution pixels a working pixel; pixel centres are at integers in both.

    full resolution, s = 2      0   1   2   3   4   5
    working                       0       1       2

Filter: a triangle of half-width max(1, r) around the centre, r being the pixels of the level read
that become one; its weights add up to 1. For r <= 1 this is linear interpolation, for r > 1 it is
antialiased (K. Turkowski, "Filters for common resampling tasks", Graphics Gems I, 1990); it is what
Pillow's BILINEAR does. A box (the mean of what a pixel covers) would blur some pixels and not others
where r is between 1 and 2, which is the usual case with a pyramid; a cubic overshoots, and so draws
dark rings around nuclei on a dark ground, where there is nothing.

Invariant: a pixel is a function of the level's pixels and of its own place in the image alone, to the
last bit: weights follow from its global index and are added in one fixed order. So regions do not show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from segpipe.errors import InputError, SettingsError
from segpipe.geometry import Box

Array = np.ndarray[Any, np.dtype[Any]]
SAME = 0.05
"""Scales that differ by no more than this part are one: nothing is resampled for less."""
LEAST, MOST = 1 / 16, 64.0
"""Scales beyond are taken for a wrong pixel size."""
_WHOLE = 1e-6
"""Less of a pixel than this, at the end of an image, is an error of rounding; so of a scale."""


@dataclass(frozen=True)
class Resolution:
    """The resolution at which an image is worked on, and what is read for it.

    Attributes
    ----------
    shape
        (Y, X) of the working image.
    scale
        Full-resolution pixels a working pixel; 1.0 where nothing is resampled.
    level
        Of the file's pyramid: the one that is read.
    downsample
        Full-resolution pixels a pixel of that level.
    """

    shape: tuple[int, int]
    scale: float = 1.0
    level: int = 0
    downsample: float = 1.0

    @property
    def ratio(self) -> float:
        """Pixels of the level that become one; 1.0 where they are taken as they are."""
        return self.scale / self.downsample

    @property
    def resampled(self) -> bool:
        """Whether the level's pixels are not taken as they are."""
        return self.scale != self.downsample


@dataclass(frozen=True)
class Wish:
    """What decides the scale: of the settings, the model and the file. None: not stated.

    factor
        `tile.scale`: working pixels a full-resolution pixel.
    diameter_px
        `tile.diameter`: of the objects, in full-resolution pixels.
    pixel_size_um
        Of the full resolution.
    model_diameter_px, model_pixel_size_um
        Of the model's card.
    """

    factor: float | None
    diameter_px: float | None
    pixel_size_um: float | None
    model: str
    model_diameter_px: float | None
    model_pixel_size_um: float | None


def wanted_scale(wish: Wish) -> float:
    """Full-resolution pixels for each working pixel, as the settings or the model's card want it.

    Raises
    ------
    SettingsError
        When the objects' diameter is given and the card says nothing of it.
    InputError
        When the model needs a pixel size and nobody states one, or the scale is absurd. The message
        is to be preceded by the image's name.
    """
    if wish.factor is not None:
        return _plausible(1 / wish.factor, f"tile.scale {wish.factor:g}")
    if wish.diameter_px is not None:
        if wish.model_diameter_px is None:
            raise SettingsError(
                f"model {wish.model} does not say which diameter its objects have, so tile.diameter "
                "(--diameter) cannot be used; set tile.scale (--scale)"
            )
        return _plausible(
            wish.diameter_px / wish.model_diameter_px,
            f"tile.diameter {wish.diameter_px:g} px, and {wish.model_diameter_px:g} of model "
            f"{wish.model}",
        )
    if wish.model_pixel_size_um is None:
        return 1.0
    if wish.pixel_size_um is None:
        raise InputError(
            f"model {wish.model} works at {wish.model_pixel_size_um:g} um a pixel, and the file does "
            "not state its pixel size; set tile.pixel_size_um (--pixel-size UM), or tile.scale=1 "
            "(--scale 1) to take the pixels as they are"
        )
    return _plausible(
        wish.model_pixel_size_um / wish.pixel_size_um,
        f"a pixel size of {wish.pixel_size_um:g} um, and {wish.model_pixel_size_um:g} of model "
        f"{wish.model}",
    )


def _plausible(scale: float, said: str) -> float:
    if not LEAST <= scale <= MOST:
        what = f"{1 / scale:,.0f} times as wide" if scale < 1 else f"{scale:,.0f} times narrower"
        raise InputError(
            f"{said} would make the image {what} (up to {1 / LEAST:g} times wider and {MOST:g} "
            "times narrower are possible); set tile.pixel_size_um (--pixel-size UM) right, or "
            "tile.scale (--scale)"
        )
    return scale


def choose_resolution(
    shapes: Sequence[tuple[int, int]], downsamples: Sequence[float], wanted: float
) -> Resolution:
    """The resolution for a wanted scale: that of a level of the pyramid where one is near enough.

    Parameters
    ----------
    shapes, downsamples
        (Y, X) of each level, the finest first, and full-resolution pixels a pixel of it.
    wanted
        Full-resolution pixels a working pixel.

    Examples
    --------
    >>> choose_resolution([(1000, 600)], [1.0], 1.04)
    Resolution(shape=(1000, 600), scale=1.0, level=0, downsample=1.0)
    >>> choose_resolution([(1000, 600), (250, 150)], [1.0, 4.0], 4.1)
    Resolution(shape=(250, 150), scale=4.0, level=1, downsample=4.0)
    >>> choose_resolution([(1000, 600), (250, 150)], [1.0, 4.0], 6)
    Resolution(shape=(167, 100), scale=6, level=1, downsample=4.0)
    """
    near = [abs(wanted / downsample - 1) for downsample in downsamples]
    best = near.index(min(near))
    if near[best] <= SAME + _WHOLE:
        return Resolution(shapes[best], downsamples[best], best, downsamples[best])
    finer = [level for level, downsample in enumerate(downsamples) if downsample < wanted]
    level = max(finer, key=lambda number: downsamples[number], default=0)
    height, width = (max(1, math.ceil(size / wanted - _WHOLE)) for size in shapes[0])
    return Resolution((height, width), wanted, level, downsamples[level])


def to_full(working: Array | float, scale: float) -> Any:
    """The full-resolution coordinate of a working one: (w + 1/2) s - 1/2; exact for a scale of 1."""
    return working if scale == 1.0 else (working + 0.5) * scale - 0.5


def full_box(box: Box, scale: float, shape: tuple[int, int]) -> Box:
    """The full-resolution pixels that a box of working pixels shows some of, inside `shape` (Y, X)."""
    starts = full_start(np.array([box.y0, box.x0]), scale)
    stops = full_stop(np.array([box.y1, box.x1]), scale)
    return Box(*(int(end) for end in (*starts, *stops))).intersect(Box(0, 0, *shape))


def full_start(start: Array, scale: float) -> NDArray[np.int64]:
    """The first full-resolution pixels that working pixels from `start` on show some of."""
    return np.floor(start * scale + _WHOLE).astype(np.int64)


def full_stop(stop: Array, scale: float) -> NDArray[np.int64]:
    """One more than the last full-resolution pixel that working pixels before `stop` show some of."""
    return np.ceil(stop * scale - _WHOLE).astype(np.int64)


@dataclass(frozen=True)
class Taps:
    """What some output pixels along an axis are made of: of each the first input pixel, and weights.

    first, count
        (n,) int64; pixel `first[i] + k` has `weight[i, k]` for k < count[i].
    weight
        (n, K) float64; each row adds up to 1, to rounding.
    """

    first: NDArray[np.int64]
    count: NDArray[np.int64]
    weight: NDArray[np.float64]

    @property
    def span(self) -> tuple[int, int]:
        """The input pixels that are needed, half-open."""
        return int(self.first.min()), int((self.first + self.count).max())


def axis_taps(start: int, stop: int, ratio: float, size: int) -> Taps:
    """What the output pixels [start, stop) are made of: a triangle, cut off at the ends of the input.

    Parameters
    ----------
    ratio
        Input pixels that become one.
    size
        Input pixels along this axis.

    Examples
    --------
    >>> taps = axis_taps(1, 2, 2.0, 8)
    >>> taps.first, taps.count, taps.weight
    (array([1]), array([4]), array([[0.125, 0.375, 0.375, 0.125]]))
    """
    radius = max(1.0, ratio)
    centre = (np.arange(start, stop, dtype=np.float64) + 0.5) * ratio - 0.5
    centre = np.clip(centre, 0, size - 1)  # the last one may lie beyond the input
    first = np.maximum(np.floor(centre - radius).astype(np.int64) + 1, 0)
    last = np.minimum(np.ceil(centre + radius).astype(np.int64) - 1, size - 1)
    count = last - first + 1
    places = first[:, np.newaxis] + np.arange(int(2 * radius) + 2)
    weight = np.maximum(radius - np.abs(places - centre[:, np.newaxis]), 0.0)
    weight[places > last[:, np.newaxis]] = 0.0
    weight /= weight.sum(axis=1, keepdims=True)
    return Taps(first, count, weight)


def source_box(box: Box, ratio: float, shape: tuple[int, int]) -> Box:
    """The input pixels that `resample` needs for a box of output pixels."""
    y = axis_taps(box.y0, box.y1, ratio, shape[0]).span
    x = axis_taps(box.x0, box.x1, ratio, shape[1]).span
    return Box(y[0], x[0], y[1], x[1])


def resample(block: Array, at: Box, box: Box, ratio: float, shape: tuple[int, int]) -> Array:
    """Output pixels of a box: (C, h, w) of the block's dtype; integers are rounded half up.

    Parameters
    ----------
    block
        (C, Y, X) input pixels of uint8, uint16 or float32.
    at
        Where the block lies in the input: at least `source_box(box, ratio, shape)`.
    box
        Output pixels.
    ratio
        Input pixels that become one.
    shape
        (Y, X) of the whole input.
    """
    rows = axis_taps(box.y0, box.y1, ratio, shape[0])
    columns = axis_taps(box.x0, box.x1, ratio, shape[1])
    result = np.empty((len(block), *box.shape), block.dtype)
    for plane, into in zip(block, result, strict=True):
        _resample_plane(
            np.ascontiguousarray(plane),
            *(rows.first - at.y0, rows.count, rows.weight),
            *(columns.first - at.x0, columns.count, columns.weight),
            np.float64(0.5 if block.dtype.kind == "u" else 0.0),
            into,
        )
    return result


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _resample_plane(
    plane: Array,
    row_first: Array,
    row_count: Array,
    row_weight: Array,
    column_first: Array,
    column_count: Array,
    column_weight: Array,
    half: float,
    result: Array,
) -> None:
    """Down each column first, then along the row; `half` is added before a cast that cuts off.

    A weight of 0 is left out, so that a NaN beside the triangle does not get in.
    """
    width = plane.shape[1]
    line = np.empty(width, np.float64)
    for y in range(result.shape[0]):
        line[:] = 0.0
        for k in range(row_count[y]):
            weight = row_weight[y, k]
            source = row_first[y] + k
            if weight > 0.0:
                for x in range(width):
                    line[x] += weight * plane[source, x]
        for x in range(result.shape[1]):
            total = 0.0
            for k in range(column_count[x]):
                weight = column_weight[x, k]
                if weight > 0.0:
                    total += weight * line[column_first[x] + k]
            result[y, x] = total + half
