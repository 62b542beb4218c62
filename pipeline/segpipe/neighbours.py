"""Distances to nearest neighbours among any number of points, a batch at a time.

Each batch is searched through a grid of squares, ring by ring; then the batches around it, for the
points that may have somebody nearer there. Memory is that of two batches, and a distance is the least
of numbers that each depend on two points only: how the points are batched does not show, as it can in
a k-d tree, which rounds the distances to its boxes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]
BATCH = 2**15
_PER_CELL = 2.0
"""Points in a square of the grid, about."""


def nearest_distances(points: Array, batch: int = BATCH) -> Iterator[Array]:
    """The distance of each point to the nearest other one, batch by batch: (n,) float64.

    NaN where there is no other.

    Parameters
    ----------
    points
        (N, 2) float64, y and x, as an array or a file mapped into memory; quick where those that are
        near each other in y are near each other in the array.
    """
    starts = range(0, len(points), batch)
    spans = np.array(
        [[part.min(), part.max()] for part in (points[s : s + batch, 0] for s in starts)]
    ).reshape(-1, 2)
    for own, start in enumerate(starts):
        targets = np.array(points[start : start + batch])
        nearest = np.full(len(targets), np.inf)
        low, high = spans[own]
        for other in np.argsort(np.abs(np.arange(len(spans)) - own), kind="stable"):
            gap = max(spans[other, 0] - high, low - spans[other, 1], 0.0)
            wanted = np.flatnonzero(nearest > gap * gap)
            if len(wanted) == 0:
                continue
            y = targets[wanted, 0]
            gaps = np.maximum(spans[other, 0] - y, y - spans[other, 1])
            wanted = wanted[nearest[wanted] > np.maximum(gaps, 0.0) ** 2]
            if len(wanted):
                begin = int(other) * batch
                them = np.array(points[begin : begin + batch])
                _search(targets, wanted, them, other == own, nearest)
        yield np.where(np.isinf(nearest), np.nan, np.sqrt(nearest))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _search(targets: Array, wanted: Array, points: Array, same: bool, nearest: Array) -> None:
    """Lower the squared distances `nearest` of some targets to those of `points`.

    same
        Whether targets and points are the same: none is its own neighbour.
    """
    top, left = points[:, 0].min(), points[:, 1].min()
    height, width = points[:, 0].max() - top, points[:, 1].max() - left
    count = points.shape[0]
    # No more than `count` squares in a row or column, should all points lie on a line.
    size = max(np.sqrt(height * width * _PER_CELL / count), height / count, width / count)
    if size == 0:
        size = 1.0
    rows, columns = int(height / size) + 1, int(width / size) + 1
    cell = np.empty(count, np.int64)
    begins = np.zeros(rows * columns + 1, np.int64)
    for place in range(count):
        row, column = int((points[place, 0] - top) / size), int((points[place, 1] - left) / size)
        cell[place] = row * columns + column
        begins[cell[place] + 1] += 1
    begins = np.cumsum(begins)
    filled = begins.copy()
    order = np.empty(count, np.int64)
    for place in range(count):
        order[filled[cell[place]]] = place
        filled[cell[place]] += 1
    for target in wanted:
        y, x = targets[target, 0], targets[target, 1]
        best = nearest[target]
        row = min(max(int((y - top) / size), 0), rows - 1)
        column = min(max(int((x - left) / size), 0), columns - 1)
        for ring in range(max(rows, columns)):
            # What is in this ring is at least so far, but for rounding.
            if ring > 0 and (ring - 1 - 1e-6) * size > 0 and ((ring - 1 - 1e-6) * size) ** 2 > best:
                break
            for i in range(max(row - ring, 0), min(row + ring + 1, rows)):
                edge = i == row - ring or i == row + ring
                step = 1 if edge or ring == 0 else 2 * ring
                for j in range(column - ring, column + ring + 1, step):
                    if j < 0 or j >= columns:
                        continue
                    for at in range(begins[i * columns + j], begins[i * columns + j + 1]):
                        place = order[at]
                        if same and place == target:
                            continue
                        dy, dx = points[place, 0] - y, points[place, 1] - x
                        best = min(best, dy * dy + dx * dx)
        nearest[target] = best
