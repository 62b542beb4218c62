"""What tells whether seams show: sums over the lines where an image was cut, and over those beside them.

    edges, contacts    pixels of a line on which a label ends: beside background, beside another
                       object. Objects that a seam cuts end on its line; neighbours that it fused
                       no longer do. Compared with parallel lines in the same piece of the image.
    density, size      objects whose centroid is beside a seam: halves are more and smaller, lost
                       ones fewer, fused ones fewer and larger. Compared with strips further away.

                 seam line (cores, or regions)         y = k * cell
        ---------+---------+--------   offset -1, 0, +1: a line that was erased leaves two edges
                 |  piece  |           of at most PIECE pixels of the line
        - - - - -|- - - - -|- - - -    the same lattice shifted by step, 2 step, ...
        - - - - -|- - - - -|- - - -

Shifts are whole multiples of `step`, itself one of the network's stride and of a JPEG block: both
leave edges at preferred phases that have nothing to do with tiling. All sums are additive over regions,
and the memory is that of one cell's sides. `segpipe.seam_check` draws the conclusion.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from segpipe.geometry import Box

Array = np.ndarray[Any, np.dtype[Any]]

MARGIN = 2
"""Pixels above and left of a region that its sums look at."""
SHIFTS = 16
"""Parallel lines at most that a seam is compared with."""
LEAST_SHIFTS = 4
"""Parallel lines at least, in a piece that counts."""
PIECE = 256
"""Pixels of a line at most whose objects are taken for independent of those of the next piece."""
BLOCK = 16
"""Pixels a side of the largest squares that image compression may show."""
KINDS = ("edges above", "edges", "edges below", "contacts")
_OFFSETS = (-1, 0, 1, 0)


@dataclass(frozen=True)
class SeamLattice:
    """The lines of one lattice on which seams could be.

    name
        What they are between.
    cell
        Pixels from line to line, y and x.
    step
        Pixels between its shifts, y and x.
    """

    name: str
    shape: tuple[int, int]
    cell: tuple[int, int]
    step: tuple[int, int]

    def lines(self, axis: int, start: int, stop: int) -> range:
        """Seams at start <= y < stop: the line y is between the pixels y - 1 and y."""
        cell = self.cell[axis]
        return range(max(-(-start // cell), 1) * cell, min(stop, self.shape[axis]), cell)


def seam_lattices(
    shape: tuple[int, int], cells: Mapping[str, tuple[int, int]], stride: int
) -> list[SeamLattice]:
    """Those of the lattices that have a line in the image, each cell once.

    Parameters
    ----------
    cells
        Height and width of a cell, by name.
    stride
        Of the network.
    """
    found: dict[tuple[int, int], SeamLattice] = {}
    for name, cell in cells.items():
        if cell not in found and (cell[0] < shape[0] or cell[1] < shape[1]):
            y, x = (_step(size, stride) for size in cell)
            found[cell] = SeamLattice(name, shape, cell, (y, x))
    return list(found.values())


def _step(cell: int, stride: int) -> int:
    """The coarsest step of which enough shifts fit into half a cell."""
    steps = (math.lcm(BLOCK, stride), stride)
    return next((step for step in steps if cell // 2 // step >= 2 * LEAST_SHIFTS), 1)


# --- lines ----------------------------------------------------------------------------------------

_LINES = SHIFTS + 1
LINE_SUMS = np.dtype(
    [
        ("pieces", np.float64),
        ("log_lines", np.float64),
        ("log_none", np.float64),
        ("seam", np.float64),
        ("expected", np.float64),
        ("variance", np.float64),
        ("third", np.float64),
        ("crossed", np.float64),
        ("counts", np.float64, (_LINES,)),
        ("means", np.float64, (_LINES,)),
        ("pixels", np.float64, (_LINES,)),
    ]
)
"""Sums over the pieces of seams.

seam
    Pixels that count on the seam's line.
expected, variance, third
    Moments of that when the line of each piece is drawn.
log_lines, log_none
    Log of the number of ways to draw; log of the probability that nothing counts on lines drawn.
crossed
    Pixels where one object lies on both sides of a shifted line, in the mean.
