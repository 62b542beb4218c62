"""What was counted in an image, or in several taken together, and the scores that follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe.overlaps import Overlaps, split_ids
from segpipe.pairing import assigned_pairs, best_pairs

Array = np.ndarray[Any, np.dtype[Any]]

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Of the intersection over union: those of the Data Science Bowl 2018 and of COCO."""

_SAME = 1e-9  # thresholds that differ by less are one


@dataclass(frozen=True)
class Counts:
    """Objects found (tp), found where there are none (fp) and missed (fn)."""

    tp: int
    fp: int
    fn: int

    @property
    def average_precision(self) -> float:
        """tp / (tp + fp + fn), the AP of the nuclei literature; 0 when nothing was found."""
        return _share(self.tp, self.tp + self.fp + self.fn)


@dataclass(frozen=True)
class ImageScores:
    """What was counted in an image, or in several taken together, and the scores that follow.

    thresholds
        Intersections over union from which a pair matches, each in [.5, 1].
    matched
        Pairs that match at each threshold.
    true_objects, predicted_objects
        Numbers of objects.
    found, found_iou
        Pairs that match at .5, and the sum of their intersections over union.
    split, fused
        Objects of the truth that are predicted in pieces; predicted ones that join several: see
        `split_ids`.
    common, true_area, predicted_area
        Pixels of objects in both, in the truth, in the prediction.
    aji_pixels, aji_plus_pixels
        (common, united) pixels, of which these indices are the quotients.
    """

    thresholds: tuple[float, ...]
    matched: tuple[int, ...]
    true_objects: int
    predicted_objects: int
    found: int
    found_iou: float
    split: int
    fused: int
    common: int
    true_area: int
    predicted_area: int
    aji_pixels: tuple[int, int]
    aji_plus_pixels: tuple[int, int]

    @classmethod
    def of(cls, pairs: Overlaps, thresholds: Sequence[float] = THRESHOLDS) -> ImageScores:
        """The scores of an image; `pairs` has the truth first, and the prediction second.

        Raises
        ------
        ValueError
            When a threshold is not in [.5, 1].
        """
        wrong = [tau for tau in thresholds if not 0.5 <= tau <= 1]
        if wrong:
            raise ValueError(f"threshold {wrong[0]} is not in [.5, 1]")
        iou = pairs.iou[pairs.matches]
        return cls(
            thresholds=tuple(float(tau) for tau in thresholds),
            matched=tuple(int(np.count_nonzero(iou >= tau)) for tau in thresholds),
            true_objects=len(pairs.first_ids),
            predicted_objects=len(pairs.second_ids),
            found=len(iou),
            found_iou=float(iou.sum()),
            split=len(split_ids(pairs)),
            fused=len(split_ids(pairs.swapped)),
            common=int(pairs.common.sum()),
            true_area=int(pairs.first_areas.sum()),
            predicted_area=int(pairs.second_areas.sum()),
            aji_pixels=_aji_pixels(pairs, best_pairs(pairs)),
            aji_plus_pixels=_aji_pixels(pairs, assigned_pairs(pairs)),
        )

    @classmethod
    def pooled(cls, images: Sequence[ImageScores]) -> ImageScores:
        """What was counted in all of these.

        Raises
        ------
        ValueError
            When there are none, or thresholds differ.
        """
        if len({one.thresholds for one in images}) != 1:
            raise ValueError(f"cannot pool {len(images)} images, or their thresholds differ")

        def total(of: Callable[[ImageScores], int]) -> int:
            return sum(of(one) for one in images)

        return cls(
            thresholds=images[0].thresholds,
            matched=tuple(sum(column) for column in zip(*(i.matched for i in images), strict=True)),
            true_objects=total(lambda i: i.true_objects),
            predicted_objects=total(lambda i: i.predicted_objects),
            found=total(lambda i: i.found),
            found_iou=sum(one.found_iou for one in images),
            split=total(lambda i: i.split),
            fused=total(lambda i: i.fused),
            common=total(lambda i: i.common),
            true_area=total(lambda i: i.true_area),
            predicted_area=total(lambda i: i.predicted_area),
            aji_pixels=(total(lambda i: i.aji_pixels[0]), total(lambda i: i.aji_pixels[1])),
            aji_plus_pixels=(
                total(lambda i: i.aji_plus_pixels[0]),
                total(lambda i: i.aji_plus_pixels[1]),
            ),
        )

    @property
    def empty(self) -> bool:
        """There is no object, and none was predicted."""
        return self.true_objects == self.predicted_objects == 0

    @property
    def missed(self) -> int:
        """Objects of the truth without a match at .5."""
        return self.true_objects - self.found

    @property
    def false(self) -> int:
        """Predicted objects without a match at .5."""
        return self.predicted_objects - self.found

    def counts(self, tau: float = 0.5) -> Counts:
        """Matches at this threshold.

        Raises
        ------
        ValueError
            When it is none of `thresholds`.
        """
        for known, tp in zip(self.thresholds, self.matched, strict=True):
            if abs(known - tau) < _SAME:
                return Counts(tp, self.predicted_objects - tp, self.true_objects - tp)
        raise ValueError(f"threshold {tau} is none of {self.thresholds}")

    def ap(self, tau: float = 0.5) -> float:
        """tp / (tp + fp + fn) at this threshold.

        Raises
        ------
        ValueError
            When it is none of `thresholds`.
        """
        return self.counts(tau).average_precision

    def mean_ap(self, low: float = 0.5, high: float = 0.9) -> float:
        """Mean of `ap` over the thresholds from `low` to `high`, both included.

        Raises
        ------
        ValueError
            When there are none.
        """
        taus = [tau for tau in self.thresholds if low - _SAME < tau < high + _SAME]
        if not taus:
            raise ValueError(f"none of {self.thresholds} is from {low} to {high}")
        return sum(self.ap(tau) for tau in taus) / len(taus)

    @property
    def pq(self) -> float:
        """Panoptic quality, `rq` times `sq` (Kirillov et al. 2019, equation 1).

        There a match is above .5; here, as in `stardist.matching`, .5 is one.
        """
        return self.rq * self.sq

    @property
    def rq(self) -> float:
        """Recognition quality: tp / (tp + fp / 2 + fn / 2) at .5."""
        return _share(2 * self.found, self.true_objects + self.predicted_objects)

    @property
    def sq(self) -> float:
        """Segmentation quality: the mean intersection over union of the matches at .5."""
        return _share(self.found_iou, self.found)

    @property
    def aji(self) -> float:
        """Aggregated Jaccard index (Kumar et al. 2017, algorithm 1).

        Each object of the truth takes the predicted one of the largest intersection over union, of
        equals the one with the smallest id, even one that was taken before. One that nothing overlaps
        takes none: its pixels are added to the union, as are those of predicted objects not taken.
        """
        return _share(*self.aji_pixels)

    @property
    def aji_plus(self) -> float:
        """`aji` with each predicted object taken once at most, so that the sum of intersections over
        union is the largest (Graham et al. 2019, HoVer-Net)."""
        return _share(*self.aji_plus_pixels)

    @property
    def dice(self) -> float:
        """2 |T and P| / (|T| + |P|) of the pixels of all objects: who is who does not count."""
        return _share(2 * self.common, self.true_area + self.predicted_area)


def _share(part: float, whole: float) -> float:
    return part / whole if part else 0.0


def _aji_pixels(pairs: Overlaps, chosen: Array) -> tuple[int, int]:
    """Common and united pixels of the chosen pairs; objects in none of them are added to the latter."""
    first, second = pairs.first[chosen], pairs.second[chosen]
    alone = pairs.first_areas.sum() - pairs.first_areas[np.unique(first)].sum()
    alone += pairs.second_areas.sum() - pairs.second_areas[np.unique(second)].sum()
    return int(pairs.common[chosen].sum()), int(pairs.union[chosen].sum() + alone)
