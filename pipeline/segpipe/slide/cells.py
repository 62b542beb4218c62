"""Boxes put together of cells of a lattice, each of which is read as a whole.

For readers of other packages that decode more than a box asks for, or that move the pixels of a
coarse level by a fraction when a box starts between two of them: what is read of a pixel is then the
same whichever box it is read for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segpipe.geometry import Box, Lattice, Region

CELL = 1024


def assemble(
    box: Box,
    lattice: Lattice,
    like: tuple[int, np.dtype[Any]],
    cell: Callable[[Region], NDArray[Any]],
) -> NDArray[Any]:
    """(channels, height, width) of the box from cells (channels, ...) of the regions that it meets.

    `like` are the number of channels and the dtype.
    """
    channels, dtype = like
    out = np.empty((channels, *box.shape), dtype)
    for region in lattice.meeting(box):
        part = region.box.intersect(box)
        inside = (slice(None), *part.within(region.box).slices)
        out[(slice(None), *part.within(box).slices)] = cell(region)[inside]
    return out
