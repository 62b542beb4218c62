"""Would seams show? Figures of a label image beside the lines where it was cut, against elsewhere.

Two kinds of evidence, each with a null that the same image gives by *shifted lattices*:

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
leave edges at preferred phases that have nothing to do with tiling. Under the null each piece could as
well have had any of its lines for the seam, so that mean, variance and skewness of the seam's sum are
known exactly: a permutation test, its tail that of Pearson's type III curve with these moments (as
P. W. Mielke and K. J. Berry do it). It is widened where sums over shifted lattices vary more than that:
pieces are not independent where objects are long.

All sums are additive over regions, and the memory is that of one cell's sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy.special import gammainc, gammaincc, stdtr, stdtrit

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
ALARM = 0.001
"""Probability of an alarm on a slide without seams."""
LEAST_EFFECT = 0.02
"""Of a ratio: below it even what chance cannot explain is no seam that anyone could see."""
KINDS = ("edges above", "edges", "edges below", "contacts")
_OFFSETS = (-1, 0, 1, 0)
NONE_SEEN, SUSPICIOUS, TOO_LITTLE, NO_SEAMS = (
    "none seen",
    "suspicious",
    "too little to tell",
    "no seams",
)


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

FEWEST = 10
"""Objects at least in a strip whose mean size counts."""
_BINS = ("objects", "diameter", "diameter_squared")


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
            [{name: np.zeros(cell // 2 * 2) for name in _BINS} for cell in lattice.cell]
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
                for name, value in zip(_BINS, values, strict=True):
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


def _exposure(lattice: SeamLattice, axis: int) -> Array:
    """Pixels of the image at each distance, as objects are counted by it."""
    rows = np.arange(lattice.shape[axis])
    distance, near = _distances(lattice, axis, rows)
    counts = np.bincount(distance[near], minlength=lattice.cell[axis] // 2 * 2)
    return counts * lattice.shape[1 - axis]


# --- the check ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeamFigure:
    """Beside seams over elsewhere: a ratio, its interval of 95 %, and how likely chance is.

    least
        What would have been seen: the ratio's distance from 1 that would raise the alarm.
    """

    name: str
    ratio: float
    low: float
    high: float
    z: float
    p: float
    least: float


@dataclass(frozen=True)
class LatticeCheck:
    """The figures of one lattice.

    seam_share, elsewhere_share
        Share of the pixels on the seams, and on each shifted lattice, at which a label ends.
    least_cut
        Share of the objects on seams of which a straight cut would have raised the alarm.
    """

    name: str
    cell: tuple[int, int]
    step: tuple[int, int]
    figures: tuple[SeamFigure, ...]
    seam_share: float
    elsewhere_share: tuple[float, ...]
    least_cut: float | None


@dataclass(frozen=True)
class SeamCheck:
    """Whether seams show, in a word, and the figures behind it.

    p
        Of the most conspicuous figure, times the number of figures: how often chance alone would
        give one like it on a slide without seams.
    """

    verdict: str
    p: float
    alarm: float
    lattices: tuple[LatticeCheck, ...]

    def loudest(self) -> str:
        """The most conspicuous figure in words."""
        every = [(figure, one) for one in self.lattices for figure in one.figures]
        figure, one = min(every, key=lambda pair: pair[0].p)
        return (
            f"{figure.name} {figure.ratio:.2f} times what they are elsewhere, at the seams of "
            f"{one.name} (p {self.p:.1g})"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for what is not finite."""
        told: dict[str, Any] = _plain(asdict(self))
        return told


