"""Seams: components of neighbouring regions become one, and seeds get their ids.

The reduction between the two passes over regions; see components.py for the whole. Union-find over
the nodes that meet across seams: areas add, anchors take the minimum, "has a large child" is an or.
These commute, so neither the cuts nor their order can matter. Ids are the ranks of anchors.

After R. Tarjan's union-find, by way of connected components of a sparse graph (`segpipe.linked`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe.components import Decode, SeamRecord
from segpipe.errors import SegpipeError
from segpipe.geometry import Lattice, Region
from segpipe.linked import linked_groups

Array = np.ndarray[Any, np.dtype[Any]]
MAX_ID = 2**32 - 2


@dataclass(frozen=True)
class Band:
    """Ids of one row of regions.

    ids
        For each region of the row, (n + 1 + T,) uint32: the id of each slot, 0 for none.
    first_id, last_id
        The ids whose anchors lie in this row are first_id..last_id.
    """

    row: int
    ids: list[Array]
    first_id: int
    last_id: int


def merge_seams(
    lattice: Lattice,
    seams_of: Callable[[Region], SeamRecord],
    anchors_of: Callable[[Region], Array],
    decode: Decode,
) -> Iterator[Band]:
    """Ids of all slots, row of regions by row, in raster order.

    Memory grows with the number of components that touch a seam, and with the objects of one row.

    Parameters
    ----------
    seams_of, anchors_of
        Read what `label_region` returned for a region. Called once for each region, all seams
        first.

    Raises
    ------
    SegpipeError
        When there are more objects than uint32 can number.
    """
    nodes, pairs, starts = _gather(lattice, seams_of)
    anchor, is_seed, seed_of = _decide(nodes, pairs, decode)
    del pairs
    seam_seeds = np.flatnonzero(is_seed)
    seam_seeds = seam_seeds[np.argsort(anchor[seam_seeds])]
    seam_anchors = anchor[seam_seeds]
    id_of = np.zeros(len(anchor) + 1, np.uint32)  # the last one serves seed_of == -1
    rows, columns = lattice.count
    total = 0
    for row in range(rows):
        regions = [lattice[row, column] for column in range(columns)]
        lowest, highest = (
            np.searchsorted(seam_anchors, y * lattice.shape[1])
            for y in (regions[0].box.y0, regions[0].box.y1)
        )
        decided = [anchors_of(region) for region in regions]
        ranked = np.sort(np.concatenate([*decided, seam_anchors[lowest:highest]]))
        if total + len(ranked) > MAX_ID:
            raise SegpipeError(f"more than {MAX_ID} objects: ids would not fit uint32")
        id_of[seam_seeds[lowest:highest]] = (
            total + 1 + np.searchsorted(ranked, seam_anchors[lowest:highest])
        )
        ids = []
        for region, own in zip(regions, decided, strict=True):
            index = region.index[0] * columns + region.index[1]
            seam = slice(starts[index], starts[index + 1])
            ids.append(
                np.concatenate(
                    [
                        np.zeros(1, np.uint32),
                        (total + 1 + np.searchsorted(ranked, own)).astype(np.uint32),
                        id_of[seed_of[seam]],
                    ]
                )
            )
        yield Band(row, ids, total + 1, total + len(ranked))
        total += len(ranked)


@dataclass(frozen=True)
class _Nodes:
    """The seam nodes of all regions, one after the other."""

    level: Array
    anchor: Array
    area: Array
    parent: Array
    large_child: Array


def _gather(
    lattice: Lattice, seams_of: Callable[[Region], SeamRecord]
) -> tuple[_Nodes, Array, Array]:
    """All seam nodes; the pairs of nodes that meet across a seam, (P, 2); first node per region."""
    records: list[SeamRecord] = []
    starts = [0]
    pairs = [np.empty((0, 2), np.int64)]
    above: dict[int, Array] = {}
    for region in lattice:
        row, column = region.index
        record = seams_of(region)
        if column == 0:
            right = np.empty(0, np.int64)
            below, above = above, {}
        start = starts[-1]
        top, left, bottom, next_right = (
            np.where(edge >= 0, edge.astype(np.int64) + start, -1)
            for edge in (record.top, record.left, record.bottom, record.right)
        )
        if column > 0:
            pairs.append(_meeting(right, left))
        if row > 0:
            pairs.append(_meeting(below[column], top))
        right, above[column] = next_right, bottom
        starts.append(start + len(record.level))
        empty = np.empty(0, np.int32)
        records.append(
            SeamRecord(
                record.level,
                record.anchor,
                record.area,
                np.where(record.parent >= 0, record.parent.astype(np.int64) + start, -1),
                record.large_child,
                *[empty] * 4,
            )
        )
    nodes = _Nodes(
        *(
            np.concatenate([getattr(record, name) for record in records])
            for name in ("level", "anchor", "area", "parent", "large_child")
        )
    )
    return nodes, np.concatenate(pairs), np.asarray(starts)


def _meeting(one: Array, other: Array) -> Array:
    """Different pairs of nodes that face each other across a seam: (P, 2) int64."""
    both = (one >= 0) & (other >= 0)
    return np.unique(np.stack([one[both], other[both]], axis=1), axis=0)


def _decide(nodes: _Nodes, pairs: Array, decode: Decode) -> tuple[Array, Array, Array]:
    """Join what meets, and choose the seeds.

    Returns
    -------
    anchor, is_seed, seed_of
        Per joined component its anchor and whether it is a seed; per node the component that is the
        seed at this node or that contains it, or -1.
    """
    count = len(nodes.level)
    one, other = pairs[:, 0], pairs[:, 1]
    while True:  # at which level do they meet? The lower one of the two
        high = nodes.level[one] < nodes.level[other]
        low = nodes.level[one] > nodes.level[other]
        if not (high.any() or low.any()):
            break
        one = np.where(high, nodes.parent[one], one)
        other = np.where(low, nodes.parent[other], other)
    ones, others = [one], [other]
    for _ in decode.interior:  # and what contains them meets there too
        inside = nodes.parent[ones[-1]] >= 0
        up = np.unique(
            np.stack([nodes.parent[ones[-1][inside]], nodes.parent[others[-1][inside]]]), axis=1
        )
        ones.append(up[0])
        others.append(up[1])
    one, other = np.concatenate(ones), np.concatenate(others)
    groups, group = linked_groups(one, other, count)
    anchor = np.full(groups, np.iinfo(np.int64).max)
    np.minimum.at(anchor, group, nodes.anchor)
    area = np.zeros(groups, np.int64)
    np.add.at(area, group, nodes.area)
    large = area >= decode.min_area
    large_child = np.zeros(groups, bool)
    large_child[group[nodes.large_child]] = True
    has_parent = (nodes.parent >= 0) & large[group]
    large_child[group[nodes.parent[has_parent]]] = True
    is_seed = large & ~large_child
    seed_of = np.where(is_seed[group], group, -1)
    for level in reversed(range(len(decode.interior))):
        rest = np.flatnonzero((nodes.level == level) & (seed_of < 0))
        seed_of[rest] = seed_of[nodes.parent[rest]]
    return anchor, is_seed, seed_of
