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
from segpipe.training.targets import interior_of
from segpipe.training.weights import Weighing

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
        (N, H, W) float32: what a pixel counts.
    classes
        (N, H, W) int64, each pixel's class; None where the outputs are no classes.
    names
        Of the N samples, for messages.
    """

    images: Tensor
    maps: Tensor
    weights: Tensor
    classes: Tensor | None
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A sample with what does not depend on the step.

    ranges
        The intensities that become 0 and 1, by the card's rule: the pipeline's own.
    targets
        (M, Y, X) float16: foreground, interior, weight; or, where outputs are classes, class and weight.
    """

    sample: Sample
    ranges: Sequence[tuple[float, float]]
    targets: NDArray[np.float16]

    @classmethod
    def of(cls, sample: Sample, card: ModelCard, weighing: Weighing) -> Prepared:
        """Of a sample, for the outputs of the card."""
        ranges, labels = find_ranges(sample.pixels, card, Settings()), sample.labels
        maps = (
            [labels, weighing.of_classes(labels)]
            if card.classes
            else [labels > 0, interior_of(labels), weighing.of_objects(labels)]
        )
        return cls(sample, ranges, np.stack([one.astype(np.float16) for one in maps]))


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
        images, targets = (np.stack(parts) for parts in zip(*crops, strict=True))
        names = tuple(self.samples[number].sample.name for number in chosen)
        outputs = len(self.settings.network.outputs)
        tensor = torch.from_numpy
        if not self.settings.network.classes:
            maps, weights = targets[:, :outputs].copy(), targets[:, 2].copy()
            return Batch(tensor(images), tensor(maps), tensor(weights), None, names)
        classes, weights = targets[:, 0].astype(np.int64), targets[:, 1].copy()
        maps = (classes[:, np.newaxis] == np.arange(outputs)[:, np.newaxis, np.newaxis]).astype(
            np.float32
        )
        return Batch(tensor(images), tensor(maps), tensor(weights), tensor(classes), names)

    def _crop(self, one: Prepared, random: np.random.Generator) -> tuple[Pixels, Pixels]:
        """(C, H, W), and the targets (M, H, W)."""
        augment, shape = self.settings.augment, one.sample.labels.shape
        warp = draw_warp((shape[0], shape[1]), self.crop, augment, random)
        window = Window.of(warp, (shape[0], shape[1]), self.crop)
        part = (slice(None), window.rows, window.columns)
        image = window.sample(normalise(one.sample.pixels[part], one.ranges))
        if self.settings.network.classes:
            targets = window.sample(one.targets[part], order=0)
        else:
            targets = window.sample(one.targets[part])
            targets[0] = targets[0] >= 0.5
            targets[1] *= targets[0]
        return vary_intensity(image, augment, random), targets


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
