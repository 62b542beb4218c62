"""Bounded growth of seeds: a watershed of the interior in the foreground that can be cut anywhere.

For levels l1 > l2 > ... > lm = 0: all unlabelled pixels of M with I >= l_j beside a label take, all
at once, the smallest neighbouring id; at most r steps at each level but the last, which goes on
until nothing changes.

A pixel's label after s steps depends only on labels within s pixels, so a region that is read with
a halo of s + 1 pixels knows the labels of its own pixels, and of the ring around them, after s steps
exactly. Ids are global before growth begins, so ties go to the same id wherever the cuts are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from segpipe.components import OUTSIDE, Decode
from segpipe.geometry import Box

Array = np.ndarray[Any, np.dtype[Any]]


def reach(decode: Decode, last: int) -> tuple[tuple[int, ...], int]:
    """Steps at each level when the last one makes `last`, and the halo that they need in pixels."""
    steps = (decode.growth_steps,) * (len(decode.growth) - 1) + (last,)
    return steps, sum(steps) + 1


def grow(labels: Array, levels: Array, steps: tuple[int, ...]) -> Array:
    """Labels after `steps[j]` synchronous steps at each level j.

    Parameters
    ----------
    labels
        (h, w) uint32, 0 where unlabelled. Not modified.
    levels
        (h, w) uint8: first level that may take the pixel (`Decode.growth_levels`), or OUTSIDE.
    steps
        Steps per level; a negative number means until nothing changes.

    Returns
    -------
    (h, w) uint32
    """
    height, width = labels.shape
    grown = np.zeros((height + 2, width + 2), np.uint32)
    grown[1:-1, 1:-1] = labels
    walls = np.full((height + 2, width + 2), OUTSIDE, np.uint8)
    walls[1:-1, 1:-1] = levels
    _grow(grown.ravel(), walls.ravel(), width + 2, np.asarray(steps, np.int64))
    return grown[1:-1, 1:-1]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _grow(labels: Array, levels: Array, row: int, steps: Array) -> None:
    """Grow `labels` in place; both arrays are flat, with a border of OUTSIDE one pixel wide.

    The front is the labelled pixels that have an unlabelled pixel of M beside them. A pixel of the
    front whose neighbour is not yet admitted waits for a later level.
    """
    beside = (-row, -1, 1, row)
    open_pixels = 0
    front_size = 0
    for pixel in range(row, labels.size - row):
        if levels[pixel] == OUTSIDE:
            continue
        if labels[pixel] == 0:
            open_pixels += 1
        else:
            for step in beside:
                if labels[pixel + step] == 0 and levels[pixel + step] != OUTSIDE:
                    front_size += 1
                    break
    if front_size == 0:
        return
    capacity = front_size + open_pixels
    front = np.empty(capacity, np.int64)
    waiting = np.empty(capacity, np.int64)
    taken = np.empty(open_pixels, np.int64)
    front_size = 0
    for pixel in range(row, labels.size - row):
        if levels[pixel] != OUTSIDE and labels[pixel] != 0:
            for step in beside:
                if labels[pixel + step] == 0 and levels[pixel + step] != OUTSIDE:
                    front[front_size] = pixel
                    front_size += 1
                    break
    offer = np.zeros(labels.size, np.uint32)
    for level in range(steps.size):
        waiting_size = 0
        made = 0
        while front_size and made != steps[level]:
            made += 1
            taken_size = 0
            for place in range(front_size):
                pixel = front[place]
                waits = False
                for step in beside:
                    other = pixel + step
                    if labels[other] == 0 and levels[other] != OUTSIDE:
                        if levels[other] > level:
                            waits = True
                        elif offer[other] == 0:
                            offer[other] = labels[pixel]
                            taken[taken_size] = other
                            taken_size += 1
                        elif labels[pixel] < offer[other]:
                            offer[other] = labels[pixel]
                if waits:
                    waiting[waiting_size] = pixel
                    waiting_size += 1
            for place in range(taken_size):
                labels[taken[place]] = offer[taken[place]]
                front[place] = taken[place]
            front_size = taken_size
        for place in range(waiting_size):
            front[front_size + place] = waiting[place]
        front_size += waiting_size


def is_moving(labels: Array, levels: Array, core: Box) -> bool:
    """Whether the next step would label a pixel of `core`, the box's coordinates in these arrays.

    The ring of one pixel around the core, where the arrays have it, must be exact.
    """
    ring = core.grow(1).intersect(Box(0, 0, *labels.shape))
    labels, levels, inner = labels[ring.slices], levels[ring.slices], core.within(ring)
    found: bool = _is_moving(labels, levels, inner.y0, inner.x0, inner.y1, inner.x1)
    return found


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _is_moving(labels: Array, levels: Array, y0: int, x0: int, y1: int, x1: int) -> bool:
    height, width = labels.shape
    for y in range(y0, y1):
        for x in range(x0, x1):
            if levels[y, x] == OUTSIDE or labels[y, x] != 0:
                continue
            if (
                (y > 0 and labels[y - 1, x] != 0)
                or (x > 0 and labels[y, x - 1] != 0)
                or (y < height - 1 and labels[y + 1, x] != 0)
                or (x < width - 1 and labels[y, x + 1] != 0)
            ):
                return True
    return False
