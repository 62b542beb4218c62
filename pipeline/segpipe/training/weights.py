"""How much each pixel counts in a cross-entropy: the U-Net's weight map, and weights of classes.

Labels are (Y, X) integers, 0 for background and one positive id for each object, which may be in
several pieces and may touch others. Nothing here modifies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, sqrt
from typing import Any

import numpy as np
from numba import njit

from segpipe.training.targets import check_labels, numbered

Array = np.ndarray[Any, np.dtype[Any]]

WEIGHT_ERROR = 5e-6
"""By how much the weight of a pixel is too small at most: terms below this are left out."""


@dataclass(frozen=True)
class Weighing:
    """What decides the weights of an image's pixels.

    class_weights
        Of each number in a mask of classes; or of background and objects. None: 1.
    w0, sigma
        See `weight_map`; of no use for classes.
    """

    class_weights: tuple[float, ...] | None = None
    w0: float = 0.0
    sigma: float = 5.0

    def of_objects(self, labels: Array) -> Array:
        """(Y, X) float32 of labels with a number per object."""
        background, inside = self.class_weights or (1.0, 1.0)
        return weight_map(labels, self.w0, self.sigma, (background, inside))

    def of_classes(self, labels: Array) -> Array:
        """(Y, X) float32 of labels that are classes."""
        if self.class_weights is None:
            return np.ones(labels.shape, np.float32)
        return np.asarray(self.class_weights, np.float32)[labels]


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
    no pixel between them to weigh.

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
        w_c for background and for objects; see `balanced_class_weights`.

    Raises
    ------
    ValueError
        When `labels` is not a label image, or a number is out of bounds.
    """
    check_labels(labels)
    if w0 < 0 or sigma <= 0 or min(class_weights) < 0:
        raise ValueError(
            f"w0 {w0}, sigma {sigma}, class_weights {class_weights}; "
            "expected sigma above 0 and the others 0 or more"
        )
    background, inside = class_weights
    result = np.where(labels == 0, np.float32(background), np.float32(inside))
    if w0 > WEIGHT_ERROR:
        reach = ceil(sigma * sqrt(2 * log(w0 / WEIGHT_ERROR)))
        ids, count = numbered(labels)
        if count > 1:
            _add_gap_weights(ids, *_nearest_two_of_rows(ids, reach), reach, w0, sigma, result)
    return result


def balanced_class_weights(pixels: Sequence[int]) -> tuple[float, ...]:
    """Weights with which each class makes up an equal share of the total; the mean pixel's is 1.

    The U-Net paper balances class frequencies (section 3) without saying how; this is the inverse
    frequency.

    Parameters
    ----------
    pixels
        How many there are of each class in all training images. A class without any has weight 1, and
        no share.

    Examples
    --------
    >>> balanced_class_weights([75, 25, 0])
    (0.6666666666666666, 2.0, 1.0)
    """
    total, classes = sum(pixels), sum(count > 0 for count in pixels)
    return tuple(total / (classes * count) if count else 1.0 for count in pixels)


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
