"""Figures of a network that gives each pixel a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segpipe.models.card import ModelCard
from segpipe.semantic import likeliest
from segpipe.training.batches import Prepared
from segpipe.training.validation import Maps


class Classes:
    """See `segpipe.training.validation.Judge`."""

    selected_by = "mean IoU"
    curves = ("mean IoU", "pixel accuracy")
    of_image = "mean IoU"

    def figures(
        self, maps: Sequence[Maps], prepared: Sequence[Prepared], card: ModelCard
    ) -> dict[str, float]:
        """Of all pixels of all images together; classes that do not occur have no figure."""
        counts = sum(
            confusion(one.sample.labels, likeliest(found)[0], len(card.outputs))
            for found, one in zip(maps, prepared, strict=True)
        )
        shares = intersections_over_unions(np.asarray(counts))
        named = zip(card.outputs, shares, strict=True)
        return {
            "mean IoU": float(np.nanmean(shares)),
            "pixel accuracy": float(np.trace(counts) / np.sum(counts)),
            **{f"IoU of {name}": float(share) for name, share in named if not np.isnan(share)},
        }

    def tuned(
        self, maps: Sequence[Maps], prepared: Sequence[Prepared], card: ModelCard
    ) -> ModelCard:
        """The card as it is: the likeliest class needs no threshold."""
        return card

    def labels(self, found: Maps, card: ModelCard) -> NDArray[Any]:
        """The likeliest class of each pixel."""
        return likeliest(found)[0]

    def score(self, truth: NDArray[Any], labels: NDArray[Any]) -> float:
        """Mean IoU of the classes that occur in the image or in its prediction."""
        count = int(max(truth.max(), labels.max())) + 1
        return float(np.nanmean(intersections_over_unions(confusion(truth, labels, count))))

    def extent(self, prepared: Sequence[Prepared]) -> str:
        """Number of pixels."""
        return f"{sum(one.sample.labels.size for one in prepared) / 1e6:.2f} million pixels"


def confusion(truth: NDArray[Any], labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    """(K, K) pixels of each class of the truth (rows) by the class they were given (columns)."""
    pairs = truth.astype(np.int64) * count + labels
    return np.bincount(pairs.ravel(), minlength=count**2).reshape(count, count).astype(np.int64)


def intersections_over_unions(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """(K,) of each class; NaN where it neither occurs nor was given."""
    common = np.diagonal(counts)
    union = counts.sum(axis=0) + counts.sum(axis=1) - common
    shares: NDArray[np.float64] = np.full(len(counts), np.nan)
    np.divide(common, union, out=shares, where=union > 0)
    return shares
