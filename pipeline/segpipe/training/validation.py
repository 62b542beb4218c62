"""How good the network is on whole images, by the pipeline's own inference and decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from segpipe.geometry import Box, TileGrid, ceil_to
from segpipe.inference import predict_region
from segpipe.models.card import ModelCard
from segpipe.models.geometry import ModelGeometry
from segpipe.models.network import Network
from segpipe.segmenter.forward import activate
from segpipe.training.batches import Prepared

Maps = NDArray[np.uint8]
CORE = 1024


@dataclass(frozen=True)
class Windows:
    """A network in training as inference wants it: windows -> probabilities, in float32."""

    network: Network
    device: torch.device
    card: ModelCard
    batch: int = 1

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the K outputs."""
        return self.card.outputs

    def __call__(self, windows: NDArray[np.float32], /) -> NDArray[np.float32]:
        """(N, C, H, W) -> (N, K, H - 2 margin, W - 2 margin) in [0, 1]."""
        tensor = torch.from_numpy(windows).to(self.device, memory_format=torch.channels_last)
        with torch.inference_mode():
            logits = self.network(tensor)
        return activate(logits.float().cpu().contiguous().numpy(), self.card.classes)


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


class Judge(Protocol):
    """What the figures of a training are: those of objects, or of classes.

    `maps` and `prepared` below go together: probabilities and truth of the validation images.
    """

    @property
    def selected_by(self) -> str:
        """The figure by which the best weights are chosen; the larger the better."""

    @property
    def curves(self) -> tuple[str, ...]:
        """The figures that are followed through the training."""

    @property
    def of_image(self) -> str:
        """What `score` gives."""

    def figures(
        self, maps: Sequence[Maps], prepared: Sequence[Prepared], card: ModelCard
    ) -> dict[str, float]:
        """All figures, by the names that cards and pages use."""

    def tuned(
        self, maps: Sequence[Maps], prepared: Sequence[Prepared], card: ModelCard
    ) -> ModelCard:
        """The card with the thresholds that are best on these images, if there are any."""

    def labels(self, found: Maps, card: ModelCard) -> NDArray[Any]:
        """The labels that `predict` makes of the probabilities of an image: (Y, X)."""

    def score(self, truth: NDArray[Any], labels: NDArray[Any]) -> float:
        """How good the labels of one image are."""

    def extent(self, prepared: Sequence[Prepared]) -> str:
        """How much was judged, such as "2,504 objects"."""


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """To three places."""
    return {name: round(value, 3) for name, value in figures.items()}
