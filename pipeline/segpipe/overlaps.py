"""Which objects of two label images share pixels, and how many: what every score is counted from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

LARGEST_ID = 2**32 - 1
_BAND = 2**21  # pixels that are counted at once
_PENDING = 2**21  # pairs that wait to be added up


@dataclass(frozen=True)
class Overlaps:
    """Pairs of objects of two label images that share pixels; background is no object.

    first_ids, second_ids
        Ids of the objects of each image, ascending, int64.
    first_areas, second_areas
        Their pixels, int64.
    first, second
        Of each pair, the place of its objects in `first_ids` and `second_ids`; pairs ascend.
    common
        Pixels that the pair shares, int64.

    Memory grows with the number of objects, not with pixels or with the largest id.
    """

    first_ids: Array
    second_ids: Array
    first_areas: Array
    second_areas: Array
    first: Array
    second: Array
    common: Array

    @classmethod
    def of(cls, first: Array, second: Array) -> Overlaps:
        """The pairs of two label images of one shape, (Y, X) integers.

        Raises
        ------
        ValueError
            When shapes differ, or an id is no integer from 0 to 2^32 - 1.
        """
        return cls.of_parts([(first, second)])

    @classmethod
    def of_parts(cls, parts: Iterable[tuple[Array, Array]]) -> Overlaps:
        """The pairs of two label images that are given in parts, each (first, second) of one place.

        Raises
        ------
        ValueError
            As `of`.
        """
        total = _Sums()
        for first, second in parts:
            if first.shape != second.shape:
                raise ValueError(f"label images of {first.shape} and {second.shape} pixels differ")
            rows = max(_BAND // max(first[:1].size, 1), 1)
            for row in range(0, len(first), rows):
                total.add(*_count_pairs(first[row : row + rows], second[row : row + rows]))
        codes, pixels = total.all()
        first_at, second_at = codes >> np.uint64(32), codes & np.uint64(LARGEST_ID)
        first_ids, first_index, first_areas = _objects(first_at, pixels)
        second_ids, second_index, second_areas = _objects(second_at, pixels)
        both = (first_at > 0) & (second_at > 0)
        return cls(
            first_ids,
            second_ids,
            first_areas,
            second_areas,
            first_index[both],
            second_index[both],
            pixels[both],
        )

    @property
    def swapped(self) -> Overlaps:
        """The same with first and second exchanged."""
        order = np.lexsort((self.first, self.second))
        return Overlaps(
            self.second_ids,
            self.first_ids,
            self.second_areas,
            self.first_areas,
            self.second[order],
            self.first[order],
            self.common[order],
        )

    @cached_property
    def union(self) -> Array:
        """Pixels of each pair that are in either object."""
        areas: Array = self.first_areas[self.first] + self.second_areas[self.second] - self.common
        return areas

    @cached_property
    def iou(self) -> Array:
        """Intersection over union of each pair, float64, rounded correctly: 11 / 20 is 0.55."""
        share: Array = self.common / self.union
        return share

    @cached_property
    def matches(self) -> Array:
        """Places of the pairs that match: their intersection over union is at least one half.

        No object is in two of them. Above one half that is so by nature (Kirillov et al. 2019,
        Panoptic Segmentation, section 4.1). At exactly one half, an object T may have two partners:

            T   1 1 1 1      common >= (T + P) / 3 and common <= P give common >= T / 2 for both,
            P   2 2 3 3      so both are halves of T, lie inside it, and have no other partner.

        Of these the first in the order of pairs is taken. Number and intersection over union of the
        matches are those of an optimal assignment, which may take the other.
        """
        chosen = np.flatnonzero(2 * self.common >= self.union)
        chosen = chosen[np.unique(self.first[chosen], return_index=True)[1]]
        return np.sort(chosen[np.unique(self.second[chosen], return_index=True)[1]])


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
    ids: Array = pairs.first_ids[pieces(pairs)[1]]
    return ids


def pieces(pairs: Overlaps) -> tuple[Array, Array]:
    """Places of the pairs (whole, piece) of the objects of `split_ids`, and of these in `first_ids`."""
    is_piece = (2 * pairs.common > pairs.second_areas[pairs.second]) & (
        10 * pairs.common >= pairs.first_areas[pairs.first]
    )
    count = np.bincount(pairs.first[is_piece], minlength=len(pairs.first_ids))
    return np.flatnonzero(is_piece & (count >= 2)[pairs.first]), np.flatnonzero(count >= 2)


def _count_pairs(first: Array, second: Array) -> tuple[Array, Array]:
    """(codes, pixels): each pair of ids as one number, ascending, and how many pixels have it."""
    codes = (_ids(first) << np.uint64(32)) | _ids(second)
    if not codes.size:
        return codes, np.zeros(0, np.int64)
    starts = np.flatnonzero(codes[1:] != codes[:-1]) + 1  # runs of one pair: fewer than pixels
    starts = np.concatenate([[0], starts])
    return _add_up(codes[starts], np.diff(starts, append=codes.size))


def _ids(labels: Array) -> Array:
    if labels.dtype.kind not in "uib":
        raise ValueError(f"labels of type {labels.dtype} are no integers")
    low, high = int(labels.min(initial=0)), int(labels.max(initial=0))
    if low < 0 or high > LARGEST_ID:
        raise ValueError(f"ids from {low} to {high} are not all from 0 to {LARGEST_ID}")
    return labels.ravel().astype(np.uint64)


def _add_up(keys: Array, amounts: Array) -> tuple[Array, Array]:
    """Distinct keys, ascending, and the sum of the amounts of each."""
    found, place = np.unique(keys, return_inverse=True)
    # The sums are float64: exact up to 2^53 pixels.
    return found, np.bincount(place, weights=amounts, minlength=len(found)).astype(np.int64)


class _Sums:
    """Pixels of pairs, collected part by part; what waits is added up now and then."""

    def __init__(self) -> None:
        self._parts: list[tuple[Array, Array]] = []
        self._waiting = 0

    def add(self, codes: Array, pixels: Array) -> None:
        self._parts.append((codes, pixels))
        self._waiting += len(codes)
        if self._waiting > max(_PENDING, 2 * len(self._parts[0][0])):
            self.all()

    def all(self) -> tuple[Array, Array]:
        """(codes, pixels) of all parts."""
        codes = np.concatenate([np.zeros(0, np.uint64), *(codes for codes, _ in self._parts)])
        pixels = np.concatenate([np.zeros(0, np.int64), *(pixels for _, pixels in self._parts)])
        self._parts, self._waiting = [_add_up(codes, pixels)], 0
        return self._parts[0]


def _objects(ids: Array, pixels: Array) -> tuple[Array, Array, Array]:
    """Ids of the objects, the place of each entry's id in them, and their areas.

    The place is meaningless where the id is 0.
    """
    found, areas = _add_up(ids, pixels)
    background = int(found.size > 0 and found[0] == 0)
    place = np.searchsorted(found, ids) - background
    return found[background:].astype(np.int64), place, areas[background:]
