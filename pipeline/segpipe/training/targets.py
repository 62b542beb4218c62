"""From a label image to what a network is asked to give, and to how much each pixel counts.

Labels are (Y, X) integers, 0 for background and one positive id for each object, which may be in
several pieces and may touch others. Nothing here modifies them.
"""

from __future__ import annotations

from math import ceil, log, sqrt
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

WEIGHT_ERROR = 5e-6
"""By how much the weight of a pixel is too small at most: terms below this are left out."""

_NO_EDGE = -1.0


def foreground_of(labels: Array) -> Array:
    """1 inside objects, 0 outside: (Y, X) float32.

    Raises
    ------
    ValueError
        When `labels` is not a label image.
    """
    _check_labels(labels)
    inside: Array = labels != 0
    return inside.astype(np.float32)


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
    _check_labels(labels)
    ids, count = _numbered(labels)
    result = np.zeros(labels.shape, np.float32)
    if count:
        _fill_interior(ids, _squared_row_distances(ids), count, result)
    return result


def weight_map(
    labels: Array,
    w0: float = 10.0,
    sigma: float = 5.0,
    class_weights: tuple[float, float] = (1.0, 1.0),
) -> Array:
    """How much each pixel counts in a cross-entropy: (Y, X) float32.

    w(p) = class_weights[0] + w0 exp(-(d1 + d2)^2 / (2 sigma^2)) in the background and
    class_weights[1] in objects, d1 and d2 the distances of p to the nearest pixels of the nearest
    and of the second nearest object: gaps between neighbours count most. With fewer than two
    objects in reach the exponential is 0.

    Source: Ronneberger, Fischer and Brox, U-Net, 2015, arXiv 1505.04597, equation 2. The paper
    defines it for all pixels but speaks of separation borders, and its figure 3 shows the high
    weights between cells only: here pixels of objects have no second term. Objects that touch leave
    no pixel between them to weigh; see `separate_touching`.

    A second object further than sigma sqrt(2 ln(w0 / WEIGHT_ERROR)) is left out (27 px for the
    defaults), so no weight is too small by more than WEIGHT_ERROR. Within that reach distances are
    exact: a row's two nearest objects at each of its pixels are enough, since a third that is
    nearer by way of another column would have the two before it.

    Parameters
    ----------
    w0
        Height of the second term, 0 or more.
    sigma
        Its width in pixels, above 0.
    class_weights
        w_c for background and for objects; `balanced_class_weights` gives a pair.

    Raises
    ------
    ValueError
        When `labels` is not a label image, or a number is out of bounds.
    """
    _check_labels(labels)
    if w0 < 0 or sigma <= 0 or min(class_weights) < 0:
        raise ValueError(
            f"w0 {w0}, sigma {sigma}, class_weights {class_weights}; "
            "expected sigma above 0 and the others 0 or more"
        )
    background, inside = class_weights
    result = np.where(labels == 0, np.float32(background), np.float32(inside))
    if w0 > WEIGHT_ERROR:
        reach = ceil(sigma * sqrt(2 * log(w0 / WEIGHT_ERROR)))
        ids, count = _numbered(labels)
        if count > 1:
            _add_gap_weights(ids, *_nearest_two_of_rows(ids, reach), reach, w0, sigma, result)
    return result


def balanced_class_weights(labels: Array) -> tuple[float, float]:
    """Weights of background and objects that give each half of the image's total weight.

    The mean weight over the image is 1. An image with only one of the two has (1, 1). The U-Net
    paper balances class frequencies (section 3) without saying how; this is the inverse frequency.

    Raises
    ------
    ValueError
        When `labels` is not a label image.
    """
    _check_labels(labels)
    inside = np.count_nonzero(labels)
    background = labels.size - inside
    if not inside or not background:
        return 1.0, 1.0
    return labels.size / (2 * background), labels.size / (2 * inside)


