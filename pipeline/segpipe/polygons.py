"""Polygons of objects from the pieces of outline that regions gave.

Chains are joined to rings; a ring that comes by a corner twice is cut there; each ring begins at its
first corner in raster order, and rings have one order. So the polygons are the same, to the last
corner, for any regions. Every polygon is valid by the rules of the Open Geospatial Consortium: rings
do not cross, touch in single corners only, and leave the inside in one piece.

Nearly all objects have one ring; the others are few, and Python has time for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from segpipe.outlines import CLOSED, OPEN, Pieces, join_pieces

Array = np.ndarray[Any, np.dtype[Any]]
MOST = 2**12
"""Objects whose polygons are made at once."""


@dataclass(frozen=True)
class Polygons:
    """Polygons of objects, by id: an object has parts, a part has an outline and holes.

    ids
        (n,) int64, ascending.
    parts
        (n + 1,) int64: object k has parts parts[k] to parts[k + 1]: one, as labels hang together,
        unless they were not made by us or a region of them is lacking.
    rings
        (P + 1,) int64: the rings of each part; the first is the outline, the others are its holes.
    ends
        (R + 1,) int64: the corners of each ring; the first is not repeated.
    corners
        (V, 2) int64 (y, x): pixel (y, x) lies between corners y, x and y + 1, x + 1. With x to the
        right and y upwards outlines run counter-clockwise, holes clockwise, as file formats demand.
    """

    ids: Array
    parts: Array
    rings: Array
    ends: Array
    corners: Array

    def __len__(self) -> int:
        return len(self.ids)

    def corners_at(self, scale: float, shape: tuple[int, int] | None) -> Array:
        """Corners in an image of so many pixels for each of the labels: (V, 2) float64, within its
        `shape` (Y, X), beyond which the last pixels of the labels may reach."""
        corners = self.corners * scale
        return corners if shape is None else np.minimum(corners, shape)


def bands_of_polygons(
    first_ids: Sequence[int],
    pieces_of_band: Sequence[Callable[[], Iterable[Pieces]]],
    most: int = MOST,
) -> Iterator[Polygons]:
    """Polygons of all objects, ids ascending, so many at once.

    Parameters
    ----------
    first_ids
        The first id that is anchored in each band of regions, and one more than the last id of all.
    pieces_of_band
        Callables, one per band, that give the pieces of each of its regions; each is called twice.

    Notes
    -----
    As `bands.Bands`: memory grows with the pieces of one band, and of those objects that
    cross from one band to another.
    """
    strays: list[Pieces] = []
    for first, end, pieces_of in zip(first_ids[:-1], first_ids[1:], pieces_of_band, strict=True):
        for pieces in pieces_of():
            for stray in (pieces.between(0, first), pieces.between(end, 2**62)):
                if len(stray):
                    strays.append(join_pieces([stray]))  # a copy: the rest of the region goes
    crossing = join_pieces(strays)
    del strays
    for band, pieces_of in enumerate(pieces_of_band):
        first, end = first_ids[band : band + 2]
        inside = [pieces.between(first, end) for pieces in pieces_of()] if end > first else []
        for start in range(first, end, most):
            stop = min(start + most, end)
            chosen = [one.between(start, stop) for one in (*inside, crossing)]
            yield polygons_of(join_pieces([one for one in chosen if len(one)]))


def polygons_of(pieces: Pieces) -> Polygons:
    """The polygons of all objects in `pieces`, which must be all that there is of them.

    Raises
    ------
    ValueError
        When a chain has no other that goes on where it ends: a region is lacking.
    """
    ids, ends, corners = _rings(pieces)
    _start_at_first(ends, corners)
    hole = _areas(ends, corners) < 0
    starts = corners[ends[:-1]] if len(ids) else np.zeros((0, 2), np.int64)
    order = np.lexsort((starts[:, 1], starts[:, 0], hole, ids))
    ids, hole = ids[order], hole[order]
    objects = np.unique(ids)
    outlines = np.bincount(np.searchsorted(objects, ids[~hole]), minlength=len(objects))
    if (outlines > 1).any():
        order = _apart(order, ids, hole, objects[outlines > 1], ends, corners)
    hole = _areas(ends, corners)[order] < 0
    lengths = np.diff(ends)[order]
    moved = np.concatenate([[0], np.cumsum(lengths)])
    places = np.repeat(ends[:-1][order] - moved[:-1], lengths) + np.arange(moved[-1])
    return Polygons(
        objects,
        np.concatenate([[0], np.cumsum(outlines)]).astype(np.int64),
        np.append(np.flatnonzero(~hole), len(order)).astype(np.int64),
        moved,
        corners[places],
    )


def _rings(pieces: Pieces) -> tuple[Array, Array, Array]:
    """Rings that come by no corner twice: ids, ends and corners as in `Pieces`, in no order."""
    plain = pieces.kinds == CLOSED
    if plain.all():
        return pieces.ids, pieces.ends, pieces.corners.copy()
    ids: list[int] = []
    rings: list[Array] = []
    open_of: dict[int, list[Array]] = {}
    for place in np.flatnonzero(~plain):
        one = int(pieces.ids[place])
        corners = pieces.corners[pieces.ends[place] : pieces.ends[place + 1]]
        if pieces.kinds[place] == OPEN:
            open_of.setdefault(one, []).append(corners)
        else:
            found = _cut(corners)
            ids += [one] * len(found)
            rings += found
    for one, chains in open_of.items():
        for ring in _join(chains, one):
            found = _cut(ring)
            ids += [one] * len(found)
            rings += found
    lengths = np.diff(pieces.ends)
    kept = pieces.corners[np.repeat(plain, lengths)]
    ends = np.concatenate([[0], lengths[plain], [len(ring) for ring in rings]]).cumsum()
    return (
        np.concatenate([pieces.ids[plain], ids]).astype(np.int64),
        ends,
        np.concatenate([kept, *rings]),
    )


def _join(chains: Sequence[Array], one: int) -> Iterator[Array]:
    """Rings of the chains of one object."""
    # One at most begins at a corner: where two ways pass, each goes on in its own pixel and region.
    beginning = {tuple(chain[0].tolist()): number for number, chain in enumerate(chains)}
    used = [False] * len(chains)
    for first in range(len(chains)):
        if used[first]:
            continue
        taken, number = [], first
        while not used[number]:
            used[number] = True
            taken.append(chains[number][:-1])
            end = chains[number][-1].tolist()
            if tuple(end) not in beginning:
                raise ValueError(f"the outline of object {one} is not closed at {end}")
            number = beginning[tuple(end)]
        if number != first:
            raise ValueError(
                f"the outline of object {one} does not come back to {chains[first][0]}"
            )
        ring = np.concatenate(taken)
        yield ring[_turns(ring)]


def _turns(ring: Array) -> Array:
    """At which corners of a ring the way turns: (V,) bool."""
    before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
    turns: Array = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    return turns


def _cut(ring: Array) -> list[Array]:
    """A ring as rings that come by no corner twice."""
    _, place, count = np.unique(ring, axis=0, return_inverse=True, return_counts=True)
    if count.max() == 1:
        return [ring]
    place = place.ravel()
    rings: list[Array] = []
    way: list[int] = []
    at: dict[int, int] = {}
    for number, corner in enumerate(place.tolist()):
        if corner in at:
            since = at[corner]
            rings.append(ring[way[since:]])
            for gone in way[since + 1 :]:
                del at[int(place[gone])]
            del way[since + 1 :]
        else:
            at[corner] = len(way)
            way.append(number)
    return [*rings, ring[way]]


def _apart(
    order: Array, ids: Array, hole: Array, several: Array, ends: Array, corners: Array
) -> Array:
    """The order of rings with each hole behind the outline that it is in, for objects of several.

    Parameters
    ----------
    order, ids, hole
        (R,): rings by id, outlines before holes; id and kind of each.
    several
        (n,): ids of objects of several outlines.
    """
    areas = _areas(ends, corners)
    low = np.minimum.reduceat(corners, ends[:-1])
    high = np.maximum.reduceat(corners, ends[:-1])
    moved = order.copy()
    for one in several:
        first, end = np.searchsorted(ids, [one, one + 1])
        rings = order[first:end]
        outlines = rings[~hole[first:end]]
        inside: dict[int, list[int]] = {int(ring): [int(ring)] for ring in outlines}
        for ring in rings[hole[first:end]]:
            # A hole goes down from its first corner, and the pixel to the west of that is the object's.
            point = corners[ends[ring]] + np.array([0.5, -0.5])
            near = outlines[((low[outlines] < point) & (high[outlines] > point)).all(axis=1)]
            around = [
                int(outline)
                for outline in near
                if _holds(corners[ends[outline] : ends[outline + 1]], point[0], point[1])
            ]
            inside[min(around, key=lambda outline: int(areas[outline]))].append(int(ring))
        moved[first:end] = [ring for rings_of in inside.values() for ring in rings_of]
    return moved


def _holds(ring: Array, y: float, x: float) -> bool:
    """Whether a point that is on no line of corners is inside a ring."""
    upright = ring[:, 1] == np.roll(ring[:, 1], -1)
    ys, following = ring[upright, 0], np.roll(ring[:, 0], -1)[upright]
    crossed = (np.minimum(ys, following) < y) & (np.maximum(ys, following) > y)
    return bool((crossed & (ring[upright, 1] > x)).sum() % 2)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _areas(ends: Array, corners: Array) -> Array:
    """Pixels inside of each ring, below 0 for holes: (R,) int64."""
    areas = np.zeros(ends.size - 1, np.int64)
    for ring in range(ends.size - 1):
        last = ends[ring + 1] - 1
        for place in range(ends[ring], ends[ring + 1]):
            areas[ring] += (corners[last, 1] - corners[place, 1]) * corners[place, 0]
            last = place
    return areas


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _start_at_first(ends: Array, corners: Array) -> None:
    """Have each ring begin at its first corner in raster order; modifies `corners`."""
    for ring in range(ends.size - 1):
        begin, end = ends[ring], ends[ring + 1]
        first = begin
        for place in range(begin + 1, end):
            if corners[place, 0] < corners[first, 0] or (
                corners[place, 0] == corners[first, 0] and corners[place, 1] < corners[first, 1]
            ):
                first = place
        if first > begin:
            turned = np.concatenate((corners[first:end], corners[begin:first]))
            corners[begin:end] = turned
