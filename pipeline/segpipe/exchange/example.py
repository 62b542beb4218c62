"""An image that a model would be given, made from nothing, for the tests and the cover of a package."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segpipe.export.drawing import Picture, contrast, draw_outlines
from segpipe.memory import segment
from segpipe.models.card import ModelCard
from segpipe.settings import load_settings
from segpipe.synthetic import NucleiField

COLOURS = ("red", "green", "blue")
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
"""Optical density of haematoxylin and eosin in red, green and blue: Ruifrok and Johnston 2001,
Quantification of histochemical staining by color deconvolution, table 1."""
ENLARGED = 2
"""Pixels a side of the cover for each of the image."""


def example_image(card: ModelCard, size: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """A field of nuclei as the card's channels show it: (C, size, size).

    Channels red, green and blue are nuclei in haematoxylin on eosin, bright ground, uint8. All others
    show the same field, uint16, or uint8 where the card scales from 0 to 255.
    """
    field = NucleiField((size, size), seed=7, empty=0.0)
    light = field.pixels(field.box).astype(np.float64)
    low, high = np.percentile(light, (1, 99.8))
    share = np.clip((light - low) / max(high - low, 1), 0, 1)
    if tuple(card.channels) == COLOURS:
        density = 1.3 * share[None] * STAINS[0][:, None, None] + 0.25 * STAINS[1][:, None, None]
        stained: NDArray[np.uint8] = np.rint(245 * 10**-density).astype(np.uint8)
        return stained
    rule = card.normalisation
    if rule.kind == "fixed":
        scaled = rule.low + share * (rule.high - rule.low)
        kind: Any = np.uint8 if rule.low >= 0 and rule.high <= 255 else np.uint16
        plane = np.rint(np.clip(scaled, 0, np.iinfo(kind).max)).astype(kind)
    else:
        plane = np.rint(light).astype(np.uint16)
    repeated: NDArray[np.uint16] = np.repeat(plane[None], len(card.channels), axis=0)
    return repeated


def cover_png(image: NDArray[Any], model: Path, card: ModelCard) -> bytes:
    """A PNG twice as wide as high: the image, and beside it the same with what the model finds."""
    rgb = tuple(card.channels) == COLOURS
    ranges = [(0.0, 255.0)] * 3 if rgb else [_range(plane) for plane in image]
    display = contrast(image, ranges, rgb)
    shown: Picture = display
    if "foreground" in card.outputs:
        labels = segment(image, str(model), load_settings(None, ["infer.device=cpu"]))
        shown = draw_outlines(display, labels)
    both = np.concatenate([display, shown], axis=1)
    picture = Image.fromarray(both.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _range(plane: NDArray[Any]) -> tuple[float, float]:
    low, high = np.percentile(plane, (1, 99.8))
    return float(low), float(high)