def separate_touching(labels: Array) -> Array:
    """Labels with one pixel of background between objects that touch: (Y, X), same dtype.

    A pixel goes to the background if one of its 4 neighbours belongs to an object with a smaller
    id, so the line lies in the object with the larger one and no two objects are 4-neighbours any
    more. An object that is one pixel thin there may be lost.

    For networks whose only output is the foreground: the U-Net paper (section 3) draws such borders
    between touching cells before it weighs them. It costs overlap at high thresholds; a network
    that has an interior output needs no such line, so nothing here draws it unasked.

    Raises
    ------
    ValueError
        When `labels` is not a label image.
    """
    _check_labels(labels)
    taken = np.zeros(labels.shape, bool)
    for axis in range(2):
        here = np.moveaxis(labels, axis, 0)
        first, second = here[:-1], here[1:]
        touching = (first != 0) & (second != 0)
        line = np.moveaxis(taken, axis, 0)
        line[1:] |= touching & (first < second)
        line[:-1] |= touching & (second < first)
    return np.where(taken, 0, labels).astype(labels.dtype)


def _check_labels(labels: Array) -> None:
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.ndim}-D {labels.dtype}; expected 2-D integers")
    if labels.dtype.kind == "i" and labels.size and labels.min() < 0:
        raise ValueError(f"labels go down to {labels.min()}; expected 0 and positive ids")


def _numbered(labels: Array) -> tuple[Array, int]:
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


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _nearest_two_of_rows(ids: Array, reach: int) -> tuple[Array, Array]:
    """Of each pixel, the two nearest objects in its row and how far they are, at most `reach`.

    Both (Y, X, 2) int32; id 0 where there is none.
    """
    height, width = ids.shape
    found = np.zeros((height, width, 2), np.int32)
    far = np.zeros((height, width, 2), np.int32)
    for y in range(height):
        for direction in (1, -1):
            x = 0 if direction == 1 else width - 1
            one, other, one_x, other_x = 0, 0, 0, 0  # last seen, and last seen of another id
            for _ in range(width):
                here = ids[y, x]
                if here != 0:
                    if here != one:
                        other, other_x = one, one_x
                        one = here
                    one_x = x
                if one != 0 and abs(x - one_x) <= reach:
                    _insert(found[y, x], far[y, x], one, abs(x - one_x))
                if other != 0 and abs(x - other_x) <= reach:
                    _insert(found[y, x], far[y, x], other, abs(x - other_x))
                x += direction
    return found, far


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _insert(found: Array, far: Array, one: int, distance: int) -> None:
    """Take an object into the two nearest, nearest first, unless it is there and no further."""
    if found[0] == one:
        far[0] = min(far[0], distance)
    elif found[0] == 0 or distance < far[0]:
        found[1], far[1] = found[0], far[0]
        found[0], far[0] = one, distance
    elif found[1] == one:
        far[1] = min(far[1], distance)
    elif found[1] == 0 or distance < far[1]:
        found[1], far[1] = one, distance


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _add_gap_weights(
    ids: Array, found: Array, far: Array, reach: int, w0: float, sigma: float, result: Array
) -> None:
    """Add the second term of the weights in the background; modifies `result`."""
    height, width = ids.shape
    nearest = np.zeros(2, np.int32)
    squared = np.zeros(2, np.int32)
    for y in range(height):
        for x in range(width):
            if ids[y, x] != 0:
                continue
            nearest[:] = 0
            for step in range(reach + 1):
                if nearest[1] != 0 and step * step >= squared[1]:
                    break
                nearer = min(step * step, squared[0]) if nearest[0] != 0 else step * step
                if (reach - step) ** 2 < nearer:  # whatever comes, d1 + d2 is beyond the reach
                    break
                for row in (y - step, y + step):
                    if 0 <= row < height:
                        for index in range(2):
                            one = found[row, x, index]
                            if one != 0:
                                distance = far[row, x, index] ** 2 + step * step
                                _insert(nearest, squared, one, distance)
            if nearest[1] != 0:
                both = sqrt(squared[0]) + sqrt(squared[1])
                result[y, x] += w0 * np.exp(-(both**2) / (2 * sigma**2))
