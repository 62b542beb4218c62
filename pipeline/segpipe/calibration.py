"""What a model sees nothing in, measured: the numbers under `empty` in its card.

Images with objects are dimmed until the model loses them, and laid on a lighter or darker ground and
under noise. Of all pixels that still reach the probability FOREGROUND, the smallest contrast
(`segpipe.occupancy`) within the network's context is found; half of it is what a window may
have to be skipped. A window holds the whole context of each pixel of its core, so its contrast is no
smaller than that of any of them, whatever the sizes of tiles.

Measured for the first weights that shipped on every third of the 493 fluorescence images of their
source: when they are dimmed to 0.1, 0.07, 0.05, 0.04 and 0.03 the smallest contrast is 0.17, 0.23,
0.18, 0.18 and 0.18, so contrast is the right thing to compare. It is a measurement, not a proof; see
`segpipe.occupancy`. Of all 493 images, 22 mosaics and a slide, with cores of 64 to 512, some
390 of 37,000 tiles are skipped; in each of them the network's own foreground rounds to 0 of 255.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segpipe.errors import ModelError
from segpipe.geometry import Box, TileGrid, ceil_to
from segpipe.inference import normalise, tile_outputs
from segpipe.memory import find_ranges
from segpipe.models.card import Empty
from segpipe.models.modelfile import ModelCard, find_model, load_model, write_model
from segpipe.models.tensors import storage_of
from segpipe.occupancy import SCALES
from segpipe.segmenter import Segmenter, load_segmenter
from segpipe.settings import Settings
from segpipe.slide import open_slide, select_channels

Array = NDArray[np.float32]
FOREGROUND = 0.1
"""Far below any threshold of use, so that a probability need not be near it to count."""
LEVEL = 0.2
"""How far from the image's low the ground of a window may lie."""
MARGIN = 2.0
"""The measured contrast is divided by this."""
CORE = 1024


@dataclass(frozen=True)
class Change:
    """How an image is changed: factor * image + offset + noise of this standard deviation."""

    factor: float
    offset: float = 0.0
    noise: float = 0.0


CHANGES = (
    *(Change(factor) for factor in (1.0, 0.3, 0.1, 0.07, 0.05, 0.04, 0.03)),
    *(Change(0.1, offset) for offset in (-LEVEL, LEVEL)),
    Change(0.05, noise=0.005),
)


def calibrate_model(model: str, files: Sequence[Path], destination: Path) -> Empty:
    """Measure a model on images, and write a copy of its file whose card says the outcome.

    Raises
    ------
    ModelError
        As `calibrate`; when the model cannot be used or the copy not be written.
    InputError
        When an image cannot be read, or lacks the model's channels.
    """
    path = find_model(model)
    segmenter = load_segmenter(path)
    empty = calibrate(segmenter, (_normalised(file, segmenter.card) for file in files))
    network, card = load_model(path)
    write_model(destination, network, card.model_copy(update={"empty": empty}), storage_of(path))
    return empty


def _normalised(file: Path, card: ModelCard) -> Array:
    """An image in memory, as the model would see it."""
    with open_slide(file) as slide:
        channels = select_channels(slide, None, len(card.channels))
        box = Box(0, 0, *slide.shape[1:])
        pixels = slide.read(box)[list(channels)]
    return normalise(pixels, find_ranges(pixels, card, Settings()))


def calibrate(segmenter: Segmenter, images: Iterable[Array]) -> Empty:
    """What the model sees nothing in, for its card.

    Parameters
    ----------
    segmenter
        Its outputs include a foreground.
    images
        (C, Y, X) float32, normalised by the model's rule; with objects as it was trained for.

    Raises
    ------
    ModelError
        When it has no foreground, or sees nothing in any image.
    """
    smallest = min(
        (contrast for image in images for _, contrast in seen_contrasts(segmenter, image)),
        default=math.inf,
    )
    if not math.isfinite(smallest):
        raise ModelError(
            f"model {segmenter.card.name} sees no object in these images; choose images with objects"
        )
    allowed = math.floor(smallest / MARGIN * 1000) / 1000
    return Empty(level=LEVEL, contrast=allowed, foreground=FOREGROUND)


def seen_contrasts(segmenter: Segmenter, image: Array) -> Iterator[tuple[Change, float]]:
    """For each change of an image (C, Y, X) the smallest contrast about a pixel that is still seen."""
    if "foreground" not in segmenter.outputs:
        raise ModelError(f"model {segmenter.card.name} has no foreground")
    random = np.random.default_rng(0)
    for change in CHANGES:
        noise = random.standard_normal(image.shape, np.float32) * np.float32(change.noise)
        changed = (image * np.float32(change.factor) + noise + np.float32(change.offset)).astype(
            np.float32
        )
        seen = foreground(segmenter, changed) >= FOREGROUND
        if seen.any():
            yield change, float(contrast_about(changed, segmenter.context)[seen].min())


def foreground(segmenter: Segmenter, image: Array) -> Array:
    """Probability of the foreground of a normalised image: (Y, X) float32."""
    shape = image.shape[1], image.shape[2]
    box = Box(0, 0, *shape)
    grid = TileGrid(shape, ceil_to(CORE, segmenter.stride), segmenter.halo, segmenter.stride)
    place = segmenter.outputs.index("foreground")
    result = np.zeros(shape, np.float32)
    for tile, output in tile_outputs(image, box, grid, segmenter, segmenter.batch):
        result[tile.keep.slices] = output[place]
    return result


def contrast_about(image: Array, context: int) -> Array:
    """Contrast of the square of 2 context + 1 pixels about each pixel, mirrored: (Y, X) float32.

    Every pixel counts with the k x k squares that it lies in, as in a window that ends there.
    """
    from scipy import ndimage

    size, block = image.shape[1:], SCALES[-1]
    border = ceil_to(context, block)
    more = [(border, border + ceil_to(length, block) - length) for length in size]
    padded = np.pad(image, ((0, 0), *more), mode="reflect")
    result = np.zeros(size, np.float32)
    for plane in padded:
        for scale in SCALES:
            means = _means(plane, scale)
            extremes: list[Any] = []
            for extreme in (ndimage.maximum_filter1d, ndimage.minimum_filter1d):
                rows = extreme(means, 2 * context + 1, axis=0)
                extremes.append(extreme(rows, 2 * context + 1, axis=1))
            y, x = (slice(border, border + length) for length in size)
            np.maximum(result, scale * (extremes[0] - extremes[1])[y, x], out=result)
    return result


def _means(plane: Array, scale: int) -> Array:
    """Each pixel replaced by the mean of its square of the lattice of scale x scale pixels."""
    height, width = plane.shape
    squares = plane.reshape(height // scale, scale, width // scale, scale)
    means: Array = squares.mean((1, 3), dtype=np.float64).astype(np.float32)
    return means.repeat(scale, axis=0).repeat(scale, axis=1)
