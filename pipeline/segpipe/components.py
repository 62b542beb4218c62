"""Seeds of instances: components of threshold levels, exact wherever the image is cut.

Let M be the foreground {F >= f}. For thresholds t1 > ... > tk of the interior I, and last for M
itself, the 4-connected components of {I >= t} within M form a tree: level 0 is t1, level k is M.
A component becomes a seed when it has at least `min_area` pixels and contains no other seed.
Areas only grow downwards in the tree, so that is: it is large enough and none of its children is.

Cut anywhere, the same seeds come out, ids included:

    pass 1   per region   label_region: the tree of its own pixels (cc3d). What touches no seam is
                          decided here; the rest is a SeamRecord: nodes, and the nodes along the edges.
    reduce   one process  merge_seams: union-find over the nodes that meet across seams; areas add,
                          anchors take the minimum, "has a large child" is an or. These commute, so
                          neither the cuts nor their order can matter. Ids are the ranks of anchors.
    pass 2   per region   seeds are `ids[slots]`; growth.py does the rest.

After W. Silversmith's igneous (connected components in passes over blocks) and union-find of
R. Tarjan, with the tree over levels in place of one binary image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from numba import njit
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from segpipe.errors import SegpipeError, SettingsError
from segpipe.geometry import Lattice, Region

OUTSIDE = 255
"""Level of a pixel outside the foreground."""
MAX_ID = 2**32 - 2

Array = np.ndarray[Any, np.dtype[Any]]


def to_byte(probability: float) -> int:
    """Smallest quantised value (0..255) that is at least `probability`."""
    return math.ceil(probability * 255 - 1e-9)


@dataclass(frozen=True)
class Decode:
    """How probabilities become instances; thresholds are quantised values 0..255.

    foreground
        A pixel belongs to M when its foreground is at least this.
    interior
        t1 > ... > tk; may be empty: then the components of M are the seeds.
    min_area
        Pixels. A component of M smaller than this is no object.
    growth
        l1 > ... > lm = 0: levels of the interior that growth takes one after the other.
    growth_steps
        Steps at most at each level but the last, which goes on until nothing changes.
    """

    foreground: int
    interior: tuple[int, ...]
    min_area: int
    growth: tuple[int, ...]
    growth_steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.foreground <= 255:
            raise SettingsError(f"stitch.foreground quantises to {self.foreground}, not to 1..255")
        for name, levels in (("interior", self.interior), ("growth_levels", self.growth)):
            if list(levels) != sorted(set(levels), reverse=True) or not all(
                0 <= level <= 255 for level in levels
            ):
                raise SettingsError(f"stitch.{name} must fall strictly within 0..255: {levels}")
        if not self.growth or self.growth[-1] != 0:
            raise SettingsError(f"stitch.growth_levels must end with 0, got {self.growth}")
        if len(self.interior) > 200 or len(self.growth) > 200:
            raise SettingsError("stitch takes at most 200 interior thresholds or growth levels")
        if self.min_area < 1 or self.growth_steps < 1:
            raise SettingsError(
                f"stitch.min_area {self.min_area} and stitch.growth_steps {self.growth_steps} "
                "must be at least 1"
            )

    def seed_levels(self, foreground: Array, interior: Array) -> Array:
        """Level of the innermost component at each pixel: (Y, X) uint8 in 0..k, or OUTSIDE."""
        return _levels(foreground, interior, self.foreground, (*self.interior, 0))

    def growth_levels(self, foreground: Array, interior: Array) -> Array:
        """First growth level that may take each pixel: (Y, X) uint8 in 0..m-1, or OUTSIDE."""
        return _levels(foreground, interior, self.foreground, self.growth)


def _levels(
    foreground: Array, interior: Array, threshold: int, descending: tuple[int, ...]
) -> Array:
    table = np.zeros(256, np.uint8)
    for level, lowest in reversed(list(enumerate(descending))):
        table[lowest:] = level
    return np.where(foreground >= threshold, table[interior], np.uint8(OUTSIDE))


@dataclass(frozen=True)
class SeamRecord:
    """What the reduction must know of a region: the components that touch a seam.

    All arrays of nodes have one length T; a parent is the component one level lower that contains
    the node, and touches a seam too.
    """

    level: Array
    """(T,) uint8."""
    anchor: Array
    """(T,) int64: first pixel, y * image width + x."""
    area: Array
    """(T,) int64 pixels inside the region."""
    parent: Array
    """(T,) int32 node, -1 at the lowest level."""
    large_child: Array
    """(T,) bool: contains a component of at least min_area pixels at a higher level."""
    top: Array
    left: Array
    bottom: Array
    right: Array
    """int32: node of the innermost component at each pixel of the edge, -1 outside M; empty where
    the edge is the image's border."""