counts, pixels, means
    Of the seam and of each shift: pixels that count; pixels looked at; what `counts` would be by means
    of the pieces."""


def line_sums(
    window: Array,
    at: Box,
    box: Box,
    lattices: Sequence[SeamLattice],
    inside: Array | None = None,
) -> Array:
    """Sums over the pieces of seams in one region: (L, len(KINDS)) LINE_SUMS; they add up.

    Parameters
    ----------
    window
        (h, w) labels of `at`.
    at
        The region's box, with MARGIN pixels more above and left at least, where the image has them.
    box
        The region.
    inside
        (h, w) bool, where objects were looked for: its border is no seam; None: everywhere.
    """
    sums = np.zeros((len(lattices), len(KINDS)), LINE_SUMS)
    for place, lattice in enumerate(lattices):
        for axis in (0, 1):
            turned = window if axis == 0 else window.T
            within = inside if inside is None or axis == 0 else inside.T
            start, stop, low = (box.y0, box.y1, at.y0) if axis == 0 else (box.x0, box.x1, at.x0)
            first, last, left = (box.x0, box.x1, at.x0) if axis == 0 else (box.y0, box.y1, at.y0)
            cell, step = lattice.cell[axis], lattice.step[axis]
            for seam in lattice.lines(axis, start, stop):
                if seam - low < MARGIN:
                    continue  # an image of one or two pixels before the seam
                end = min(seam + cell // 2 + 1, stop - 1)  # a line looks one pixel further
                lines = range(seam, end, step)[:_LINES]
                if len(lines) > LEAST_SHIFTS:
                    part = turned[:, first - left : last - left]
                    known = None if within is None else within[:, first - left : last - left]
                    _add_seam(sums[place], part, known, np.asarray(lines) - low, (first, last))
    return sums


def _add_seam(
    sums: Array, part: Array, inside: Array | None, lines: Array, along: tuple[int, int]
) -> None:
    """Add the pieces of one seam; modifies `sums`, (len(KINDS),). The first line is the seam's."""
    first, last = along
    starts = np.unique(np.r_[first, np.arange(-(-first // PIECE) * PIECE, last, PIECE)]) - first
    lengths = np.diff(np.r_[starts, last - first])
    for kind, offset in enumerate(_OFFSETS):
        before, after = part[lines + offset - 1], part[lines + offset]
        differs = before != after
        if inside is not None:
            differs &= inside[lines + offset - 1] == inside[lines + offset]
        objects = (before != 0) & (after != 0)
        counted = differs & (objects if KINDS[kind] == "contacts" else ~objects)
        counts = np.add.reduceat(counted, starts, axis=1, dtype=np.int64)  # (lines, pieces)
        crossed = int((objects & ~differs)[1:].sum()) / (len(lines) - 1)
        _add_pieces(sums[kind], counts, lengths, crossed)


def _add_pieces(sums: Array, counts: Array, lengths: Array, crossed: float) -> None:
    number = len(counts)
    means = counts.mean(axis=0)
    apart = counts - means
    sums["pieces"] += len(lengths)
    varied = int((counts != counts[0]).any(axis=0).sum())  # the others cannot tell anything
    sums["log_lines"] += varied * math.log(number)
    sums["log_none"] += np.log(np.maximum((counts == 0).mean(axis=0), 1e-300)).sum()
    sums["seam"] += counts[0].sum()
    sums["expected"] += means.sum()
    sums["variance"] += (apart**2).mean(axis=0).sum()
    sums["third"] += (apart**3).mean(axis=0).sum()
    sums["crossed"] += crossed
    sums["counts"][:number] += counts.sum(axis=1)
    sums["means"][:number] += means.sum()
    sums["pixels"][:number] += lengths.sum()


def add_sums(parts: Iterable[Array]) -> Array | None:
    """The sum of what `line_sums` gave of all regions, in their order; None of none."""
    total: Array | None = None
    for part in parts:
        if total is None:
            total = part.copy()
            continue
        for name in LINE_SUMS.names or ():
            total[name] += part[name]
    return total


# --- objects --------------------------------------------------------------------------------------

BINS = ("objects", "diameter", "diameter_squared")


@dataclass
class ObjectDistances:
    """Objects by the distance of their centroid from the nearest seam, pixel by pixel.

    Memory is that of a cell's sides, however many objects.
    """

    lattices: Sequence[SeamLattice]
    bins: list[list[dict[str, Array]]] = field(init=False)
    """Of each lattice and axis: distances from -cell // 2 up."""
    diameters: float = 0.0
    objects: int = 0

    def __post_init__(self) -> None:
        self.bins = [
            [{name: np.zeros(cell // 2 * 2) for name in BINS} for cell in lattice.cell]
            for lattice in self.lattices
        ]

    def add(self, centroid_y: Array, centroid_x: Array, area: Array) -> None:
        """Add objects: (n,) each, in pixels of the label image, centres at integers."""
        diameter = np.sqrt(4 * area / np.pi)
        self.objects += len(area)
        self.diameters += float(diameter.sum())
        values = (np.ones(len(area)), diameter, diameter**2)
        for lattice, bins in zip(self.lattices, self.bins, strict=True):
            for axis, centroid in enumerate((centroid_y, centroid_x)):
                distance, near = _distances(lattice, axis, centroid)
                for name, value in zip(BINS, values, strict=True):
                    counted = bins[axis][name]
                    counted += np.bincount(distance[near], value[near], len(counted))


def _distances(lattice: SeamLattice, axis: int, places: Array) -> tuple[Array, Array]:
    """Pixels from half a cell before the nearest seam, and which places are near one at all.

    Half a cell at the border belongs to no seam, and so do objects that the border may have cut.
    """
    cell, size = lattice.cell[axis], lattice.shape[axis]
    half = cell // 2
    seams = (size - 1) // cell
    nearest = np.clip(np.round((places + 0.5) / cell), 1, max(seams, 1))
    distance = np.floor(places + 0.5 - nearest * cell).astype(np.int64) + half
    near = (distance >= 0) & (distance < 2 * half) & (seams > 0)
    return distance, near & (places + 0.5 < size - min(64, half // 2))


def exposure(lattice: SeamLattice, axis: int) -> Array:
    """Pixels of the image at each distance, as objects are counted by it."""
    rows = np.arange(lattice.shape[axis])
    distance, near = _distances(lattice, axis, rows)
    counts = np.bincount(distance[near], minlength=lattice.cell[axis] // 2 * 2)
    return counts * lattice.shape[1 - axis]
