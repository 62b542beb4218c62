"""Holes of the foreground up to a size, exact wherever the image is cut.

A hole is an 8-connected component of the complement of M that does not touch the image's border (M is
4-connected, so its complement is 8-connected). As with seeds, a region decides what touches no seam; the
rest is joined by union-find: areas add, "touches the border" is an or.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from segpipe.geometry import Lattice, Region
from segpipe.linked import linked_groups

Array = np.ndarray[Any, np.dtype[Any]]
FILLED = 1
"""Slot of a pixel in a hole that its region has decided to fill."""


@dataclass(frozen=True)
class HoleRecord:
    """The components of the complement that touch a seam.

    area
        (T,) int64 pixels inside the region.
    open
        (T,) bool: touches the image's border.
    top, left, bottom, right
        int32: node at each pixel of the edge, -1 in the foreground.
    """

    area: Array
    open: Array
    top: Array
    left: Array
    bottom: Array
    right: Array


def label_holes(
    mask: Array, region: Region, lattice: Lattice, max_hole: int
) -> tuple[Array, HoleRecord]:
    """Slots of a region's pixels, (h, w) uint32: 0 stays, 1 is filled, 2 + t waits for node t.

    Parameters
    ----------
    mask
        (h, w) bool: the foreground.
    max_hole
        Pixels of the largest hole that is filled.
    """
    from scipy import ndimage  # only where holes are to be filled

    labels, count = ndimage.label(~mask, np.ones((3, 3), bool))  # cc3d 4.1 errs in 2D with 8
    area = np.bincount(labels.ravel(), minlength=count + 1)
    area[0] = 0
    box, (height, width) = region.box, lattice.shape
    edges = (labels[0], labels[:, 0], labels[-1], labels[:, -1])
    at_border = (box.y0 == 0, box.x0 == 0, box.y1 == height, box.x1 == width)
    is_open, touching = np.zeros(count + 1, bool), np.zeros(count + 1, bool)
    for edge, ends in zip(edges, at_border, strict=True):
        (is_open if ends else touching)[edge] = True
    is_open[0] = touching[0] = False
    nodes = np.flatnonzero(touching)
    number = np.full(count + 1, -1, np.int32)
    number[nodes] = np.arange(len(nodes), dtype=np.int32)
    slot = np.where(~touching & ~is_open & (area <= max_hole), np.uint32(FILLED), np.uint32(0))
    slot[0] = 0
    waits = nodes[~is_open[nodes] & (area[nodes] <= max_hole)]
    slot[waits] = FILLED + 1 + number[waits]
    return slot[labels], HoleRecord(
        area[nodes].astype(np.int64), is_open[nodes], *(number[edge] for edge in edges)
    )


def fill_holes(
    lattice: Lattice, record_of: Callable[[Region], HoleRecord], max_hole: int
) -> Iterator[Array]:
    """For each region in raster order, whether each slot is filled: (2 + T,) bool."""
    rows, columns = lattice.count
    area, is_open, pairs = [], [], [np.empty((0, 2), np.int64)]
    starts = [0]
    above = np.empty(0, np.int64)
    for row in range(rows):
        top_line, bottom_line = [], []
        right = np.empty(0, np.int64)
        for column in range(columns):
            record = record_of(lattice[row, column])
            start = starts[-1]
            top, left, bottom, next_right = (
                np.where(edge >= 0, edge.astype(np.int64) + start, -1)
                for edge in (record.top, record.left, record.bottom, record.right)
            )
            if column > 0:
                pairs.append(_meeting(right, left))
            right = next_right
            top_line.append(top)
            bottom_line.append(bottom)
            area.append(record.area)
            is_open.append(record.open)
            starts.append(start + len(record.area))
        if row > 0:  # whole lines, so that diagonals across the corners of four regions count
            pairs.append(_meeting(above, np.concatenate(top_line)))
        above = np.concatenate(bottom_line)
    areas, opens = np.concatenate(area), np.concatenate(is_open)
    one, other = np.concatenate(pairs).T
    groups, group = linked_groups(one, other, len(areas))
    total, outside = np.zeros(groups, np.int64), np.zeros(groups, bool)
    np.add.at(total, group, areas)
    outside[group[opens]] = True
    filled = (~outside & (total <= max_hole))[group]
    for start, end in pairwise(starts):
        yield np.concatenate([[False, True], filled[start:end]])


def _meeting(one: Array, other: Array) -> Array:
    """Different pairs of nodes that face each other across a seam, diagonals too: (P, 2) int64."""
    length = len(one)
    pairs = []
    for shift in (-1, 0, 1):
        first = one[max(0, -shift) : length - max(0, shift)]
        second = other[max(0, shift) : length - max(0, -shift)]
        both = (first >= 0) & (second >= 0)
        pairs.append(np.stack([first[both], second[both]], axis=1))
    return np.unique(np.concatenate(pairs), axis=0)
