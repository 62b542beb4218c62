"""Which tiles hold nothing: measured while `tile` has the pixels in hand, decided before `infer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from segpipe import occupancy
from segpipe.geometry import Box, Lattice
from segpipe.records import Record
from segpipe.stages.image import Image, Manifest
from segpipe.stages.stage_run import StageRun

Array = np.ndarray[Any, np.dtype[Any]]


def cell_payload(image: Image, seen: Array) -> dict[str, Array]:
    """What a region's record keeps of its pixels (C, h, w); nothing where no cells fit the cores."""
    cell = occupancy.cell_size(image.plan.core)
    return {} if cell is None else {"extremes": occupancy.cell_extremes(seen, cell)}


def window_occupancy(
    run: StageRun,
    lattice: Lattice,
    copied: Mapping[str, Record],
    ranges: Sequence[tuple[float, float]],
) -> dict[str, Any] | None:
    """Level and contrast of each tile's window, for the manifest; None where no cells fit."""
    image = run.image
    cell = occupancy.cell_size(image.plan.core)
    if cell is None:
        return None
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
    return occupancy.to_text(occupancy.tile_occupancy(extremes, cell, image.tiles, ranges))


def _unknown(box: Box, cell: int, channels: int) -> Array:
    """In place of the extremes of a region that could not be read: no window with it is empty."""
    cells = (-(-size // cell) for size in box.shape)
    return np.full((2, len(occupancy.SCALES), channels, *cells), np.nan, np.float32)


def empty_tiles(image: Image, tiled: Manifest) -> Array:
    """Tiles that the network need not see: bool (rows, columns) of `image.tiles`.

    All of a constant image; else those whose windows stay within the level and contrast of the
    model's card, unless the settings want none skipped or the card has no such rule.
    """
    if all(low == high for low, high in tiled.facts["ranges"]):
        return np.ones(image.tiles.lattice.count, bool)
    rule, found = image.model.card.empty, tiled.facts["occupancy"]
    if not image.plan.skip_empty or rule is None or found is None:
        return np.zeros(image.tiles.lattice.count, bool)
    return occupancy.empty_tiles(occupancy.from_text(found), rule.level, rule.contrast)
