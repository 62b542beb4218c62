"""Lengths of objects' borders, from how each of their pixels lies to its neighbours.

After K. Benkrid, D. Crookes: Design and FPGA implementation of a perimeter estimator (2000), as
scikit-image's `perimeter` has it for 4-neighbours: a pixel of the border is one with a 4-neighbour
outside the object; by how many of its 4-neighbours and of its diagonal ones are of the border too, it
counts 1, sqrt(2), half of both, or nothing. The three counts add up over regions.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from segpipe.object_runs import ObjectRuns

Array = np.ndarray[Any, np.dtype[Any]]
MARGIN = 2
"""Pixels beyond a region that decide how its pixels count."""


def border_counts(window: Array, objects: ObjectRuns) -> Array:
    """Pixels of the border that count as straight, diagonal and turning: (n, 3) int64.

    Parameters
    ----------
    window
        (h + 2 MARGIN, w + 2 MARGIN) uint32 labels, 0 outside the image.
    objects
        Those of the inner h x w pixels, in its coordinates.
    """
    counts = np.zeros((len(objects.ids), 3), np.int64)
    if len(counts):
        _count(_kinds(_borders(window)), objects.starts, objects.runs, counts)
    return counts


def perimeters(straight: Array, diagonal: Array, turning: Array) -> Array:
    """Lengths in pixels: (n,) float64."""
    root = math.sqrt(2)
    length: Array = straight + root * diagonal + (1 + root) / 2 * turning
    return length


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _borders(window: Array) -> Array:
    """Labels of the pixels with a 4-neighbour of another label, 0 elsewhere and outermost."""
    height, width = window.shape
    border = np.zeros((height, width), window.dtype)
    for y in range(1, height - 1):
        above, here, below, out = window[y - 1], window[y], window[y + 1], border[y]
        for x in range(1, width - 1):
            one = here[x]
            same = (
                (above[x] == one) & (below[x] == one) & (here[x - 1] == one) & (here[x + 1] == one)
            )
            out[x] = 0 if same else one
    return border


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _kinds(border: Array) -> Array:
    """How pixels count, from borders (h + 4, w + 4): (h, w) uint8, 1 to 3 as in `border_counts`."""
    height, width = border.shape[0] - 2 * MARGIN, border.shape[1] - 2 * MARGIN
    kinds = np.empty((height, width), np.uint8)
    for y in range(height):
        above, here, below = border[y + 1], border[y + 2], border[y + 3]
        out = kinds[y]
        for x in range(width):  # no branches, so that a few pixels are counted at once
            one = here[x + 2]
            beside = (
                np.uint32(above[x + 2] == one)
                + np.uint32(below[x + 2] == one)
                + np.uint32(here[x + 1] == one)
                + np.uint32(here[x + 3] == one)
            )
            across = (
                np.uint32(above[x + 1] == one)
                + np.uint32(above[x + 3] == one)
                + np.uint32(below[x + 1] == one)
                + np.uint32(below[x + 3] == one)
            )
            straight = ((beside == 2) | (beside == 3)) & (across <= 2)
            diagonal = ((beside == 0) & (across == 2)) | ((beside == 1) & (across == 3))
            turning = (beside == 1) & ((across == 1) | (across == 2))
            kind = np.uint32(straight) + 2 * np.uint32(diagonal) + 3 * np.uint32(turning)
            out[x] = kind * np.uint32(one != 0)
    return kinds


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _count(kinds: Array, starts: Array, runs: Array, counts: Array) -> None:
    """Count the kinds of pixels of each object."""
    for number in range(starts.size - 1):
        straight = diagonal = turning = np.int64(0)
        for place in range(starts[number], starts[number + 1]):
            row = kinds[runs[place, 0], runs[place, 1] : runs[place, 2]]
            for x in range(row.size):
                straight += np.int64(row[x] == 1)
                diagonal += np.int64(row[x] == 2)
                turning += np.int64(row[x] == 3)
        counts[number, 0], counts[number, 1], counts[number, 2] = straight, diagonal, turning
