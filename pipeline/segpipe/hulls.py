"""Convex hulls of objects: how many pixels they hold, and the points that decide them.

The hull of an object is that of the middles of its pixels' edges, and it holds the pixels whose
centres lie in it, or on its border: scikit-image's `convex_hull_image`. In units of half a pixel
all of that is integers, and nothing is rounded.

The hull of several parts is the hull of the points that decide the parts' hulls, so an object that is
cut needs a few points of each part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from segpipe.object_runs import ObjectRuns

Array = np.ndarray[Any, np.dtype[Any]]


def hulls_of(objects: ObjectRuns, cut: Array) -> tuple[Array, Array]:
    """Pixels in the convex hull of each object, and points of those that are cut.

    Parameters
    ----------
    cut
        (n,) bool: of these there is more elsewhere.

    Returns
    -------
    area
        (n,) int64, 0 for those that are cut.
    points
        (P, 3) int64: id, y, x of the pixels whose hull is that of all.
    """
    longest = int(np.diff(objects.starts).max(initial=0))
    size = int(2 * np.diff(objects.starts)[cut].sum())
    points = np.empty((size, 3), np.int64)
    area = np.zeros(len(objects.ids), np.int64)
    stack = np.empty((4, longest + 1, 2), np.int64)
    edges = np.empty((2, 3 * longest + 3, 2), np.int64)
    count: int = _find_hulls(
        objects.ids, objects.starts, objects.runs, cut, area, points, stack, edges
    )
    return area, points[:count]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _push(chain: Array, count: int, row: int, value: int) -> int:
    """Put a point on the lower envelope of values over rows; its new length. Rows do not fall."""
    if count and chain[count - 1, 0] == row:
        if chain[count - 1, 1] <= value:
            return count
        count -= 1
    while count >= 2:
        above = row - chain[count - 1, 0], value - chain[count - 1, 1]
        below = chain[count - 1, 0] - chain[count - 2, 0], chain[count - 1, 1] - chain[count - 2, 1]
        if below[1] * above[0] < above[1] * below[0]:
            break
        count -= 1
    chain[count, 0], chain[count, 1] = row, value
    return count + 1


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sum_inside(chain: Array, count: int, edge: Array, first: int, end: int) -> Any:
    """Sum over rows of the least column on or right of the envelope of pixels' edges."""
    length = 0
    for place in range(count):
        row, value = 2 * chain[place, 0], 2 * chain[place, 1]
        length = _push(edge, length, row - 1, value)
        length = _push(edge, length, row, value - 1)
        length = _push(edge, length, row + 1, value)
    total = np.int64(0)
    place = 0
    for y in range(first, end):
        while edge[place + 1, 0] < 2 * y:
            place += 1
        rows = edge[place + 1, 0] - edge[place, 0]
        over = edge[place + 1, 1] - edge[place, 1]
        up = edge[place, 1] * rows + over * (2 * y - edge[place, 0])
        total += -(-up // (2 * rows))
    return total


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _find_hulls(
    ids: Array,
    starts: Array,
    runs: Array,
    cut: Array,
    area: Array,
    points: Array,
    stack: Array,
    edges: Array,
) -> int:
    """Fill `area` and `points`; the number of points. `stack` and `edges` are room to work in.

    The left side is the lower envelope of x over y, the right side that of -x.
    """
    found = 0
    left, right = stack[0], stack[1]
    for number in range(ids.size):
        start, end = starts[number], starts[number + 1]
        lefts = rights = 0
        place = start
        while place < end:
            y, begin, last = runs[place, 0], runs[place, 1], runs[place, 2]
            place += 1
            while place < end and runs[place, 0] == y:
                last = runs[place, 2]
                place += 1
            lefts = _push(left, lefts, y, begin)
            rights = _push(right, rights, y, 1 - last)
        if cut[number]:
            for side, count, sign in ((left, lefts, 1), (right, rights, -1)):
                for place in range(count):
                    points[found, 0] = ids[number]
                    points[found, 1] = side[place, 0]
                    points[found, 2] = sign * side[place, 1]
                    found += 1
            continue
        first, stop = runs[start, 0], runs[end - 1, 0] + 1
        outside = _sum_inside(left, lefts, edges[0], first, stop)
        outside += _sum_inside(right, rights, edges[1], first, stop)
        area[number] = stop - first - outside
    return found
