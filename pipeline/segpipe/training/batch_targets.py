"""What a batch should give, as tensors on the network's device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Targets:
    """What a batch should give; H and W are those of the network's output.

    Parameters
    ----------
    maps
        (N, K, H, W) float32 in [0, 1], a map for each output; of classes, 1 where a pixel is of it.
    weights
        (N, H, W) float32, what a pixel counts in a cross-entropy; None: 1.
    classes
        (N, H, W) int64 in [0, K), for networks whose outputs exclude each other; else None.

    Raises
    ------
    ValueError
        When shapes do not fit each other.
    """

    maps: Tensor
    weights: Tensor | None = None
    classes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.maps.ndim != 4:
            raise ValueError(f"maps are {tuple(self.maps.shape)}; expected (N, K, H, W)")
        expected = (self.maps.shape[0], *self.maps.shape[2:])
        for name, tensor in (("weights", self.weights), ("classes", self.classes)):
            if tensor is not None and tensor.shape != expected:
                raise ValueError(f"{name} are {tuple(tensor.shape)}; expected {expected}")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def without_border(self, pixels: int) -> Targets:
        """What is left for a network whose output is so much smaller on each side."""
        if not pixels:
            return self
        return self._each(lambda tensor: tensor[..., pixels:-pixels, pixels:-pixels])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Targets:
        return Targets(
            change(self.maps),
            None if self.weights is None else change(self.weights),
            None if self.classes is None else change(self.classes),
        )
