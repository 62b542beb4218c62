"""Which objects a prediction got wrong, each told once, and where they lie densest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe.geometry import Box
from segpipe.overlaps import Overlaps, pieces

Array = np.ndarray[Any, np.dtype[Any]]

WINDOW = 4
"""Cells a side of a part that is shown."""


@dataclass(frozen=True)
class Mistakes:
    """Ids of objects, ascending. `missed` and `split` are of the truth, `false` and `fused` predicted.

    Each is told once: an object of which several pieces were predicted is split, and its pieces are
    not false; one that was fused with others is not missed. The counts in `ImageScores` are of
    all objects without a match.
    """

    missed: Array
    false: Array
    split: Array
    fused: Array

    @classmethod
    def of(cls, pairs: Overlaps) -> Mistakes:
        """Those of a prediction; `pairs` has the truth first."""
        matched = pairs.matches
        split, fragments = _divided(pairs)
        fused, parts = _divided(pairs.swapped)
        return cls(
            _without(pairs.first_ids, pairs.first_ids[pairs.first[matched]], split, parts),
            _without(pairs.second_ids, pairs.second_ids[pairs.second[matched]], fused, fragments),
            split,
            fused,
        )

    @property
    def true_ids(self) -> Array:
        """Objects of the truth."""
        return np.union1d(self.missed, self.split)

    @property
    def predicted_ids(self) -> Array:
        """Predicted objects."""
        return np.union1d(self.false, self.fused)


def add_density(
    density: Array, labels: Array, corner: tuple[int, int], cell: int, ids: Array
) -> None:
    """Count the pixels of some objects in each cell of `cell` pixels a side.

    Parameters
    ----------
    density
        (rows, columns) int64 of the whole image, added to.
    labels, corner
        (h, w) ids of a part, and where its first pixel lies.
    ids
        Which objects, ascending.
    """
    if not len(ids):
        return
    place = np.minimum(np.searchsorted(ids, labels), len(ids) - 1)
    ys, xs = np.nonzero(ids[place] == labels)
    np.add.at(density, ((ys + corner[0]) // cell, (xs + corner[1]) // cell), 1)


def densest_boxes(density: Array, cell: int, shape: tuple[int, int], count: int) -> list[Box]:
    """Up to `count` boxes of `WINDOW` cells a side that hold most, none sharing a cell with another.

    The first is given even where there is nothing, the others are not.
    """
    left, boxes = density.copy(), list[Box]()
    taken = np.zeros(density.shape, np.bool_)
    height, width = (min(WINDOW, n) for n in density.shape)
    while len(boxes) < count:
        sums = np.lib.stride_tricks.sliding_window_view(left, (height, width)).sum((2, 3))
        free = ~np.lib.stride_tricks.sliding_window_view(taken, (height, width)).any((2, 3))
        sums = np.where(free, sums, -1)
        row, column = (int(n) for n in np.unravel_index(np.argmax(sums), sums.shape))
        if sums[row, column] < (1 if boxes else 0):
            break
        taken[row : row + height, column : column + width] = True
        size = (min(WINDOW * cell, shape[0]), min(WINDOW * cell, shape[1]))
        y, x = (
            min(n * cell, full - s) for n, full, s in zip((row, column), shape, size, strict=True)
        )
        boxes.append(Box(y, x, y + size[0], x + size[1]))
    return boxes


def _divided(pairs: Overlaps) -> tuple[Array, Array]:
    """Ids of first objects in several pieces, and those of their pieces."""
    places, divided = pieces(pairs)
    return pairs.first_ids[divided], np.unique(pairs.second_ids[pairs.second[places]])


def _without(ids: Array, *others: Array) -> Array:
    return np.setdiff1d(ids, np.concatenate(others), assume_unique=False)
