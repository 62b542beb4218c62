"""What one call of a network takes: floating-point operations, and memory of its activations.

Both come from the network itself, run on tensors without data (torch's device "meta"), so that nothing
is computed and a new architecture needs no table.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from segpipe.models.card import ModelCard
from segpipe.models.modelfile import model_geometry
from segpipe.models.network import Network, build_network


@dataclass(frozen=True)
class Cost:
    """Of one call of a network, with one batch.

    operations
        Floating-point operations of convolutions, a multiplication and an addition counting as two.
    activation_bytes
        The most that its tensors in float32 hold at once, each counted until nothing needs it; the
        windows and the weights not counted.
    weight_bytes
        Of the weights in float32.
    """

    operations: int
    activation_bytes: int
    weight_bytes: int


def forward_cost(card: ModelCard, window: tuple[int, int], batch: int, *, folded: bool) -> Cost:
    """Cost of the network's answer for the cores of `batch` windows.

    Parameters
    ----------
    window
        Height and width in pixels, such as the network takes.
    folded
        Whether batch norm is part of the convolution before it, as a compiler leaves it.
    """
    architecture = card.architecture
    with torch.device("meta"):
        network = build_network(
            architecture.name, architecture.parameters, len(card.channels), len(card.outputs)
        ).eval()
        if folded:
            _fold_norms(network)
        windows = torch.empty(batch, len(card.channels), *window)
    halo = model_geometry(card).halo
    with torch.inference_mode():
        with _LiveTensors() as live:
            network.forward_core(windows, halo)
        with FlopCounterMode(display=False) as counted:
            network.forward_core(windows, halo)
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    return Cost(counted.get_total_flops(), live.peak_bytes, weights)


def _fold_norms(network: Network) -> None:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until each is freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._bytes = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        several = result if isinstance(result, tuple | list) else [result]
        for tensor in several:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen[key] = storage.nbytes()
        self._bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._bytes -= self._seen.pop(key, 0)
