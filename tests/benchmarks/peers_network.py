"""What the peers are handed: our network and a plain decode, for environments without our stages.

Needs torch, safetensors, pydantic, pyyaml, platformdirs, tifffile and scikit-image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from skimage.measure import label
from skimage.segmentation import watershed

from segpipe.models.card import ModelCard
from segpipe.models.modelfile import find_model, load_model

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


class Predictor:
    """Normalised windows (N, C, H, W) to probabilities (N, K, H, W), in eager torch on CPU."""

    def __init__(self, model: str, layout: str, threads: int) -> None:
        torch.set_num_threads(threads)
        network, self.card = load_model(find_model(model))
        self.layout = FORMATS[layout]
        self.network = network.requires_grad_(False).eval().to(memory_format=self.layout)

    def __call__(self, windows: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():  # MONAI changes the result in place
            return self.network(windows.contiguous(memory_format=self.layout)).sigmoid_()


def normalise(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """(Y, X) float32, 0 at low and 1 at high, as segpipe does."""
    return ((pixels.astype(np.float64) - low) / (high - low)).astype(np.float32)


def seeded_watershed(probabilities: np.ndarray, card: ModelCard) -> np.ndarray:
    """Labels (Y, X) int32 by scikit-image: seeds by the rule of segpipe, growth by a watershed.

    Parameters
    ----------
    probabilities
        (2, Y, X) float32 in [0, 1]: foreground and interior. Rounded to bytes first, so that the last
        bit of a convolution decides nothing.
    """
    levels = np.floor(probabilities * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    foreground, interior = levels
    mask = foreground >= max(1, round(card.decode.foreground * 255))
    thresholds = [round(level * 255) for level in card.decode.interior]
    inside = [mask & (interior >= level) for level in thresholds]
    seeds = _seeds([*inside, mask], card.decode.min_area)
    return watershed(-interior.astype(np.int16), seeds, mask=mask, connectivity=1)


def _seeds(masks: Sequence[np.ndarray], min_area: int) -> np.ndarray:
    """Components of each mask that are large enough and hold no seed of a mask before."""
    seeds = np.zeros(masks[0].shape, np.int32)
    for mask in masks:
        components, count = label(mask, connectivity=1, return_num=True)
        good = np.bincount(components.ravel(), minlength=count + 1) >= min_area
        good[np.unique(components[seeds > 0])] = False
        good[0] = False
        numbers = np.cumsum(good) * good + good * seeds.max()
        new = numbers.astype(np.int32)[components]
        seeds = np.where(new > 0, new, seeds)
    return seeds
