"""The pixels of each object as horizontal runs: what sums, hulls and borders are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class ObjectRuns:
    """Runs of pixels with one label, object by object.

    ids
        (n,) int64, ascending.
    starts
        (n + 1,) int64: object i has runs[starts[i] : starts[i + 1]], in raster order.
    runs
        (R, 3) int64: y, first x, one past the last x.
    """

    ids: Array
    starts: Array
    runs: Array

    @classmethod
    def of(cls, labels: Array) -> Self:
        """The objects in (h, w) uint32 labels, 0 being none; coordinates are the array's."""
        label, runs = _find_runs(labels)
        order = _stable_order(label)
        label = label[order]
        return cls(*_groups(label), runs[order])

    @classmethod
    def of_points(cls, points: Array) -> Self:
        """Runs of one pixel.

        Parameters
        ----------
        points
            (P, 3) uint32: id, y, x, in any order.
        """
        wide = points.astype(np.int64)
        wide = wide[np.lexsort(wide.T[::-1])]
        runs = np.column_stack([wide[:, 1], wide[:, 2], wide[:, 2] + 1])
        return cls(*_groups(wide[:, 0]), runs)


def _groups(label: Array) -> tuple[Array, Array]:
    """The different values of an ascending array, and where each begins, with the end: int64."""
    if len(label) == 0:
        return np.zeros(0, np.int64), np.zeros(1, np.int64)
    begins = np.flatnonzero(np.r_[True, label[1:] != label[:-1]])
    return label[begins].astype(np.int64), np.r_[begins, len(label)].astype(np.int64)


def _stable_order(label: Array) -> Array:
    """`argsort` of uint32, stable: by halves, because numpy has a radix sort for 16 bits only."""
    order = np.argsort(label.astype(np.uint16), kind="stable")
    upper = (label >> np.uint32(16)).astype(np.uint16)
    if not upper.any():
        return order
    return order[np.argsort(upper[order], kind="stable")]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _find_runs(labels: Array) -> tuple[Array, Array]:
    """Runs in raster order: label (R,) uint32; and y, x0, x1 (R, 3) int64."""
    height, width = labels.shape
    capacity = width + labels.size // 32 + 1
    label, run = np.empty(capacity, np.uint32), np.empty((capacity, 3), np.int64)
    count = 0
    for y in range(height):
        if count + width > capacity:
            capacity = 2 * (count + width)
            label = np.concatenate((label[:count], np.empty(capacity - count, np.uint32)))
            run = np.concatenate((run[:count], np.empty((capacity - count, 3), np.int64)))
        x = 0
        while x < width:
            here = labels[y, x]
            if here == 0:
                x += 1
                continue
            begin = x
            while x < width and labels[y, x] == here:
                x += 1
            label[count] = here
            run[count, 0], run[count, 1], run[count, 2] = y, begin, x
            count += 1
    return label[:count].copy(), run[:count].copy()
