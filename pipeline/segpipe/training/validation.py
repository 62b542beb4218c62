"""How good the network is on whole images, by the pipeline's own inference and decode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segpipe.evaluate import Scores, score_images
from segpipe.geometry import Box, TileGrid, ceil_to
from segpipe.inference import predict_region
from segpipe.memory import label_instances
from segpipe.models.card import ModelCard
from segpipe.models.context import ModelGeometry
from segpipe.models.network import Network
from segpipe.segmenter.forward import activate
from segpipe.settings import Settings
from segpipe.stages.image import decode_of
from segpipe.training.batches import Prepared

Maps = NDArray[np.uint8]
CORE = 1024


@dataclass(frozen=True)
class Windows:
    """A network in training as inference wants it: windows -> probabilities, in float32."""

    network: Network
    device: torch.device
    outputs: tuple[str, ...]
    batch: int = 1

    def __call__(self, windows: NDArray[np.float32], /) -> NDArray[np.float32]:
        """(N, C, H, W) -> (N, K, H - 2 margin, W - 2 margin) in [0, 1]."""
        tensor = torch.from_numpy(windows).to(self.device, memory_format=torch.channels_last)
        with torch.inference_mode():
            logits = self.network(tensor)
        return activate(logits.float().cpu().contiguous().numpy(), classes=False)


def predict_maps(
    windows: Windows, geometry: ModelGeometry, prepared: Sequence[Prepared]
) -> list[Maps]:
    """Quantised probabilities (K, Y, X) of each sample, as `predict` would write them."""
    maps = []
    for one in prepared:
        height, width = one.sample.labels.shape
        box = Box(0, 0, height, width)
        core = ceil_to(CORE, geometry.stride)
        grid = TileGrid((height, width), core, geometry.halo, geometry.stride)
        maps.append(predict_region(one.sample.pixels, box, grid, box, one.ranges, windows))
    return maps


def score(maps: Iterable[Maps], prepared: Sequence[Prepared], card: ModelCard) -> Scores:
    """Of the instances that these maps decode to; `maps` have one output or two."""
    thresholds = decode_of(Settings(), card)
    return score_images(
        (one.sample.labels, label_instances(found[0], found[-1], thresholds))
        for found, one in zip(maps, prepared, strict=True)
    )


FOREGROUNDS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)
INTERIORS = (
    *((0.3,), (0.35,), (0.4,), (0.45,), (0.5,), (0.55,), (0.6,), (0.7,)),
    *((0.5, 0.3), (0.6, 0.4), (0.7, 0.5), (0.8, 0.6), (0.7, 0.5, 0.3), (0.8, 0.6, 0.4)),
)
AREAS = (5, 10, 15, 20, 30, 40, 60)


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


def summary(scores: Scores) -> dict[str, float]:
    """The figures of a validation by the names that cards and pages use."""
    return {
        "AP at IoU .50": scores.ap(0.5),
        "AP at IoU .75": scores.ap(0.75),
        "AP at IoU .90": scores.ap(0.9),
        "mean AP, IoU .50 to .90": scores.mean_ap(),
        "AP at IoU .50, mean of images": scores.ap_by_image(0.5),
        "AP at IoU .90, mean of images": scores.ap_by_image(0.9),
        "PQ": scores.pq,
        "AJI": scores.aji,
        "Dice": scores.dice,
    }


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """To three places."""
    return {name: round(value, 3) for name, value in figures.items()}
