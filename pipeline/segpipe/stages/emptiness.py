"""Which tiles hold nothing: measured while `tile` has the pixels in hand, decided before `infer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe import occupancy
from segpipe.geometry import Box, Lattice
from segpipe.models.card import ModelCard
from segpipe.records import Record
from segpipe.settings import Settings
from segpipe.stages.image import Image
from segpipe.stages.manifest import Manifest
from segpipe.stages.stage_run import StageRun

Array = np.ndarray[Any, np.dtype[Any]]
COLOURS = ("red", "green", "blue")


@dataclass(frozen=True)
class Skipped:
    """Tiles that the network need not see: each bool (rows, columns) of the tiles, none in two.

    empty
        Within what the model's card says that it sees nothing in, or of a constant image.
    glass
        Bright, even ground of brightfield.
    """

    empty: Array
    glass: Array

    @property
    def either(self) -> Array:
        """All of them."""
        found: Array = self.empty | self.glass
        return found


def skips_glass(settings: Settings, card: ModelCard) -> bool:
    """Whether tiles of bare glass are left out: only a model of colours is one of brightfield, and of
    classes, glass may be one."""
    return settings.tile.tissue == "auto" and card.channels == COLOURS and not card.classes


def cell_payload(image: Image, seen: Array) -> dict[str, Array]:
    """What a region's record keeps of its pixels (C, h, w); nothing where no cells fit the cores."""
    cell = occupancy.cell_size(image.plan.core)
    return {} if cell is None else {"extremes": occupancy.cell_extremes(seen, cell)}


def window_occupancy(
    run: StageRun,
    lattice: Lattice,
    copied: Mapping[str, Record],
    ranges: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """For the manifest: `occupancy`, level and contrast of each tile's window, and `density` with a
    model of colours; None where no cells fit."""
    image = run.image
    cell = occupancy.cell_size(image.plan.core)
    if cell is None:
        return {"occupancy": None, "density": None}
    records = run.records("tile")
    rows, columns = lattice.count
    extremes = np.block(
        [
            [
                records.payload(copied[region.name], ["extremes"])["extremes"]
                if region.name in copied
                else _unknown(region.box, cell, len(ranges))
                for region in (lattice[row, column] for column in range(columns))
            ]
            for row in range(rows)
        ]
    )
    found = occupancy.tile_occupancy(extremes, cell, image.tiles, ranges)
    density = None
    if image.model.card.channels == COLOURS:
        density = occupancy.to_text(occupancy.tile_density(extremes, cell, image.tiles))
    return {"occupancy": occupancy.to_text(found), "density": density}


def _unknown(box: Box, cell: int, channels: int) -> Array:
    """In place of the extremes of a region that could not be read: no window with it is empty."""
    cells = (-(-size // cell) for size in box.shape)
    return np.full((2, len(occupancy.SCALES), channels, *cells), np.nan, np.float32)


def skipped_tiles(image: Image, tiled: Manifest) -> Skipped:
    """Tiles that the network need not see, and why.

    All of a constant image; else those whose windows stay within the level and contrast of the
    model's card, and those of bare glass, unless the settings want none skipped.
    """
    none = np.zeros(image.tiles.lattice.count, bool)
    if all(low == high for low, high in tiled.facts["ranges"]):
        return Skipped(~none, none)
    empty, glass = none, none
    rule, found = image.model.card.empty, tiled.facts["occupancy"]
    if image.plan.skip_empty and rule is not None and found is not None:
        numbers = occupancy.from_text(found)
        empty = occupancy.empty_tiles(numbers, rule.level, rule.contrast)
    density = tiled.facts["density"]
    if image.plan.skip_glass and density is not None:
        glass = occupancy.glass_tiles(occupancy.from_text(density)) & ~empty
    return Skipped(empty, glass)
