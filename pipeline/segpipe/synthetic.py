"""Synthetic fluorescence fields of any size, with known truth: pixels and labels of any box.

A field is computed, never stored. The content of a box is a function of (seed, parameters,
coordinates) alone, so boxes can be made in any order, by any process, on any machine, and two boxes
agree to the byte where they overlap. How: `segpipe.nuclei`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from segpipe import nuclei
from segpipe.errors import SettingsError
from segpipe.geometry import Box, Lattice

PIECE = 1024
"""Pixels a side that are painted at once: some 16 MB of buffers, whatever the box."""

_COUNTS_PER_STEP = 64  # a uint8 field is a 14-bit camera seen in 256 steps


@dataclass(frozen=True)
class NucleiField:
    """A field of stained nuclei: bright on dark, one channel, with one id per nucleus.

    Nuclei are ellipses with smooth irregular outlines, chromatin and a soft edge; some lie in
    groups that touch, a few divide (small and bright) or are out of focus (dim and soft). Crowded
    places hold smaller ones. Tissue has a border and holes; the rest is bare background.
    In the truth every nucleus is one 4-connected piece.

    Parameters
    ----------
    shape
        Height and width in pixels.
    seed
        Another seed is another field.
    spacing
        Pixels between the lattice cells that may hold a group of nuclei: fewer pixels, more nuclei.
    radius
        Smallest and largest mean radius of a nucleus in pixels.
    density
        In [0, 1]: how many of the lattice cells in tissue are asked to hold a group. Nuclei that
        come too near to another group are left out.
    touching
        In [0, 1]: share of nuclei that are made in groups of two or three. About three quarters
        of it touch in the end; under one in a hundred touch by chance.
    empty
        In [0, 1]: share of the field that is bare background.
    structure
        Pixels of the coarsest features of the tissue.
    brightness, background
        Counts of a camera with 16 bits; for uint8 they are divided by 64.
    noise
        Factor on the photon and read-out noise; 0 is none.
    blur
        Standard deviation of the soft edge in pixels.
    dtype
        "uint16" or "uint8".

    Raises
    ------
    SettingsError
        When a parameter is out of its range, or the field needs more ids than uint32 has.

    Examples
    --------
    >>> field = NucleiField((100_000, 100_000), seed=7)
    >>> here, there = Box(5000, 5000, 5040, 5040), Box(5020, 5010, 5060, 5050)
    >>> bool((field.pixels(here)[20:, 10:] == field.pixels(there)[:20, :30]).all())
    True
    """

    shape: tuple[int, int]
    seed: int = 0
    spacing: int = 26
    radius: tuple[float, float] = (6.0, 14.0)
    density: float = 0.9
    touching: float = 0.35
    empty: float = 0.3
    structure: int = 1200
    brightness: float = 5000.0
    background: float = 350.0
    noise: float = 1.0
    blur: float = 1.2
    dtype: Literal["uint16", "uint8"] = "uint16"

    def __post_init__(self) -> None:
        low, high = self.radius
        checks = {
            "shape must be at least 1 x 1": min(self.shape) >= 1,
            "seed must be in 0..2**63 - 1": 0 <= self.seed < 2**63,
            "radius must be (low, high) with 2 <= low <= high <= 200": 2 <= low <= high <= 200,
            "spacing must be at least 8 and half the largest radius": (
                self.spacing >= max(8, high / 2)
            ),
            "structure must be at least 16": self.structure >= 16,
            "brightness, background and noise must not be negative": (
                min(self.brightness, self.background, self.noise) >= 0
            ),
            "blur must be in 0.2..20": 0.2 <= self.blur <= 20,
            "dtype must be 'uint16' or 'uint8'": self.dtype in ("uint16", "uint8"),
        }
        for name in ("density", "touching", "empty"):
            checks[f"{name} must be in [0, 1]"] = 0 <= getattr(self, name) <= 1
        for message, holds in checks.items():
            if not holds:
                raise SettingsError(f"{message}; got {self}")
        cells = len(Lattice(self.shape, (self.spacing, self.spacing)))
        if cells * nuclei.SLOTS >= 2**32 - 1:
            raise SettingsError(
                f"a field of {self.shape} at spacing {self.spacing} needs {cells * nuclei.SLOTS} "
                "ids, more than uint32 holds; make it smaller or the spacing larger"
            )

    @property
    def box(self) -> Box:
        """The whole field."""
        return Box(0, 0, *self.shape)

    @cached_property
    def _recipe(self) -> nuclei.Recipe:
        # `bare` is the level of the landscape under which `empty` of this field lies, whatever its
        # size: an order statistic of some 10,000 points, so that no rounding can move it.
        ys = np.linspace(0, self.shape[0] - 1, 97) / self.structure
        xs = np.linspace(0, self.shape[1] - 1, 97) / self.structure
        levels = sorted(nuclei.landscape(self.seed, nuclei.TISSUE, y, x) for y in ys for x in xs)
        levels = [-1.0, *levels, 2.0]
        # Groups hold 2.3 nuclei in the mean: this share of them makes `touching` of the nuclei.
        grouped = self.touching / (2.3 - 1.3 * self.touching)
        return nuclei.Recipe(
            seed=self.seed,
            rows=self.shape[0],
            columns=self.shape[1],
            spacing=self.spacing,
            smallest=float(self.radius[0]),
            largest=float(self.radius[1]),
            density=float(self.density),
            grouped=float(grouped),
            structure=float(self.structure),
            bare=float(levels[int(self.empty * (len(levels) - 1))]),
            brightness=float(self.brightness),
            background=float(self.background),
            blur=float(self.blur),
            gain=6.0 * self.noise,
            read_noise=12.0 * self.noise,
        )

    def _pieces(self, box: Box) -> Iterator[tuple[Box, tuple[slice, slice]]]:
        """Cut `box`, and say where each piece lies in an array of the box's shape."""
        if not self.box.contains(box):
            raise ValueError(f"box {box} is not inside the field of {self.shape}")
        if box.area:
            for piece in Lattice(box.shape, (PIECE, PIECE)):
                yield piece.box.shift(box.y0, box.x0), piece.box.slices

    def pixels(self, box: Box) -> NDArray[np.uint16] | NDArray[np.uint8]:
        """The image: (height, width) of the box, in `dtype`.

        Raises
        ------
        ValueError
            When the box is not inside the field.
        """
        out = np.zeros(box.shape, np.uint16)
        for piece, part in self._pieces(box):
            table = nuclei.showing(self._recipe, *_corners(piece))
            haze, first, second = np.zeros((3, *piece.shape), np.float32)
            nuclei.paint_light(table, piece.y0, piece.x0, haze, first, second)
            light = (haze, first, second)
            nuclei.expose(self._recipe, piece.y0, piece.x0, light, out[part])
        if self.dtype == "uint8":
            return np.minimum(out // _COUNTS_PER_STEP, 255).astype(np.uint8)
        return out

    def labels(self, box: Box) -> NDArray[np.uint32]:
        """The truth: (height, width) of the box, 0 is background.

        A nucleus has the same id in every box: it follows from its cell in the lattice, so ids
        have gaps.

        Raises
        ------
        ValueError
            When the box is not inside the field.
        """
        out = np.zeros(box.shape, np.uint32)
        for piece, part in self._pieces(box):
            table = nuclei.showing(self._recipe, *_corners(piece))
            nuclei.paint_labels(table, piece.y0, piece.x0, out[part])
        return out

    def centres(self, box: Box) -> tuple[NDArray[np.uint32], NDArray[np.float64]]:
        """Ids (n,) uint32 and centres (n, 2) float64 (y, x) of the nuclei centred in the box.

        Nothing is painted, so this is fast. The pixel nearest to a centre bears the nucleus's id.

        Raises
        ------
        ValueError
            When the box is not inside the field.
        """
        ids, points = [np.empty(0, np.uint32)], [np.empty((0, 2))]
        for piece, _ in self._pieces(box):
            table = nuclei.showing(self._recipe, *_corners(piece))
            centres = np.stack([table["y"], table["x"]], axis=1)
            nearest = np.floor(centres + 0.5)
            inside = (nearest >= (piece.y0, piece.x0)) & (nearest < (piece.y1, piece.x1))
            ids.append(table["id"][inside.all(1)].astype(np.uint32))
            points.append(centres[inside.all(1)])
        return np.concatenate(ids), np.concatenate(points)

    def count(self) -> int:
        """Number of nuclei of the whole field."""
        return sum(len(self.centres(box)[0]) for box, _ in self._pieces(self.box))

    def rows(self, step: int) -> Iterator[tuple[Box, NDArray[np.uint16] | NDArray[np.uint8]]]:
        """The field from top to bottom in strips of `step` rows and full width: (box, pixels)."""
        for strip in Lattice(self.shape, (step, self.shape[1])):
            yield strip.box, self.pixels(strip.box)


def _corners(box: Box) -> tuple[int, int, int, int]:
    return box.y0, box.x0, box.y1, box.x1
