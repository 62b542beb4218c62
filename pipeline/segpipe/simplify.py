"""Fewer corners for outlines, by a tolerance: what is lost is known, and what remains is valid."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from segpipe.polygons import Polygons

Array = np.ndarray[Any, np.dtype[Any]]
HALVINGS = 4
"""Tolerances that are tried for an object: the one asked for, half of it, a quarter, an eighth."""


def simplify(polygons: Polygons, tolerance: float) -> Polygons:
    """The polygons with fewer of their corners; none of those left out is further than the tolerance
    from the line that is drawn instead.

    Each ring is simplified after D. H. Douglas and T. K. Peucker ("Algorithms for the reduction of the
    number of points required to represent a digitized line or its caricature", Cartographica 10, 1973),
    between its first corner and the one that is furthest from it. Where lines of an object would then
    touch, or a hole would come to lie outside, that object is simplified by half the tolerance, and so
    on, and stays as it is where nothing helps; objects of several parts stay as they are. So polygons
    remain valid. They do not remain a partition: the outlines of two neighbours may overlap, or part,
    by twice the tolerance.

    Parameters
    ----------
    tolerance
        Pixels, above 0.
    """
    kept = np.ones(len(polygons.corners), np.bool_)
    _choose(polygons.parts, polygons.rings, polygons.ends, polygons.corners, tolerance, kept)
    ends = np.concatenate([[0], np.cumsum(kept)])[polygons.ends]
    return Polygons(polygons.ids, polygons.parts, polygons.rings, ends, polygons.corners[kept])


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _choose(
    parts: Array, rings: Array, ends: Array, corners: Array, tolerance: float, kept: Array
) -> None:
    """Which corners stay, in `kept` (V,) bool."""
    for one in range(parts.size - 1):
        if parts[one + 1] - parts[one] != 1:
            continue
        first, last = rings[parts[one]], rings[parts[one] + 1]
        begin, end = ends[first], ends[last]
        for halving in range(HALVINGS):
            for ring in range(first, last):
                _reduce(corners, ends[ring], ends[ring + 1], tolerance / 2**halving, kept)
            if _is_valid(ends[first : last + 1], corners, kept):
                break
            kept[begin:end] = True


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _reduce(corners: Array, begin: int, end: int, tolerance: float, kept: Array) -> None:
    """Which corners of one ring stay; at least three."""
    kept[begin:end] = False
    far, furthest = begin, -1.0
    for place in range(begin, end):
        away = float(
            (corners[place, 0] - corners[begin, 0]) ** 2
            + (corners[place, 1] - corners[begin, 1]) ** 2
        )
        if away > furthest:
            far, furthest = place, away
    kept[begin] = kept[far] = True
    waiting = [(begin, far), (far, end)]  # `end` stands for the first corner again
    count = 2
    third, most = begin, -1.0
    while len(waiting) > 0:
        low, high = waiting.pop()
        apart, widest = low, -1.0
        for place in range(low + 1, high):
            away = _distance(corners, place, low, begin if high == end else high)
            if away > widest:
                apart, widest = place, away
        if widest > tolerance:
            kept[apart] = True
            count += 1
            waiting.append((low, apart))
            waiting.append((apart, high))
        elif widest > most:
            third, most = apart, widest
    if count == 2:
        kept[third] = True


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _distance(corners: Array, place: int, start: int, stop: int) -> float:
    """Of a corner from the line between two others, its ends included."""
    run_y = float(corners[stop, 0] - corners[start, 0])
    run_x = float(corners[stop, 1] - corners[start, 1])
    y = float(corners[place, 0] - corners[start, 0])
    x = float(corners[place, 1] - corners[start, 1])
    length = run_y * run_y + run_x * run_x
    along = 0.0
    if length > 0:
        along = min(1.0, max(0.0, (y * run_y + x * run_x) / length))
    return float(np.sqrt((y - along * run_y) ** 2 + (x - along * run_x) ** 2))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _is_valid(ends: Array, corners: Array, kept: Array) -> bool:
    """Whether no two lines of a part touch but where one follows the other, and holes are inside of
    the outline, and not of one another."""
    count = 0
    for place in range(ends[0], ends[-1]):
        count += kept[place]
    start, stop = np.empty(count, np.int64), np.empty(count, np.int64)
    ring_of = np.empty(count, np.int64)
    firsts = np.zeros(ends.size, np.int64)
    line = 0
    for ring in range(ends.size - 1):
        firsts[ring] = line
        for place in range(ends[ring], ends[ring + 1]):
            if kept[place]:
                start[line], ring_of[line] = place, ring
                if line > firsts[ring]:
                    stop[line - 1] = place
                line += 1
        stop[line - 1] = start[firsts[ring]]
    firsts[-1] = line
    low, high = np.empty(count, np.int64), np.empty(count, np.int64)
    for line in range(count):
        one, two = corners[start[line], 0], corners[stop[line], 0]
        low[line], high[line] = min(one, two), max(one, two)
    order = np.argsort(low)
    for i in range(count):
        one = order[i]
        for j in range(i + 1, count):
            two = order[j]
            if low[two] > high[one]:
                break
            if stop[one] == start[two]:
                if _folds(corners, start[one], stop[one], stop[two]):
                    return False
                if stop[two] != start[one]:
                    continue
            if stop[two] == start[one]:
                if _folds(corners, start[two], stop[two], stop[one]):
                    return False
                continue
            if _touch(corners, start[one], stop[one], start[two], stop[two]):
                return False
    for ring in range(1, ends.size - 1):
        corner = start[firsts[ring]]
        for other in range(ends.size - 1):
            if other == ring:
                continue
            y, x = corners[corner, 0], corners[corner, 1]
            odd = False
            for line in range(firsts[other], firsts[other + 1]):
                y0, x0 = corners[start[line], 0], corners[start[line], 1]
                y1, x1 = corners[stop[line], 0], corners[stop[line], 1]
                if (y0 <= y) != (y1 <= y):
                    side = (x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)
                    if (side > 0) == (y1 > y0):
                        odd = not odd
            if odd != (other == 0):
                return False
    return True


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _side(corners: Array, a: int, b: int, c: int) -> int:
    """On which side of the way from a to b c lies: -1, 0, 1."""
    cross = (corners[b, 0] - corners[a, 0]) * (corners[c, 1] - corners[a, 1]) - (
        corners[b, 1] - corners[a, 1]
    ) * (corners[c, 0] - corners[a, 0])
    return int(np.sign(cross))


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _folds(corners: Array, a: int, b: int, c: int) -> bool:
    """Whether the way from a by b to c goes back on itself."""
    along = (corners[b, 0] - corners[a, 0]) * (corners[c, 0] - corners[b, 0]) + (
        corners[b, 1] - corners[a, 1]
    ) * (corners[c, 1] - corners[b, 1])
    return bool(along < 0 and _side(corners, a, b, c) == 0)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _touch(corners: Array, a: int, b: int, c: int, d: int) -> bool:
    """Whether the lines a b and c d have a point in common."""
    one, two = _side(corners, a, b, c), _side(corners, a, b, d)
    three, four = _side(corners, c, d, a), _side(corners, c, d, b)
    if one != two and three != four:
        return True
    if one == 0 and two == 0:  # on one line: whether their boxes meet
        for axis in range(2):
            if max(corners[a, axis], corners[b, axis]) < min(corners[c, axis], corners[d, axis]):
                return False
            if max(corners[c, axis], corners[d, axis]) < min(corners[a, axis], corners[b, axis]):
                return False
        return True
    return False
