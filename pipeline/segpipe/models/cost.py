"""What one call of a network takes: floating-point operations, and memory of its activations.

Both come from the network itself, run on tensors without data (torch's device "meta"), so that nothing
is computed and a new architecture needs no table.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from segpipe.models.card import ModelCard
from segpipe.models.network import Network, build_network


def count_operations(card: ModelCard, window: tuple[int, int], halo: int) -> int:
    """Floating-point operations for the core of one window; multiplying and adding are two.

    Parameters
    ----------
    window
        Height and width in pixels, such as the network takes.
    halo
        Pixels on each side that are not wanted.
    """
    from torch.utils.flop_counter import FlopCounterMode  # torch's compiler: more than a second

    network, windows = _without_data(card, window, 1)
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        network.forward_core(windows, halo)
    return int(counted.get_total_flops())


def activation_bytes(
    card: ModelCard, window: tuple[int, int], halo: int, batch: int, *, folded: bool
) -> int:
    """The most that tensors in float32 hold at once in a call with `batch` windows.

    Of what its layers read and write; each counts until nothing needs it. The windows do, weights do
    not.

    Parameters
    ----------
    window, halo
        As in `count_operations`.
    folded
        Whether batch norm is part of the convolution before it, as a compiler leaves it.
    """
    network, windows = _without_data(card, window, batch)
    if folded:
        _fold_norms(network)
    live = LiveTensors()
    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(live.see)
    with torch.inference_mode():
        network.forward_core(windows, halo)
    return live.peak_bytes


def weight_bytes(card: ModelCard) -> int:
    """Of the weights in float32."""
    network, _ = _without_data(card, (1, 1), 1)
    return sum(tensor.nbytes for tensor in network.state_dict().values())


def _without_data(card: ModelCard, window: tuple[int, int], batch: int) -> tuple[Network, Tensor]:
    name, parameters = card.architecture.name, card.architecture.parameters
    with torch.device("meta"):
        network = build_network(name, parameters, len(card.channels), len(card.outputs)).eval()
        return network, torch.empty(batch, len(card.channels), *window)


def _fold_norms(network: Network) -> None:
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())


class LiveTensors:
    """Counts bytes of the tensors that layers read and write, until each is freed.

    `see` is a forward hook. What is no layer, such as a concatenation, is seen as the next one's input.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._bytes = 0
        self._seen: dict[int, int] = {}

    def see(self, _module: nn.Module, inputs: Iterable[Any], output: Any) -> None:
        """Count what is new."""
        for tensor in (*inputs, output):
            self._count(tensor.untyped_storage())

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
