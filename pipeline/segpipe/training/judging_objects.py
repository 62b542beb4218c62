"""Figures of a network that finds objects, and the thresholds that are best for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segpipe.evaluate import Scores, score_image, score_images
from segpipe.memory import label_instances
from segpipe.models.card import ModelCard
from segpipe.settings import Settings
from segpipe.stages.image import decode_of
from segpipe.training.batches import Prepared
from segpipe.training.validation import Maps

FOREGROUNDS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
INTERIORS = (
    *((0.3,), (0.35,), (0.4,), (0.45,), (0.5,), (0.55,), (0.6,), (0.7,)),
    *((0.5, 0.3), (0.6, 0.4), (0.7, 0.5), (0.8, 0.6), (0.7, 0.5, 0.3), (0.8, 0.6, 0.4)),
)
AREAS = (5, 10, 15, 20, 30, 40, 60)


class Objects:
    """See `segpipe.training.validation.Judge`."""

    selected_by = "mean AP, IoU .50 to .90"
    curves = ("AP at IoU .50", "AP at IoU .90", "mean AP, IoU .50 to .90")
    of_image = "AP at IoU .50"

    def figures(
        self, maps: Sequence[Maps], prepared: Sequence[Prepared], card: ModelCard
    ) -> dict[str, float]:
        """Pooled over the images unless the name says otherwise."""
        scores = score(maps, prepared, card)
        return {
            "AP at IoU .50": scores.ap(0.5),
            "AP at IoU .75": scores.ap(0.75),
            "AP at IoU .90": scores.ap(0.9),
            "mean AP, IoU .50 to .90": scores.mean_ap(),
            "AP at IoU .50, mean of images": scores.ap_by_image(0.5),
            "AP at IoU .90, mean of images": scores.ap_by_image(0.9),
            "mean AP, IoU .50 to .90, mean of images": scores.mean_ap_by_image(),
            "PQ": scores.pq,
            "AJI": scores.aji,
            "Dice": scores.dice,
        }

    def tuned(
        self, maps: Sequence[Maps], prepared: Sequence[Prepared], card: ModelCard
    ) -> ModelCard:
        """As `tune_decode`."""
        return tune_decode(maps, prepared, card)[0]

    def labels(self, found: Maps, card: ModelCard) -> NDArray[Any]:
        """Instances, by the thresholds of the card."""
        return label_instances(found[0], found[-1], decode_of(Settings(), card))

    def score(self, truth: NDArray[Any], labels: NDArray[Any]) -> float:
        """AP at IoU .50."""
        return score_image(truth, labels).ap(0.5)

    def extent(self, prepared: Sequence[Prepared]) -> str:
        """Number of objects."""
        objects = sum(len(np.setdiff1d(one.sample.labels, [0])) for one in prepared)
        return f"{objects} objects"


def score(maps: Iterable[Maps], prepared: Sequence[Prepared], card: ModelCard) -> Scores:
    """Of the instances that these maps decode to; `maps` have one output or two."""
    thresholds = decode_of(Settings(), card)
    return score_images(
        (one.sample.labels, label_instances(found[0], found[-1], thresholds))
        for found, one in zip(maps, prepared, strict=True)
    )


def tune_decode(
    maps: Sequence[Maps], prepared: Sequence[Prepared], card: ModelCard
) -> tuple[ModelCard, Scores]:
    """The card with the thresholds of the best mean AP over .50 to .90 on these maps, and the scores.

    One threshold after the other, each over its list with the others held, until none changes. Ties
    keep what there is. Use it on validation images only.
    """
    best, scores = card, score(maps, prepared, card)
    while True:
        start = best
        for name, values in _choices(len(maps[0]) > 1):
            for value in values:
                candidate = best.model_copy(
                    update={"decode": best.decode.model_copy(update={name: value})}
                )
                if candidate == best:
                    continue
                found = score(maps, prepared, candidate)
                if found.mean_ap() > scores.mean_ap():
                    best, scores = candidate, found
        if best == start:
            return best, scores


def _choices(interior: bool) -> list[tuple[str, Sequence[Any]]]:
    choices: list[tuple[str, Sequence[Any]]] = [("foreground", FOREGROUNDS), ("min_area", AREAS)]
    return choices + ([("interior", INTERIORS)] if interior else [])