@dataclass(frozen=True)
class RegionComponents:
    """Result of pass 1 for one region.

    slots
        (h, w) uint32: 0 no seed; 1..n a seed decided here; n + 1 + t the seam node t.
    anchors
        (n,) int64, ascending: first pixels of the decided seeds.
    """

    slots: Array
    anchors: Array
    seams: SeamRecord


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _measure_components(labels: Array, count: int) -> tuple[Array, Array]:
    """First pixel (raster order within the region) and area of labels 1..count."""
    first = np.full(count, -1, np.int64)
    area = np.zeros(count, np.int64)
    flat = labels.ravel()
    for pixel in range(flat.size):
        label = flat[pixel]
        if label:
            if first[label - 1] < 0:
                first[label - 1] = pixel
            area[label - 1] += 1
    return first, area


def label_region(
    levels: Array, region: Region, lattice: Lattice, decode: Decode
) -> RegionComponents:
    """Components of one region: its decided seeds, and what depends on its neighbours.

    Parameters
    ----------
    levels
        `decode.seed_levels` of the region's pixels: (h, w) uint8.

    Notes
    -----
    A component that touches no seam is known whole, and so is everything inside it.
    """
    height, width = levels.shape
    image_width = lattice.shape[1]
    labels, first, area, offset = [], [], [], [0]
    for level in range(len(decode.interior) + 1):
        lab, count = cc3d.connected_components(
            levels <= level, connectivity=4, return_N=True, out_dtype=np.uint32
        )
        lab = lab.reshape(height, width)
        found = _measure_components(lab, count)
        labels.append(lab)
        first.append(found[0])
        area.append(found[1])
        offset.append(offset[-1] + count)
    total = offset[-1]
    node_level = np.repeat(np.arange(len(labels), dtype=np.uint8), np.diff(offset))
    node_area = np.concatenate(area)
    node_first = np.concatenate(first)
    parent = np.full(total, -1, np.int64)
    for level in range(len(labels) - 1):
        below = labels[level + 1].ravel()[first[level]].astype(np.int64)
        parent[offset[level] : offset[level + 1]] = offset[level + 1] + below - 1
    large = node_area >= decode.min_area
    large_child = np.zeros(total, bool)
    large_child[parent[large & (parent >= 0)]] = True

    innermost = _innermost(tuple(labels), levels, np.asarray(offset[:-1], np.int64))
    edges = _seam_edges(innermost, region, lattice)
    touching = np.zeros(total, bool)
    for edge in edges:
        touching[edge[edge >= 0]] = True
    for level in range(len(labels) - 1):  # what contains a touching node touches
        inside = np.flatnonzero(touching[offset[level] : offset[level + 1]]) + offset[level]
        touching[parent[inside]] = True
    nodes = np.flatnonzero(touching)
    number = np.full(total + 1, -1, np.int32)  # number[-1] serves parent -1
    number[nodes] = np.arange(len(nodes), dtype=np.int32)

    seeds = np.flatnonzero(~touching & large & ~large_child)
    anchor = (
        (region.box.y0 + node_first // width) * image_width + region.box.x0 + node_first % width
    )
    seeds = seeds[np.argsort(anchor[seeds])]
    slot = np.zeros(total + 1, np.uint32)
    slot[seeds] = np.arange(1, len(seeds) + 1, dtype=np.uint32)
    open_nodes = nodes[~large_child[nodes]]  # with a large child, it and its ancestors are no seeds
    slot[open_nodes] = len(seeds) + 1 + number[open_nodes]
    for level in reversed(range(len(labels) - 1)):  # a small inner component is part of its parent
        inner = np.arange(offset[level], offset[level + 1])
        inner = inner[~touching[inner] & ~large[inner]]
        slot[inner] = slot[parent[inner]]
    record = SeamRecord(
        node_level[nodes],
        anchor[nodes],
        node_area[nodes],
        number[parent[nodes]],
        large_child[nodes],
        *(number[edge] for edge in edges),
    )
    slots = np.where(innermost >= 0, slot[innermost], np.uint32(0))
    return RegionComponents(slots, anchor[seeds], record)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _innermost(labels: tuple[Array, ...], levels: Array, offset: Array) -> Array:
    """Node of the innermost component at each pixel: (h, w) int32, -1 outside the foreground."""
    nodes = np.full(levels.shape, -1, np.int32)
    for level in range(len(labels)):
        lab = labels[level]
        for y in range(levels.shape[0]):
            for x in range(levels.shape[1]):
                if levels[y, x] == level:
                    nodes[y, x] = offset[level] + lab[y, x] - 1
    return nodes


def _seam_edges(pixels: Array, region: Region, lattice: Lattice) -> tuple[Array, ...]:
    """Values along the top, left, bottom and right edges; empty where the image ends."""
    box, (height, width) = region.box, lattice.shape
    none = np.empty(0, pixels.dtype)
    return (
        pixels[0] if box.y0 > 0 else none,
        pixels[:, 0] if box.x0 > 0 else none,
        pixels[-1] if box.y1 < height else none,
        pixels[:, -1] if box.x1 < width else none,
    )


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
    joined = coo_array((np.ones(len(one), bool), (one, other)), shape=(count, count))
    groups, group = connected_components(joined, directed=False)
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
