"""`segment`: an image that fits into memory, through the same mathematics as `predict`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from segpipe import occupancy, percentiles
from segpipe.choosing import FLUORESCENCE, choose_for_colours
from segpipe.components import Decode, label_region
from segpipe.errors import InputError, SettingsError
from segpipe.geometry import Box, Lattice, TileGrid
from segpipe.growth import Field, grow, reach
from segpipe.holes import fill_holes, label_holes
from segpipe.inference import predict_region
from segpipe.models.card import ModelCard
from segpipe.models.modelfile import find_model
from segpipe.properties import keeps, renumber, sum_region
from segpipe.resampling import resample
from segpipe.seams import merge_seams
from segpipe.segmenter import load_segmenter
from segpipe.semantic import likeliest
from segpipe.settings import AUTO, Settings
from segpipe.slide import Level
from segpipe.stages.emptiness import skips_glass
from segpipe.stages.image import decode_of, intensity_range
from segpipe.stages.resolution import resolution_of

Array = np.ndarray[Any, np.dtype[Any]]


def segment(array: Array, model: str = AUTO, settings: Settings | None = None) -> Array:
    """Labels of the objects in an array: (Y, X) uint32, ids 1..N, 0 is background.

    Of a model whose outputs are classes, the class of each pixel, by its place among them from 0.
    The same labels as `predict` writes for a file that holds this array.
    At the model's scale, where settings and card want another than the array's (`segpipe.resampling`).

    Parameters
    ----------
    array
        (Y, X) or (C, Y, X), uint8, uint16 or float32, with the channels that the model takes.
    model
        Name or path of a model file; "auto" is a shipped one, as `predict` chooses it for one channel
        or, with three, for red, green and blue (`segpipe.choosing`).
    settings
        As for `predict`; what concerns files, workers and pictures is not used.

    Raises
    ------
    InputError
        When the array has other axes, channels or numbers.
    SettingsError, ModelError
        As `predict`.
    """
    settings = settings or Settings()
    infer = settings.infer
    if settings.tile.mask is not None:
        raise SettingsError(
            "tile.mask is for files; leave it out, and blank the array or the labels"
        )
    pixels = array[np.newaxis] if array.ndim == 2 else array
    if model == AUTO and pixels.ndim == 3 and len(pixels) == 3 and pixels.size:
        choice = choose_for_colours(pixels, pixels.dtype, settings, "the array")
        model, pixels = (
            choice.model,
            pixels if choice.channels is None else pixels[list(choice.channels)],
        )
    segmenter = load_segmenter(
        find_model(FLUORESCENCE if model == AUTO else model),
        infer.device,
        threads=infer.threads,
        batch=infer.batch or 1,
        memory_format=infer.memory_format,
        precision=infer.precision,
        backend=infer.backend,
        core_only=True,
        tta=infer.tta,
    )
    if pixels.ndim != 3 or len(pixels) != segmenter.channels or pixels.size == 0:
        raise InputError(
            f"an array of shape {array.shape}; model {segmenter.card.name} takes (Y, X) or (C, Y, X) "
            f"with {segmenter.channels} channels"
        )
    if pixels.dtype not in (np.uint8, np.uint16, np.float32):
        raise InputError(f"an array of {pixels.dtype}; expected uint8, uint16 or float32")
    decode = decode_of(settings, segmenter.card)
    pixels = _resampled(pixels, segmenter.card, settings)
    shape = pixels.shape[1], pixels.shape[2]
    box = Box(0, 0, *shape)
    grid = TileGrid(shape, settings.tile.core, segmenter.halo, segmenter.stride)
    ranges = find_ranges(pixels, segmenter.card, settings)
    empty = _empty_tiles(pixels, grid, ranges, segmenter.card, settings)
    probabilities = predict_region(
        pixels, box, grid, box, ranges, segmenter, lambda tile: bool(empty[tile.index])
    )
    if segmenter.card.classes:
        return likeliest(probabilities)[0]
    outputs = segmenter.outputs
    foreground = probabilities[outputs.index("foreground")]
    interior = probabilities[outputs.index("interior")] if "interior" in outputs else foreground
    if settings.stitch.max_hole:
        lattice = Lattice(shape, shape)
        mask = foreground >= decode.foreground
        slots, record = label_holes(mask, lattice[0, 0], lattice, settings.stitch.max_hole)
        table = next(fill_holes(lattice, lambda _: record, settings.stitch.max_hole))
        foreground = np.where(table[slots], np.uint8(255), foreground)
    labels = label_instances(foreground, interior, decode)
    if not settings.stitch.filters:
        return labels
    rows = sum_region(labels, probabilities[outputs.index("foreground")], box)
    kept = keeps(rows, settings.stitch.max_area, settings.stitch.min_probability)
    return np.concatenate([np.zeros(1, np.uint32), renumber(kept, 0)])[labels]


def _resampled(pixels: Array, card: ModelCard, settings: Settings) -> Array:
    """The pixels at the working resolution."""
    shape = pixels.shape[1], pixels.shape[2]
    resolution = resolution_of(settings.tile, card, None, [Level(shape, 1.0)])
    if not resolution.resampled:
        return pixels
    box = Box(0, 0, *resolution.shape)
    return resample(pixels, Box(0, 0, *shape), box, resolution.ratio, shape)


def label_instances(foreground: Array, interior: Array, decode: Decode) -> Array:
    """Labels of whole probability maps, as the stage `stitch` finds them: (Y, X) uint32, ids 1..N.

    Parameters
    ----------
    foreground, interior
        (Y, X) uint8, quantised probabilities.
    """
    shape = foreground.shape[0], foreground.shape[1]
    box, lattice = Box(0, 0, *shape), Lattice(shape, shape)
    found = label_region(foreground, interior, lattice[0, 0], lattice, decode)
    band = next(merge_seams(lattice, lambda _: found.seams, lambda _: found.anchors, decode))
    field = Field.empty(shape)
    found.runs.paint(band.ids[0], box, *field.inner)
    steps, _ = reach(decode, -1)
    grow(field, steps, box)
    return np.ascontiguousarray(field.inner[0])


def _empty_tiles(
    pixels: Array,
    grid: TileGrid,
    ranges: Sequence[tuple[float, float]],
    card: ModelCard,
    settings: Settings,
) -> Array:
    """Tiles that hold nothing, as the stages find them: bool (rows, columns)."""
    empty = np.zeros(grid.lattice.count, bool)
    cell, rule = occupancy.cell_size(settings.tile.core), card.empty
    if all(low == high for low, high in ranges):
        return ~empty
    if cell is None:
        return empty
    extremes = occupancy.cell_extremes(pixels, cell)
    if rule is not None and settings.infer.skip_empty:
        found = occupancy.tile_occupancy(extremes, cell, grid, ranges)
        empty |= occupancy.empty_tiles(found, rule.level, rule.contrast)
    if skips_glass(settings, card):
        empty |= occupancy.glass_tiles(occupancy.tile_density(extremes, cell, grid))
    return empty


def find_ranges(
    pixels: Array, card: ModelCard, settings: Settings
) -> Sequence[tuple[float, float]]:
    """The intensities that become 0 and 1, per channel, as the stage `tile` finds them."""
    rule, chosen = card.normalisation, settings.infer.normalise
    if chosen is not None or rule.kind == "fixed":
        return [chosen or (rule.low, rule.high)] * len(pixels)
    squares = Lattice((pixels.shape[1], pixels.shape[2]), (settings.tile.core,) * 2)
    tiles = [pixels[(slice(None), *square.box.slices)] for square in squares]
    occupied = [tile for tile in tiles if percentiles.is_occupied(tile)]
    ranges = []
    for channel in range(len(pixels)):
        parts = [percentiles.keys_of(tile[channel]) for tile in occupied]
        keys = np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.uint32)
        values = [
            percentiles.value_of(int(keys[percentiles.rank(q, len(keys)) - 1]), pixels.dtype)
            for q in (rule.low, rule.high, 100.0)
            if len(keys)
        ]
        ranges.append(intensity_range(*values) if values else (0.0, 0.0))
    return ranges
