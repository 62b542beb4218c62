"""Seeds of instances: components of threshold levels, exact wherever the image is cut.

Let M be the foreground {F >= f}. For thresholds t1 > ... > tk of the interior I, and last for M
itself, the 4-connected components of {I >= t} within M form a tree: level 0 is t1, level k is M.
A component becomes a seed when it has at least `min_area` pixels and contains no other seed.
Areas only grow downwards in the tree, so that is: it is large enough and none of its children is.

Cut anywhere, the same seeds come out, ids included:

    pass 1   per region   label_region: the tree of its own pixels (cc3d). What touches no seam is
                          decided here; the rest is a SeamRecord: nodes, and the nodes along the edges.
    reduce   one process  seams.py: what meets across seams becomes one; ids are the ranks of anchors.
    pass 2   per region   seeds are `ids[slots]`; growth.py does the rest.

After W. Silversmith's igneous (connected components in passes over blocks) and union-find of
R. Tarjan, with the tree over levels in place of one binary image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np
from numba import njit

from segpipe.errors import SettingsError
from segpipe.geometry import Lattice, Region

OUTSIDE = 255
"""Level of a pixel outside the foreground."""

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
