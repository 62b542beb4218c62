"""The crops of each step: a function of samples, settings and the step alone, so training resumes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segpipe.inference import normalise
from segpipe.memory import find_ranges
from segpipe.models.card import ModelCard
from segpipe.settings import Settings
from segpipe.training.augment import Window, draw_warp, vary_intensity
from segpipe.training.dataset import Sample
from segpipe.training.settings import TrainSettings
from segpipe.training.targets import interior_of, weight_map

Pixels = NDArray[np.float32]
AHEAD = 4
"""Batches that are made while the network is at work."""


@dataclass(frozen=True)
class Batch:
    """What one step sees.

    images
        (N, C, H, W) float32, normalised and varied.
    maps
        (N, K, H, W) float32 in [0, 1]: what the network is to give.
    weights
        (N, H, W) float32, at least 1: the U-Net's weight map.
    names
        Of the N samples, for messages.
    """

    images: Tensor
    maps: Tensor
    weights: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A sample with what does not depend on the step.

    ranges
        The intensities that become 0 and 1, by the card's rule: the pipeline's own.
    targets
        (3, Y, X) float16: foreground, interior, weight.
    """

    sample: Sample
    ranges: Sequence[tuple[float, float]]
    targets: NDArray[np.float16]

    @classmethod
    def of(cls, sample: Sample, card: ModelCard, weight: float) -> Prepared:
        """Of a sample; `weight` scales what the weight map adds to 1."""
        ranges = find_ranges(sample.pixels, card, Settings())
        weights = np.ones(sample.labels.shape, np.float32)
        if weight > 0:
            weights += weight * (weight_map(sample.labels) - 1)
        maps = [sample.labels > 0, interior_of(sample.labels), weights]
        return cls(sample, ranges, np.stack(maps).astype(np.float16))


@dataclass(frozen=True, eq=False)
class BatchMaker:
    """Batches by step."""

    samples: Sequence[Prepared]
    settings: TrainSettings
    crop: int
    """Pixels a side of the network's input."""
    _chances: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        # a large image holds more that differs than a small one, but not in proportion
        sizes = np.array([one.sample.labels.size for one in self.samples], np.float64)
        chances = np.sqrt(np.maximum(1, sizes / self.crop**2))
        object.__setattr__(self, "_chances", chances / chances.sum())

    def __call__(self, step: int) -> Batch:
        """The batch of this step, the same in every run."""
        random = np.random.default_rng([self.settings.seed, step])
        size = self.settings.course.batch
        chosen = random.choice(len(self.samples), size, p=self._chances)
        crops = [self._crop(self.samples[number], random) for number in chosen]
        outputs = len(self.settings.network.outputs)
        return Batch(
            torch.from_numpy(np.stack([image for image, _ in crops])),
            torch.from_numpy(np.stack([targets[:outputs] for _, targets in crops])),
            torch.from_numpy(np.stack([targets[2] for _, targets in crops])),
            tuple(self.samples[number].sample.name for number in chosen),
        )

    def _crop(self, one: Prepared, random: np.random.Generator) -> tuple[Pixels, Pixels]:
        """(C, H, W) and (3, H, W)."""
        augment, shape = self.settings.augment, one.sample.labels.shape
        warp = draw_warp((shape[0], shape[1]), self.crop, augment, random)
        window = Window.of(warp, (shape[0], shape[1]), self.crop)
        part = (slice(None), window.rows, window.columns)
        image = window.sample(normalise(one.sample.pixels[part], one.ranges))
        targets = window.sample(one.targets[part])
        foreground = (targets[0] >= 0.5).astype(np.float32)
        maps = np.stack([foreground, targets[1] * foreground, targets[2]])
        return vary_intensity(image, augment, random), maps


def batches(maker: BatchMaker, start: int, stop: int, threads: int) -> Iterator[Batch]:
    """The batches of steps [start, stop), in order, made ahead by so many threads."""
    pool = ThreadPoolExecutor(threads, "batches")
    try:
        waiting: deque[Future[Batch]] = deque()
        ahead = max(AHEAD, math.ceil(1.5 * threads))
        for step in range(start, stop):
            waiting.append(pool.submit(maker, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
