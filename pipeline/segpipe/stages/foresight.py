"""What a run will leave out, as far as it can be told from a coarse level of the file."""

from __future__ import annotations

from typing import Any

import numpy as np

from segpipe.errors import InputError
from segpipe.geometry import Box, ceil_to
from segpipe.occupancy import GLASS, GLASS_LIGHT, cell_size
from segpipe.slide import open_slide
from segpipe.stages.image import Image

Array = np.ndarray[Any, np.dtype[Any]]
FINEST, COARSEST = 4, 64
"""Working pixels a pixel of a level from which glass can be told: one is as large as the squares that
`segpipe.occupancy` compares, or a few times larger."""
MOST_PIXELS = 2**25
STEP = 8
"""Of a mask every 8th pixel along both axes is looked at."""


def foreseen_skips(image: Image) -> float | None:
    """Share of the tiles that will be left out as bare glass or outside the mask, about; None: neither
    is asked for, or the file has no level by which it can be told."""
    left_out = np.zeros(image.tiles.lattice.count, bool)
    known = False
    if image.mask is not None:
        known = True
        for tile in image.tiles:
            inside = image.mask.inside(tile.keep, image.scale, image.layout.full_shape, STEP)
            left_out[tile.index] = not inside.any()
    if image.plan.skip_glass:
        level = _coarse_level(image)
        if level is not None:
            known = True
            left_out |= _glass(*level, image)
    return float(left_out.mean()) if known else None


def _coarse_level(image: Image) -> tuple[Array, float] | None:
    """(3, Y, X) of a level of the file that is small, and working pixels a pixel of it."""
    try:
        with open_slide(image.source, image.plane) as slide:
            for number, level in enumerate(slide.levels):
                ratio = level.downsample / image.scale
                small = level.shape[0] * level.shape[1] <= MOST_PIXELS
                if FINEST <= ratio <= COARSEST and small:
                    box = Box(0, 0, *level.shape)
                    return slide.read(box, image.layout.channels, number), ratio
    except InputError:
        pass  # whoever reads the image says what is wrong with it
    return None


def _glass(pixels: Array, ratio: float, image: Image) -> Array:
    """Tiles of whose windows all cells are bright and even: bool (rows, columns)."""
    light = np.nanmax(pixels, axis=(1, 2)).astype(np.float64)
    result = np.zeros(image.tiles.lattice.count, bool)
    cell = cell_size(image.plan.core)
    if cell is None:
        return result
    for tile in image.tiles:
        y, x = (
            slice(int(start // cell * cell / ratio), int(np.ceil(ceil_to(stop, cell) / ratio)))
            for start, stop in ((tile.read.y0, tile.read.y1), (tile.read.x0, tile.read.x1))
        )
        window = pixels[:, y, x]
        if not window.size:  # the last rows may be lacking
            continue
        low, high = (extreme(window, axis=(1, 2)).astype(float) for extreme in (np.min, np.max))
        if (low > 0).all() and (low >= GLASS_LIGHT * light).all():
            result[tile.index] = np.log10(high / low).max() <= GLASS
    return result
