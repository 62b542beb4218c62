"""How well predicted instances match the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Counts:
    """Objects found (tp), found where there are none (fp) and missed (fn)."""

    tp: int
    fp: int
    fn: int

    @property
    def average_precision(self) -> float:
        """tp / (tp + fp + fn), the AP of the nuclei literature; 0 when nothing was found."""
        return self.tp / (self.tp + self.fp + self.fn) if self.tp else 0.0


def count_matches(truth: Array, predicted: Array) -> Counts:
    """Matches at an intersection over union above one half.

    Above one half an object overlaps at most one partner so much, so the matching is unique and
    needs no assignment (Kirillov et al. 2019, Panoptic Segmentation, section 4.1).

    Parameters
    ----------
    truth, predicted
        (Y, X) integer labels, 0 is background.
    """
    span = int(predicted.max(initial=0)) + 1
    pairs = truth.astype(np.int64).ravel() * span + predicted.ravel()
    pairs, common = np.unique(pairs, return_counts=True)
    true_ids, predicted_ids = pairs // span, pairs % span
    true_area = np.zeros(int(truth.max(initial=0)) + 1, np.int64)
    predicted_area = np.zeros(span, np.int64)
    np.add.at(true_area, true_ids, common)
    np.add.at(predicted_area, predicted_ids, common)
    both = (true_ids > 0) & (predicted_ids > 0)
    union = true_area[true_ids] + predicted_area[predicted_ids] - common
    tp = int(np.count_nonzero(both & (2 * common > union)))
    objects = int(np.count_nonzero(true_area[1:])), int(np.count_nonzero(predicted_area[1:]))
    return Counts(tp, objects[1] - tp, objects[0] - tp)
