"""Seeds of instances: components of threshold levels, exact wherever the image is cut.

Let M be the foreground {F >= f}. For thresholds t1 > ... > tk of the interior I, and last for M
itself, the 4-connected components of {I >= t} within M form a tree: level 0 is t1, level k is M.
A component becomes a seed when it has at least `min_area` pixels and contains no other seed.
Areas only grow downwards in the tree, so that is: it is large enough and none of its children is.

Cut anywhere, the same seeds come out, ids included:

    pass 1   per region   label_region: the tree of its own runs. What touches no seam is decided
                          here; the rest is a SeamRecord: nodes, and the nodes along the edges.
    reduce   one process  seams.py: what meets across seams becomes one; ids are the ranks of anchors.
    pass 2   per region   seeds are `ids[runs.slot]`; growth.py does the rest.

After W. Silversmith's igneous (connected components in passes over blocks) and union-find of
R. Tarjan, with the tree over levels in place of one binary image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe.errors import SettingsError
from segpipe.geometry import Lattice, Region
from segpipe.runs import Runs, find_runs, join_runs

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
            raise SettingsError("stitch.foreground is too small; 0.002 is the least")
        for name, levels in (("interior", self.interior), ("growth_levels", self.growth)):
            if list(levels) != sorted(set(levels), reverse=True) or not all(
                0 <= level <= 255 for level in levels
            ):
                shares = [round(level / 255, 2) for level in levels]
                raise SettingsError(
                    f"stitch.{name} is {shares}; it must fall, from 1 to 0, such as [0.7, 0.3, 0]"
                )
        if not self.growth or self.growth[-1] != 0:
            raise SettingsError(f"stitch.growth_levels must end with 0, got {self.growth}")
        if len(self.interior) + len(self.growth) > 200:
            raise SettingsError("stitch takes at most 200 interior thresholds and growth levels")
        if self.min_area < 1 or self.growth_steps < 1:
            raise SettingsError(
                f"stitch.min_area {self.min_area} and stitch.growth_steps {self.growth_steps} "
                "must be at least 1"
            )

    def classes(self) -> tuple[Array, Array, Array]:
        """Values of the interior that neither seeds nor growth tell apart are one class.

        Returns
        -------
        of_value, seed_level, growth_level
            (256,) uint8: the class of each value. Per class, uint8: the level 0..k of the innermost
            component at its pixels, and the first level 0..m-1 of growth that may take them.
        """
        seed_level, growth_level = (
            np.searchsorted(-np.array(falling), -np.arange(256))
            for falling in ((*self.interior, 0), self.growth)
        )
        pairs, of_value = np.unique(
            np.stack([seed_level, growth_level]).astype(np.uint8), axis=1, return_inverse=True
        )
        return of_value.astype(np.uint8), pairs[0], pairs[1]


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

    runs
        Its foreground; the slots say what of the rest each pixel belongs to.
    anchors
        (n,) int64, ascending: first pixels of the decided seeds.
    """

    runs: Runs
    anchors: Array
    seams: SeamRecord


def label_region(
    foreground: Array, interior: Array, region: Region, lattice: Lattice, decode: Decode
) -> RegionComponents:
    """Components of one region: its decided seeds, and what depends on its neighbours.

    Parameters
    ----------
    foreground, interior
        The region's pixels: (h, w) uint8.

    Notes
    -----
    A component that touches no seam is known whole, and so is everything inside it.
    """
    width, image_width = foreground.shape[1], lattice.shape[1]
    of_value, seed_level, growth_level = decode.classes()
    starts, x0, x1, found = find_runs(foreground, interior, decode.foreground, of_value)
    level = seed_level[found]
    levels = range(len(decode.interior) + 1)
    parts = [join_runs(starts, x0, x1, level, highest, width) for highest in levels]
    offset = np.cumsum([0, *(len(area) for _, area, _, _ in parts)])
    total = offset[-1]
    node_level = np.repeat(np.arange(len(parts), dtype=np.uint8), np.diff(offset))
    node_area = np.concatenate([area for _, area, _, _ in parts])
    node_first = np.concatenate([first for _, _, first, _ in parts])
    parent = np.full(total, -1, np.int64)
    for higher in levels[:-1]:
        below = parts[higher + 1][0][parts[higher][3]]  # what holds its first pixel
        parent[offset[higher] : offset[higher + 1]] = offset[higher + 1] + below
    large = node_area >= decode.min_area
    large_child = np.zeros(total, bool)
    large_child[parent[large & (parent >= 0)]] = True

    innermost = np.empty(len(x0), np.int64)
    for own in levels:
        inside = level == own
        innermost[inside] = offset[own] + parts[own][0][inside]
    edges = _seam_edges(starts, x0, x1, innermost, region, lattice)
    touching = np.zeros(total, bool)
    for edge in edges:
        touching[edge[edge >= 0]] = True
    for higher in levels[:-1]:  # what contains a touching node touches
        inner = np.flatnonzero(touching[offset[higher] : offset[higher + 1]]) + offset[higher]
        touching[parent[inner]] = True
    nodes = np.flatnonzero(touching)
    number = np.full(total + 1, -1, np.int32)  # number[-1] serves parent -1
    number[nodes] = np.arange(len(nodes), dtype=np.int32)

    seeds = np.flatnonzero(~touching & large & ~large_child)
    anchor = (
        (region.box.y0 + node_first // width) * image_width + region.box.x0 + node_first % width
    )
    seeds = seeds[np.argsort(anchor[seeds])]
    slot = np.zeros(total, np.uint32)
    slot[seeds] = np.arange(1, len(seeds) + 1, dtype=np.uint32)
    open_nodes = nodes[~large_child[nodes]]  # with a large child, it and its ancestors are no seeds
    slot[open_nodes] = len(seeds) + 1 + number[open_nodes]
    for higher in reversed(levels[:-1]):  # a small inner component is part of its parent
        inner = np.arange(offset[higher], offset[higher + 1])
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
    runs = Runs(starts, x0, x1, growth_level[found], slot[innermost])
    return RegionComponents(runs, anchor[seeds], record)


def _seam_edges(
    starts: Array, x0: Array, x1: Array, node: Array, region: Region, lattice: Lattice
) -> tuple[Array, ...]:
    """Nodes along the top, left, bottom and right edges, -1 outside; empty where the image ends."""
    box, (rows, columns) = region.box, lattice.shape
    height, width = box.shape
    none = np.empty(0, np.int64)

    def along(y: int) -> Array:
        own = slice(starts[y], starts[y + 1])
        line = np.full(width, -1, np.int64)
        lengths = x1[own].astype(np.int64) - x0[own]
        ends = np.cumsum(lengths)
        within = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
        line[np.repeat(x0[own], lengths) + within] = np.repeat(node[own], lengths)
        return line

    def at_end(run: Array, here: Array) -> Array:
        side = np.full(height, -1, np.int64)
        row = np.flatnonzero(starts[:-1] < starts[1:])
        row = row[here[run[row]]]
        side[row] = node[run[row]]
        return side

    return (
        along(0) if box.y0 > 0 else none,
        at_end(starts[:-1], x0 == 0) if box.x0 > 0 else none,
        along(height - 1) if box.y1 < rows else none,
        at_end(starts[1:] - 1, x1 == width) if box.x1 < columns else none,
    )
