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
from segpipe.runs import OUTSIDE

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


def grow(field: Field, steps: tuple[int, ...], core: Box) -> bool:
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
    Whether the next step would label a pixel of `core`.
    """
    row = field.labels.shape[1]
    front = _grow(field.labels.ravel(), field.levels.ravel(), row, np.asarray(steps, np.int64))
    moving: bool = _reaches(
        front, field.labels, field.levels, core.y0 + 1, core.x0 + 1, core.y1 + 1, core.x1 + 1
    )
    return moving


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _grow(labels: Array, levels: Array, row: int, steps: Array) -> Array:
    """Grow `labels` in place; both arrays are flat, with a border of OUTSIDE one pixel wide.

    Returns the front: the labelled pixels that have an unlabelled pixel of M beside them, and maybe
    some that no longer have one. A pixel of the front whose neighbour is not yet admitted waits for
    a later level.
    """
    beside = (-row, -1, 1, row)
    open_pixels = 0
    front_size = 0
    front = np.empty(labels.size // 64 + 64, np.int64)
    for pixel in range(row, labels.size - row):
        if levels[pixel] == OUTSIDE:
            continue
        if labels[pixel] == 0:
            open_pixels += 1
            continue
        for step in beside:
            if labels[pixel + step] == 0 and levels[pixel + step] != OUTSIDE:
                if front_size == front.size:
                    front = np.concatenate((front, np.empty(front_size, np.int64)))
                front[front_size] = pixel
                front_size += 1
                break
    front = np.concatenate((front[:front_size], np.empty(open_pixels, np.int64)))
    waiting = np.empty(front.size, np.int64)
    taken = np.empty(open_pixels, np.int64)
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
    return front[:front_size]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _reaches(
    front: Array, labels: Array, levels: Array, y0: int, x0: int, y1: int, x1: int
) -> bool:
    """Whether a pixel of the front has an unlabelled pixel of M in the box beside it."""
    for place in range(front.size):
        y, x = divmod(front[place], labels.shape[1])
        for dy, dx in ((-1, 0), (0, -1), (0, 1), (1, 0)):
            v, u = y + dy, x + dx
            if y0 <= v < y1 and x0 <= u < x1 and labels[v, u] == 0 and levels[v, u] != OUTSIDE:
                return True
    return False
