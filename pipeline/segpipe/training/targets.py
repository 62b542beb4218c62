"""From a label image to what a network is asked to give for it.

Labels are (Y, X) integers, 0 for background and one positive id for each object, which may be in
several pieces and may touch others. Nothing here modifies them.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

_NO_EDGE = -1.0


def interior_of(labels: Array) -> Array:
    """How deep inside its object each pixel lies: (Y, X) float32 in [0, 1], 0 outside.

    The Euclidean distance from the pixel to the nearest one that is not of its object, divided by
    the largest such distance in the object. So each object reaches 1, however small; touching
    objects are each other's edge, and the border of the image is no edge: what lies beyond is
    unknown, and an object cut by it looks as it does in the whole image wherever its nearest edge
    is in view. An object that fills the image is 1 everywhere.

    Distances are exact. Source: Felzenszwalb and Huttenlocher, Distance Transforms of Sampled
    Functions, 2012, section 2 (lower envelopes of parabolas), for all objects in one pass: along an
    axis, each run of one label is a line of its own, with an edge beyond either end.

    Raises
    ------
    ValueError
        When `labels` is not a label image.

    Examples
    --------
    >>> interior_of(np.array([[0, 7, 7, 7, 0, 2, 2]])).tolist()
    [[0.0, 0.5, 1.0, 0.5, 0.0, 0.5, 1.0]]
    """
    check_labels(labels)
    ids, count = numbered(labels)
    result = np.zeros(labels.shape, np.float32)
    if count:
        _fill_interior(ids, _squared_row_distances(ids), count, result)
    return result


def check_labels(labels: Array) -> None:
    """Refuse what is no label image: (Y, X) integers, none below 0.

    Raises
    ------
    ValueError
        When it is none.
    """
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.ndim}-D {labels.dtype}; expected 2-D integers")
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        raise ValueError(f"labels go down to {labels.min()}; expected 0 and positive ids")


def numbered(labels: Array) -> tuple[Array, int]:
    """Labels as contiguous int32 of at most the number of pixels, and the largest of them."""
    largest = int(labels.max(initial=0))
    if largest <= labels.size:
        return np.ascontiguousarray(labels, np.int32), largest
    ids, ranks = np.unique(labels, return_inverse=True)
    ranks = ranks.reshape(labels.shape).astype(np.int32) + np.int32(ids[0] != 0)
    return ranks, int(ranks.max())


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _squared_row_distances(ids: Array) -> Array:
    """Squared distance to the nearest pixel of the row that has another id, or _NO_EDGE: float64."""
    height, width = ids.shape
    result = np.zeros((height, width))
    for y in range(height):
        start = 0
        while start < width:
            stop = start + 1
            while stop < width and ids[y, stop] == ids[y, start]:
                stop += 1
            if ids[y, start] != 0:
                for x in range(start, stop):
                    left = x - start + 1 if start > 0 else width + 1
                    right = stop - x if stop < width else width + 1
                    nearest = min(left, right)
                    result[y, x] = float(nearest) ** 2 if nearest <= width else _NO_EDGE
            start = stop
    return result


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _fill_interior(ids: Array, squared: Array, count: int, result: Array) -> None:
    """Fill `result` from the rows' squared distances; modifies both."""
    height, width = ids.shape
    largest = np.zeros(count + 1)
    centre = np.empty(height + 2, np.int64)
    offset, begin = np.empty(height + 2), np.empty(height + 2)
    for x in range(width):
        start = 0
        while start < height:
            stop = start + 1
            while stop < height and ids[stop, x] == ids[start, x]:
                stop += 1
            one = ids[start, x]
            if one != 0:
                _measure_run(squared[:, x], start, stop, centre, offset, begin)
                largest[one] = max(largest[one], squared[start:stop, x].max())
            start = stop
    for y in range(height):
        for x in range(width):
            if ids[y, x] != 0:
                result[y, x] = sqrt(squared[y, x] / largest[ids[y, x]])


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _measure_run(
    squared: Array, start: int, stop: int, centre: Array, offset: Array, begin: Array
) -> None:
    """Turn squared distances along rows into those in the plane, for a run of one id in a column.

    Each pixel y of the run is at most the lowest of the parabolas squared[j] + (y - j)^2, where the
    two pixels beyond the run's ends, if the image has them, are edges: 0.

    Parameters
    ----------
    squared
        (Y,) float64, a column; modified from `start` to `stop`.
    centre, offset, begin
        Scratch, Y + 2 long: of each parabola of the lower envelope its j, its squared[j], and where
        it is the lowest from.
    """
    last = -1
    for y in range(max(start - 1, 0), min(stop + 1, len(squared))):
        value = squared[y] if start <= y < stop else 0.0
        if value == _NO_EDGE:
            continue
        crossing = -np.inf
        while last >= 0:
            other = centre[last]
            crossing = (value + y**2 - offset[last] - other**2) / (2.0 * (y - other))
            if crossing > begin[last]:
                break
            last -= 1
            crossing = -np.inf
        last += 1
        centre[last], offset[last], begin[last] = y, value, crossing
    piece = 0
    for y in range(start, stop):
        while piece < last and begin[piece + 1] <= y:
            piece += 1
        # without any edge the object fills the image: the same depth everywhere
        squared[y] = (y - centre[piece]) ** 2 + offset[piece] if last >= 0 else 1.0
