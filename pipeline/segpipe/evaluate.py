"""How well predicted instances match the truth: AP, PQ, AJI, Dice, of an image and of many.

Counted as `stardist.matching` does (Schmidt et al. 2018, section 3): a pair of objects matches at a
threshold when its intersection over union reaches it, no object matches twice, and

    AP = tp / (tp + fp + fn)

is of all images taken together (pooled: counts are added, then divided), or the mean of the images'
own. Papers report either without saying so; here both are told, and which is which.

What has nothing to count scores 0: an image without objects, in which none are predicted, has
AP, PQ, AJI and Dice 0 (as in `stardist.matching`), though nothing is wrong with it. It does not change
pooled scores, and lowers means over images; `Scores.empty` tells how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from segpipe.image_scores import THRESHOLDS, Counts, ImageScores
from segpipe.overlaps import Overlaps

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Scores:
    """The scores of a set of images, from what was counted in each. Without further name: pooled."""

    images: tuple[ImageScores, ...]

    @cached_property
    def pooled(self) -> ImageScores:
        """What was counted in all images together."""
        return ImageScores.pooled(self.images)

    def by_image(self, score: Callable[[ImageScores], float]) -> float:
        """Mean of a score over the images, such as `scores.by_image(lambda image: image.pq)`."""
        return sum(score(one) for one in self.images) / len(self.images)

    @property
    def empty(self) -> int:
        """Images without an object in truth and prediction: each counts as 0 in means over images."""
        return sum(one.empty for one in self.images)

    def ap(self, tau: float = 0.5) -> float:
        """Pooled AP at this threshold."""
        return self.pooled.ap(tau)

    def ap_by_image(self, tau: float = 0.5) -> float:
        """Mean over images of the AP at this threshold."""
        return self.by_image(lambda one: one.ap(tau))

    def mean_ap(self, low: float = 0.5, high: float = 0.9) -> float:
        """Mean of the pooled AP over the thresholds from `low` to `high`."""
        return self.pooled.mean_ap(low, high)

    def mean_ap_by_image(self, low: float = 0.5, high: float = 0.9) -> float:
        """Mean over images of the mean AP over the thresholds from `low` to `high`."""
        return self.by_image(lambda one: one.mean_ap(low, high))

    @property
    def pq(self) -> float:
        """Pooled panoptic quality."""
        return self.pooled.pq

    @property
    def aji(self) -> float:
        """Pooled aggregated Jaccard index."""
        return self.pooled.aji

    @property
    def dice(self) -> float:
        """Pooled Dice."""
        return self.pooled.dice


def score_image(
    truth: Array, predicted: Array, thresholds: Sequence[float] = THRESHOLDS
) -> ImageScores:
    """The scores of a predicted label image, (Y, X) integers, against the truth of the same shape.

    Raises
    ------
    ValueError
        When shapes differ, an id is no integer from 0 to 2^32 - 1, or a threshold is not in [.5, 1].
    """
    return ImageScores.of(Overlaps.of(truth, predicted), thresholds)


def score_images(
    pairs: Iterable[tuple[Array, Array]], thresholds: Sequence[float] = THRESHOLDS
) -> Scores:
    """The scores of pairs (truth, predicted) of label images, one in memory at a time.

    Raises
    ------
    ValueError
        As `score_image`.
    """
    return Scores(tuple(score_image(*pair, thresholds) for pair in pairs))


def count_matches(truth: Array, predicted: Array) -> Counts:
    """Matches at an intersection over union of .5, of (Y, X) integer labels, 0 is background.

    Raises
    ------
    ValueError
        As `score_image`.
    """
    pairs = Overlaps.of(truth, predicted)
    tp = len(pairs.matches)
    return Counts(tp, len(pairs.second_ids) - tp, len(pairs.first_ids) - tp)