def _plain(value: Any) -> Any:
    """Of what JSON can hold."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def check_seams(
    lattices: Sequence[SeamLattice], lines: Array | None, objects: ObjectDistances
) -> SeamCheck:
    """The verdict on an image.

    Parameters
    ----------
    lines
        (L, len(KINDS)) LINE_SUMS over all regions.
    objects
        Over the whole table.
    """
    if not lattices or lines is None:
        return SeamCheck(NO_SEAMS, 1.0, ALARM, ())
    count = len(lattices) * (len(KINDS) + 2)
    level = ALARM / count
    checked = []
    for place, lattice in enumerate(lattices):
        kinds = lines[place]
        figures = [_line_figure(*one, level) for one in zip(KINDS, kinds, strict=True)]
        figures += _object_figures(lattice, objects, objects.bins[place], level)
        edges = kinds[KINDS.index("edges")]
        both = edges["counts"] + kinds[KINDS.index("contacts")]["counts"]
        shares = [float(c / p) for c, p in zip(both, edges["pixels"], strict=True) if p > 0]
        least = _least_cut(kinds, level)
        checked.append(
            LatticeCheck(
                *(lattice.name, lattice.cell, lattice.step, tuple(figures)),
                *(shares[0] if shares else 0.0, tuple(shares[1:]), least),
            )
        )
    every = [figure for one in checked for figure in one.figures]
    p = min(1.0, count * min(figure.p for figure in every))
    loud = [one for one in every if one.p < level and abs(one.ratio - 1) >= LEAST_EFFECT]
    if loud:
        verdict = SUSPICIOUS
    elif all(one.least_cut is None or one.least_cut > 1 for one in checked):
        verdict = TOO_LITTLE
    else:
        verdict = NONE_SEEN
    return SeamCheck(verdict, p, ALARM, tuple(checked))


def _spread(sums: Any) -> float:
    """Variance of the seam's sum: by permutation, and more where shifted lattices vary more."""
    if sums["variance"] == 0:
        return 0.0
    seen = sums["pixels"][1:] == sums["pixels"][0]
    apart = (sums["counts"] - sums["means"])[1:][seen]
    widened = 1.0
    if len(apart) >= LEAST_SHIFTS:
        widened = max(1.0, float((apart**2).mean() / sums["variance"]))
    return float(sums["variance"]) * widened


def _line_figure(name: str, sums: Any, level: float) -> SeamFigure:
    variance, expected = _spread(sums), float(sums["expected"])
    if variance == 0 or expected == 0:
        return SeamFigure(name, 1.0, 0.0, math.inf, 0.0, 1.0, math.inf)
    deviation = math.sqrt(variance)
    z = (float(sums["seam"]) - expected) / deviation
    skewness = float(sums["third"]) / float(sums["variance"]) ** 1.5
    least_p = math.exp(-float(sums["log_lines"]))
    # The curve has no probability at its end, but many sparse lines have nothing on them.
    none = math.exp(float(sums["log_none"])) if z < 0 else 0.0
    p = max(2 * _tail(z, skewness), 2 * none, least_p)
    ratio, half = float(sums["seam"]) / expected, 1.96 * deviation / expected
    needed = _needed(skewness, level) * deviation / expected if least_p < level else math.inf
    return SeamFigure(name, ratio, max(0.0, ratio - half), ratio + half, z, min(1.0, p), needed)


def _tail(z: float, skewness: float) -> float:
    """Probability of being as far out as z on its side, of Pearson's type III."""
    if abs(skewness) < 1e-3:
        return 0.5 * math.erfc(abs(z) / math.sqrt(2))
    if skewness < 0:
        z, skewness = -z, -skewness
    shape = 4 / skewness**2
    place = max(shape + z * math.sqrt(shape), 0.0)
    return float(gammaincc(shape, place) if z > 0 else gammainc(shape, place))


def _needed(skewness: float, level: float) -> float:
    """The z from which excess raises the alarm."""
    low, high = 0.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if 2 * _tail(middle, skewness) > level else (low, middle)
    return high


def _least_cut(kinds: Array, level: float) -> float | None:
    """Share of the objects on seams whose cut would be seen; None where nothing lies on them.

    A cut between two pixels makes contacts of what was crossed, an erased line makes edges: the
    harder to see of the two.
    """
    needed = []
    for name in ("edges", "contacts"):
        sums = kinds[KINDS.index(name)]
        if sums["crossed"] == 0:
            return None
        figure = _line_figure(name, sums, level)
        if not math.isinf(figure.least):
            needed.append(figure.least * float(sums["expected"]) / float(sums["crossed"]))
        elif name == "edges":
            return math.inf
    return max(needed)


