"""Would seams show? The conclusion from sums beside the lines where a label image was cut.

The null is that of *shifted lattices* of the same image (`segpipe.seam_sums`): each piece could as well
have had any of its lines for the seam, so that mean, variance and skewness of the seam's sum are known
exactly: a permutation test, its tail that of Pearson's type III curve with these moments (as
P. W. Mielke and K. J. Berry do it). It is widened where sums over shifted lattices vary more than that:
pieces are not independent where objects are long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import gammainc, gammaincc, stdtr, stdtrit

from segpipe.seam_sums import (
    BINS,
    KINDS,
    LEAST_SHIFTS,
    ObjectDistances,
    SeamLattice,
    exposure,
)

Array = np.ndarray[Any, np.dtype[Any]]

ALARM = 0.001
"""Probability of an alarm on a slide without seams."""
LEAST_EFFECT = 0.02
"""Of a ratio: below it even what chance cannot explain is no seam that anyone could see."""
FEWEST = 10
"""Objects at least in a strip whose mean size counts."""
NONE_SEEN, SUSPICIOUS, TOO_LITTLE, NO_SEAMS = (
    "none seen",
    "suspicious",
    "too little to tell",
    "no seams",
)


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
    sums = {name: np.zeros(2 * reach + 1) for name in (*BINS, "pixels")}
    for axis in axes:
        middle = lattice.cell[axis] // 2
        first = middle - wide // 2 - reach * wide
        for name, values in (*bins[axis].items(), ("pixels", exposure(lattice, axis))):
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
