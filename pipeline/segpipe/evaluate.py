"""How well predicted instances match the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Counts:
    """Objects found (tp), found where there are none (fp) and missed (fn)."""

    tp: int
    fp: int
    fn: int

    @property
    def average_precision(self) -> float:
        """tp / (tp + fp + fn), the AP of the nuclei literature; 0 when nothing was found."""
        return self.tp / (self.tp + self.fp + self.fn) if self.tp else 0.0


@dataclass(frozen=True)
class Overlaps:
    """Pairs of objects of two label images (Y, X) that share pixels.

    first, second
        Ids of each pair.
    common
        Pixels that the pair shares.
    first_area, second_area
        Pixels of every id; background is 0.
    """

    first: Array
    second: Array
    common: Array
    first_area: Array
    second_area: Array

    @classmethod
    def of(cls, first: Array, second: Array) -> Overlaps:
        """The pairs of two label images (Y, X) of integers."""
        span = int(second.max(initial=0)) + 1
        pairs = first.astype(np.int64).ravel() * span + second.ravel()
        pairs, common = np.unique(pairs, return_counts=True)
        first_ids, second_ids = pairs // span, pairs % span
        first_area = np.zeros(int(first.max(initial=0)) + 1, np.int64)
        second_area = np.zeros(span, np.int64)
        np.add.at(first_area, first_ids, common)
        np.add.at(second_area, second_ids, common)
        first_area[0] = second_area[0] = 0
        both = (first_ids > 0) & (second_ids > 0)
        return cls(first_ids[both], second_ids[both], common[both], first_area, second_area)

    @property
    def swapped(self) -> Overlaps:
        """The same with first and second exchanged."""
        return Overlaps(self.second, self.first, self.common, self.second_area, self.first_area)

    @property
    def matches(self) -> Array:
        """Which pairs have an intersection over union above one half.

        Above one half an object overlaps at most one partner so much, so the matching is unique
        and needs no assignment (Kirillov et al. 2019, Panoptic Segmentation, section 4.1).
        """
        union = self.first_area[self.first] + self.second_area[self.second] - self.common
        return 2 * self.common > union


def count_matches(truth: Array, predicted: Array) -> Counts:
    """Matches at an intersection over union above one half.

    Parameters
    ----------
    truth, predicted
        (Y, X) integer labels, 0 is background.
    """
    pairs = Overlaps.of(truth, predicted)
    tp = int(np.count_nonzero(pairs.matches))
    objects = (int(np.count_nonzero(areas)) for areas in (pairs.first_area, pairs.second_area))
    true_objects, predicted_objects = objects
    return Counts(tp, predicted_objects - tp, true_objects - tp)


def split_ids(pairs: Overlaps) -> Array:
    """Ids of the first image's objects that the second holds in two pieces or more.

    An object of the second image is a piece of one of the first when it has more than half of its
    pixels there and makes up at least a tenth of it: crumbs are no pieces. With `pairs.swapped` these
    are the objects that fuse two or more.

    Examples
    --------
    >>> whole, cut = np.array([[1, 1, 1, 1, 0, 2, 2]]), np.array([[4, 4, 5, 5, 0, 6, 6]])
    >>> split_ids(Overlaps.of(whole, cut)).tolist(), split_ids(Overlaps.of(cut, whole)).tolist()
    ([1], [])
    """
    is_piece = (2 * pairs.common > pairs.second_area[pairs.second]) & (
        10 * pairs.common >= pairs.first_area[pairs.first]
    )
    ids, pieces = np.unique(pairs.first[is_piece], return_counts=True)
    return ids[pieces >= 2]
