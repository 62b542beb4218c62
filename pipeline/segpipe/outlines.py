"""Outlines: the boundaries of objects along the edges of their pixels, region by region.

A region follows the boundaries that its own pixels have. A boundary that goes on in a pixel of another
region is an open chain, which begins where the chain of a neighbour ends; `segpipe.polygons` joins them.

    corners are whole numbers: pixel (y, x)        0   1   2
    lies between corners y, x and y + 1, x + 1     0 +---+---+      object on the right of the way:
                                                     | # | # |      clockwise as seen on the screen,
                                                   1 +---+---+      holes the other way round
                                                     | # |
                                                   2 +---+          (0,0) (0,2) (1,2) (1,1) (2,1) (2,0)

Pixels of an object that touch at a corner only do not hang together (labels are 4-connected), so where
two meet the way stays with its pixel. A way that comes by a corner twice is later cut there in two, by
which a hole that touches the outline at a corner becomes a ring of its own.

What comes next at a corner follows from its four pixels, so a region read with a margin of one pixel
knows its part exactly, whatever the regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from segpipe.geometry import Box

Array = np.ndarray[Any, np.dtype[Any]]

OPEN, CLOSED, PINCHED = 0, 1, 2
"""A chain; a ring; a ring that may come by a corner twice."""
# Headings are E, S, W, N: one more is a turn to the right. Of each: the step of a corner, and the
# pixels ahead on the left and on the right of it, seen from a corner (the pixel (y, x) is south-east).
_STEP_Y, _STEP_X = np.array([0, 1, 0, -1]), np.array([1, 0, -1, 0])
_LEFT_Y, _LEFT_X = np.array([-1, 0, 0, -1]), np.array([0, 0, -1, -1])
_RIGHT_Y, _RIGHT_X = np.array([0, 0, -1, -1]), np.array([0, -1, -1, 0])


@dataclass(frozen=True)
class Pieces:
    """Rings and chains of a region, or of several, by id.

    ids
        (n,) int64, ascending.
    kinds
        (n,) uint8: OPEN, CLOSED or PINCHED.
    ends
        (n + 1,) int64: the corners of piece k are ends[k] to ends[k + 1]; a ring's first is not
        repeated.
    corners
        (V, 2) integers (y, x) of the image. Only where the way turns, but for both ends of a chain.
    """

    ids: Array
    kinds: Array
    ends: Array
    corners: Array

    def __len__(self) -> int:
        return len(self.ids)

    def between(self, first: int, end: int) -> Pieces:
        """Those of ids in [first, end)."""
        start, stop = np.searchsorted(self.ids, [first, end])
        ends = self.ends[start : stop + 1]
        return Pieces(
            self.ids[start:stop],
            self.kinds[start:stop],
            ends - ends[0],
            self.corners[ends[0] : ends[-1]],
        )

    def pack(self, box: Box) -> dict[str, Array]:
        """Arrays to keep, seen from the corner of the region, which makes them small."""
        narrow = np.uint16 if max(box.shape) <= np.iinfo(np.uint16).max else np.uint32
        corners = (self.corners - np.array([box.y0, box.x0])).astype(narrow)
        lengths = np.diff(self.ends).astype(np.uint32)
        return {
            "ids": self.ids.astype(np.uint32),
            "kinds": self.kinds,
            "lengths": lengths,
            "corners": corners,
        }

    @classmethod
    def unpack(cls, arrays: dict[str, Array], box: Box) -> Pieces:
        """The pieces that `pack` made these arrays of."""
        ends = np.concatenate([[0], np.cumsum(arrays["lengths"], dtype=np.int64)])
        corners = arrays["corners"].reshape(-1, 2).astype(np.int64) + np.array([box.y0, box.x0])
        return cls(arrays["ids"].astype(np.int64), arrays["kinds"], ends, corners)


def join_pieces(parts: Sequence[Pieces]) -> Pieces:
    """All pieces of several regions, by id."""
    ids = np.concatenate([np.zeros(0, np.int64), *(one.ids for one in parts)])
    kinds = np.concatenate([np.zeros(0, np.uint8), *(one.kinds for one in parts)])
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(one.ends) for one in parts)])
    corners = np.concatenate([np.zeros((0, 2), np.int64), *(one.corners for one in parts)])
    order = np.argsort(ids, kind="stable")
    starts = (np.cumsum(lengths) - lengths)[order]
    ends = np.concatenate([[0], np.cumsum(lengths[order])])
    places = np.repeat(starts - ends[:-1], lengths[order]) + np.arange(ends[-1])
    return Pieces(ids[order], kinds[order], ends, corners[places])


def trace_region(labels: Array, box: Box) -> Pieces:
    """What the pixels of one region have of the outlines of their objects.

    Parameters
    ----------
    labels
        (h + 2, w + 2) uint32: the region with one pixel more on every side, 0 beyond the image.
    box
        The region in the image, without the margin.
    """
    height, width = box.shape
    if labels.shape != (height + 2, width + 2):
        raise ValueError(f"labels {labels.shape} are not region {box} with a margin of one pixel")
    ids, kinds, ends, corners = _trace(np.ascontiguousarray(labels))
    found = Pieces(ids, kinds, ends, corners + np.array([box.y0, box.x0]))
    return join_pieces([found])


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _trace(labels: Array) -> tuple[Array, Array, Array, Array]:
    """Chains, then rings, with corners seen from the region's; in no order of ids."""
    height, width = labels.shape[0] - 2, labels.shape[1] - 2
    seen = np.zeros((height, width), np.uint8)
    ids, kinds = np.empty(64, np.int64), np.empty(64, np.uint8)
    ends, corners = np.zeros(65, np.int64), np.empty((1024, 2), np.int64)
    count = used = 0
    for chains in (True, False):
        for y in range(height):
            edge_row = y == 0 or y == height - 1
            x = 0
            while x < width:
                label = labels[y + 1, x + 1]
                if label != 0:
                    # A ring has a top edge at its first pixel; a chain may begin with any edge.
                    for heading in range(4 if chains else 1):
                        if seen[y, x] >> heading & 1:
                            continue
                        # the corner at which the edge of this heading begins
                        at_y = y + (1 if heading in (2, 3) else 0)
                        at_x = x + (1 if heading in (1, 2) else 0)
                        if (
                            labels[at_y + 1 + _LEFT_Y[heading], at_x + 1 + _LEFT_X[heading]]
                            == label
                        ):
                            continue  # the object goes on across it
                        if chains:
                            back = (heading + 2) % 4  # what is behind on the right, ahead backwards
                            right_y, right_x = at_y + _LEFT_Y[back], at_x + _LEFT_X[back]
                            left_y, left_x = at_y + _RIGHT_Y[back], at_x + _RIGHT_X[back]
                            if labels[right_y + 1, right_x + 1] != label:
                                continue  # it comes from an edge of this pixel
                            if labels[left_y + 1, left_x + 1] == label:
                                from_y, from_x = left_y, left_x
                            else:
                                from_y, from_x = right_y, right_x
                            if 0 <= from_y < height and 0 <= from_x < width:
                                continue
                        if count + 1 >= ids.size:
                            ids = np.concatenate((ids, np.empty_like(ids)))
                            kinds = np.concatenate((kinds, np.empty_like(kinds)))
                            ends = np.concatenate((ends, np.empty_like(ends)))
                        used, corners, kind = _follow(
                            labels, seen, at_y, at_x, y, x, heading, corners, used
                        )
                        ids[count], kinds[count] = label, kind
                        count += 1
                        ends[count] = used
                # Only pixels at the region's rim have neighbours elsewhere.
                x = width - 1 if chains and not edge_row and 0 == x < width - 1 else x + 1
    return ids[:count].copy(), kinds[:count].copy(), ends[: count + 1].copy(), corners[:used].copy()


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _follow(
    labels: Array,
    seen: Array,
    at_y: int,
    at_x: int,
    y: int,
    x: int,
    heading: int,
    corners: Array,
    used: int,
) -> tuple[int, Array, int]:
    """Follow a boundary from the edge of pixel (y, x) with this heading; marks edges in `seen`.

    Returns how many corners there are now, the corners, and the kind of piece.
    """
    height, width = seen.shape
    label = labels[y + 1, x + 1]
    pinches = 0
    turned = True
    while True:
        if turned:
            if used + 1 >= corners.shape[0]:
                corners = np.concatenate((corners, np.empty_like(corners)))
            corners[used, 0], corners[used, 1] = at_y, at_x
            used += 1
        seen[y, x] |= 1 << heading
        at_y += _STEP_Y[heading]
        at_x += _STEP_X[heading]
        left_y, left_x = at_y + _LEFT_Y[heading], at_x + _LEFT_X[heading]
        right_y, right_x = at_y + _RIGHT_Y[heading], at_x + _RIGHT_X[heading]
        ahead_left = labels[left_y + 1, left_x + 1] == label
        turned = True
        if labels[right_y + 1, right_x + 1] != label:
            pinches += ahead_left
            heading = (heading + 1) % 4
        elif ahead_left:
            heading = (heading + 3) % 4
            y, x = left_y, left_x
        else:
            turned = False
            y, x = right_y, right_x
        if not (0 <= y < height and 0 <= x < width):
            corners[used, 0], corners[used, 1] = at_y, at_x
            return used + 1, corners, OPEN
        if seen[y, x] >> heading & 1:
            return used, corners, PINCHED if pinches > 1 else CLOSED
