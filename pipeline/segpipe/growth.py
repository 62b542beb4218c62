"""Bounded growth of seeds: a watershed of the interior in the foreground that can be cut anywhere.

For levels l1 > l2 > ... > lm = 0: all unlabelled pixels of M with I >= l_j beside a label take, all
at once, the smallest neighbouring id; at most r steps at each level but the last, which goes on
until nothing changes.

A pixel's label after s steps depends only on labels within s pixels, so a region that is read with
a halo of s + 1 pixels knows the labels of its own pixels, and of the ring around them, after s steps
exactly. Ids are global before growth begins, so ties go to the same id wherever the cuts are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from segpipe.components import Decode
from segpipe.geometry import Box
from segpipe.runs import OUTSIDE, join_runs

Array = np.ndarray[Any, np.dtype[Any]]
OFFERED = 254
"""Level of a pixel that is taken in the step under way, for as long as a smaller id may come."""


@dataclass(frozen=True)
class Field:
    """The pixels of a window, with a border one pixel wide that nothing grows into.

    labels
        (h + 2, w + 2) uint32, 0 where unlabelled.
    levels
        (h + 2, w + 2) uint8: first growth level that may take the pixel, or OUTSIDE.
    """

    labels: Array
    levels: Array

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> Field:
        """A window without foreground."""
        bordered = (shape[0] + 2, shape[1] + 2)
        return cls(np.zeros(bordered, np.uint32), np.full(bordered, OUTSIDE, np.uint8))

    @property
    def inner(self) -> tuple[Array, Array]:
        """Labels and levels without the border, (h, w); views."""
        return self.labels[1:-1, 1:-1], self.levels[1:-1, 1:-1]


def reach(decode: Decode, last: int) -> tuple[tuple[int, ...], int]:
    """Steps at each level when the last one makes `last`, and the halo that they need in pixels."""
    steps = (decode.growth_steps,) * (len(decode.growth) - 1) + (last,)
    return steps, sum(steps) + 1


def grow(field: Field, steps: tuple[int, ...], core: Box) -> Box:
    """Grow for `steps[j]` synchronous steps at each level j; modifies `field.labels`.

    Parameters
    ----------
    steps
        Steps per level; a negative number means until nothing changes.
    core
        Pixels of the window that must be right in the end; so must be the ring of one pixel around
        them, where the window has it.

    Returns
    -------
    Around the pixels of `core` that the next step would label; empty when there are none.
    """
    labels, levels = field.labels, field.levels
    starts, x0, x1 = _foreground_runs(levels)
    piece, areas, _, _ = join_runs(starts, x0, x1, np.zeros(len(x0), np.uint8), 0, levels.shape[1])
    order = np.argsort(piece, kind="stable")
    y = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    begin = (y * levels.shape[1] + x0)[order]
    ends = np.cumsum(np.bincount(piece, minlength=len(areas)))
    top, left, bottom, right = _grow(
        *(labels.ravel(), levels.ravel(), labels.shape[1], np.asarray(steps, np.int64)),
        *(begin, (x1.astype(np.int64) - x0)[order], ends, areas),
        *(core.y0 + 1, core.x0 + 1, core.y1 + 1, core.x1 + 1),
    )
    if bottom < 0:
        return Box(core.y0, core.x0, core.y0, core.x0)
    return Box(top, left, bottom + 1, right + 1).shift(-1, -1)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _foreground_runs(levels: Array) -> tuple[Array, Array, Array]:
    """Horizontal stretches of pixels that are not OUTSIDE: starts, x0, x1 as in `Runs`."""
    height, width = levels.shape
    starts = np.zeros(height + 1, np.int64)
    capacity = width + levels.size // 64 + 1
    x0, x1 = np.empty(capacity, np.uint32), np.empty(capacity, np.uint32)
    count = 0
    for y in range(height):
        if count + width > capacity:
            capacity = 2 * (count + width)
            x0 = np.concatenate((x0[:count], np.empty(capacity - count, np.uint32)))
            x1 = np.concatenate((x1[:count], np.empty(capacity - count, np.uint32)))
        inside = False
        for x in range(width):
            if (levels[y, x] != OUTSIDE) != inside:
                inside = not inside
                if inside:
                    x0[count] = x
                else:
                    x1[count] = x
                    count += 1
        starts[y + 1] = count  # the border is OUTSIDE, so no run is open at the end of a row
    return starts, x0[:count].copy(), x1[:count].copy()


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _grow(
    labels: Array,
    levels: Array,
    row: int,
    steps: Array,
    begin: Array,
    length: Array,
    ends: Array,
    areas: Array,
    y0: int,
    x0: int,
    y1: int,
    x1: int,
) -> tuple[int, int, int, int]:
    """Grow `labels` in place; they and the levels are flat, with a border of OUTSIDE one pixel wide.

    One connected piece of M after the other, because no label leaves its piece: three times as fast
    as all at once, which would pass over the whole window in every step. The runs of piece p end at
    ends[p]; they start at pixel `begin`.

    The front is the labelled pixels that have an unlabelled pixel of M beside them. A pixel of the
    front whose neighbour is not yet admitted waits for a later level.
    """
    beside = (-row, -1, 1, row)
    largest = areas.max() if areas.size else 0
    front, waiting = np.empty(largest, np.int64), np.empty(largest, np.int64)
    taken = np.empty(largest, np.int64)
    top, left, bottom, right = labels.size, row, -1, -1
    run = 0
    for end in ends:
        front_size = 0
        while run < end:
            for pixel in range(begin[run], begin[run] + length[run]):
                if labels[pixel] != 0:
                    for step in beside:
                        if labels[pixel + step] == 0 and levels[pixel + step] != OUTSIDE:
                            front[front_size] = pixel
                            front_size += 1
                            break
            run += 1
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
                        if labels[other] == 0:
                            if levels[other] == OUTSIDE:
                                continue
                            if levels[other] > level:
                                waits = True
                                continue
                            labels[other] = labels[pixel]
                            levels[other] = OFFERED
                            taken[taken_size] = other
                            taken_size += 1
                        elif levels[other] == OFFERED and labels[pixel] < labels[other]:
                            labels[other] = labels[pixel]
                    if waits:
                        waiting[waiting_size] = pixel
                        waiting_size += 1
                for place in range(taken_size):
                    levels[taken[place]] = 0
                    front[place] = taken[place]
                front_size = taken_size
            for place in range(waiting_size):
                front[front_size + place] = waiting[place]
            front_size += waiting_size
        for place in range(front_size):
            for step in beside:
                other = front[place] + step
                y, x = other // row, other % row
                inside = y0 <= y < y1 and x0 <= x < x1
                if inside and labels[other] == 0 and levels[other] != OUTSIDE:
                    top, bottom = min(top, y), max(bottom, y)
                    left, right = min(left, x), max(right, x)
    return top, left, bottom, right