def _object_figures(
    lattice: SeamLattice,
    objects: ObjectDistances,
    bins: Sequence[Mapping[str, Array]],
    level: float,
) -> list[SeamFigure]:
    """Density and size of the objects beside seams, over those in strips further away."""
    nothing = [
        SeamFigure(name, 1.0, 0.0, math.inf, 0.0, 1.0, math.inf) for name in ("density", "size")
    ]
    if objects.objects == 0:
        return nothing
    wide = max(4, round(objects.diameters / objects.objects / 2) * 2)
    axes = [axis for axis in (0, 1) if lattice.cell[axis] < lattice.shape[axis]]
    wide = min([wide, *(lattice.cell[axis] // 24 // 2 * 2 for axis in axes)])
    if wide < 2:
        return nothing
    reach = min((lattice.cell[axis] // 2 - wide // 2) // wide for axis in axes)
    sums = {name: np.zeros(2 * reach + 1) for name in (*_BINS, "pixels")}
    for axis in axes:
        middle = lattice.cell[axis] // 2
        first = middle - wide // 2 - reach * wide
        for name, values in (*bins[axis].items(), ("pixels", _exposure(lattice, axis))):
            part = values[first : first + (2 * reach + 1) * wide]
            sums[name] += part.reshape(-1, wide).sum(axis=1)
    whole = sums["pixels"] >= 0.9 * sums["pixels"].max()
    strips = np.arange(-reach, reach + 1)
    if sums["objects"].sum() == 0:
        return nothing
    density = _strip_figure("density", *_density(sums), strips, whole, level)
    return [density, _strip_figure("size", *_size(sums), strips, whole, level)]


def _density(sums: Mapping[str, Array]) -> tuple[Array, Array]:
    """Of each strip the log of its density, and that's standard deviation were objects independent."""
    pixels = np.maximum(sums["pixels"], 1)
    count = sums["objects"] + 0.5
    return np.log(count / pixels), 1 / np.sqrt(count)


def _size(sums: Mapping[str, Array]) -> tuple[Array, Array]:
    """Of each strip the log of its mean diameter, and that's standard error; NaN of too few."""
    count = np.where(sums["objects"] >= FEWEST, sums["objects"], np.nan)
    mean = sums["diameter"].sum() / sums["objects"].sum()
    squared = sums["diameter_squared"].sum() / sums["objects"].sum()
    spread = math.sqrt(max(squared / mean**2 - 1, 1e-6))  # all of one size: none
    return np.log(sums["diameter"] / count), spread / np.sqrt(count)


def _strip_figure(
    name: str, values: Array, errors: Array, strips: Array, whole: Array, level: float
) -> SeamFigure:
    """A strip against the mean of its two neighbours, as that varies among strips far from seams.

    Not against the mean of all: tissue is denser here than there, and a seam need not lie in the middle.
    """
    whole = whole & np.isfinite(values)
    known = whole[1:-1] & whole[2:] & whole[:-2]
    differences = values[1:-1] - (values[2:] + values[:-2]) / 2
    scale = np.sqrt(errors[1:-1] ** 2 + (errors[2:] ** 2 + errors[:-2] ** 2) / 4)
    inner = strips[1:-1]
    far = known & (np.abs(inner) >= 2)
    here = int(np.flatnonzero(inner == 0)[0]) if len(inner) else 0
    if far.sum() < 2 * LEAST_SHIFTS or not known[here]:
        return SeamFigure(name, 1.0, 0.0, math.inf, 0.0, 1.0, math.inf)
    apart = differences[far] / scale[far]
    unit = float(scale[here]) * max(0.5, math.sqrt(float((apart**2).mean())))
    z = float(differences[here]) / unit
    freedom = int(far.sum()) - 1
    p = 2 * float(stdtr(freedom, -abs(z)))
    half = float(stdtrit(freedom, 0.975)) * unit
    ratio = [math.exp(float(differences[here]) + sign * half) for sign in (0, -1, 1)]
    least = math.expm1(float(stdtrit(freedom, 1 - level / 2)) * unit)
    return SeamFigure(name, ratio[0], ratio[1], ratio[2], z, p, least)
