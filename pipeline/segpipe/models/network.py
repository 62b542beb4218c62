"""What the tiling must know of a network, and the table of the networks there are.

A network is one file in this folder: a subclass of `Network` whose arguments are
`in_channels`, `out_channels` and its own parameters, each with a default. To add one, write the
file and name it in `NETWORKS`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segpipe.errors import ModelError
from segpipe.models.card import nearest

Parameter = int | float | str | bool

NETWORKS: Mapping[str, str] = {
    "unet": "segpipe.models.unet:UNet",
    "unetplusplus": "segpipe.models.unetplusplus:UNetPlusPlus",
    "unet3plus": "segpipe.models.unet3plus:UNet3Plus",
    "resunet": "segpipe.models.resunet:ResUNet",
    "mobileunet": "segpipe.models.mobileunet:MobileUNet",
    "effunet": "segpipe.models.effunet:EffUNet",
}
"""Architecture name -> module and class, imported when first built."""


class TrainingOutput(NamedTuple):
    """What the losses see of a network in training.

    sides
        Logits, each (N, K, H - 2 margin, W - 2 margin): the deepest supervised output last. Without
        deep supervision there is one, what `forward` gives.
    classification
        (N, K) logits of whether an output occurs in the image at all, of a network that has such a
        head (U-Net 3+'s classification-guided module), else None.
    """

    sides: tuple[Tensor, ...]
    classification: Tensor | None = None


class WholeWindow(nn.Module):
    """Base of operations that look at all of a window: squeeze-and-excite, a classification's gate.

    They return a tensor of their first argument's shape. A network that has one is not exact, and
    its context is that of the rest: `segpipe.models.context` takes the first argument as the result.
    """


def whole_window_operations(network: nn.Module) -> list[str]:
    """Names of the operations of a network that look at all of a window, each once."""
    kinds = (type(module) for module in network.modules() if isinstance(module, WholeWindow))
    return sorted({kind.__name__ for kind in kinds})


class Network(nn.Module):
    """Base of every network: (N, C, H, W) float -> logits (N, K, H - 2 margin, W - 2 margin).

    Pooling must be a submodule (`nn.MaxPool2d`), not a function, so that `segpipe.models.context`
    can replace it.
    """

    channels: int
    """C, the channels of the input."""
    stride: int
    """Shifting the input by this many pixels shifts the output alike."""
    margin: int
    """Pixels by which the output is smaller on each side: 0 where convolutions are padded."""
    exact: bool
    """Whether every operation is local and shift-equivariant, so that tiling cannot be seen."""

    def admissible(self, size: int) -> bool:
        """Whether the network takes an input of `size` pixels along an axis."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """Logits of `image`."""
        raise NotImplementedError

    def forward_training(self, image: Tensor) -> TrainingOutput:
        """Logits of every output that a loss supervises; without deep supervision `forward`'s."""
        return TrainingOutput((self(image),))

    def forward_core(self, image: Tensor, halo: int) -> Tensor:
        """Logits of the pixels that are at least `halo` from the border: what `forward` gives there.

        (N, K, H - 2 halo, W - 2 halo). A network may compute less for it than for the whole window:
        nobody wants the halo's outputs.

        Parameters
        ----------
        halo
            At least the margin.
        """
        rim = halo - self.margin
        logits: Tensor = self(image)
        return logits[..., rim:-rim, rim:-rim] if rim else logits


def build_network(
    name: str, parameters: Mapping[str, Parameter], in_channels: int, out_channels: int
) -> Network:
    """The network of this architecture, freshly initialised.

    Raises
    ------
    ModelError
        When there is no such architecture or parameter, or a value is out of bounds. Bounds are
        checked before anything is allocated: the parameters may come from a hostile file.
    """
    network = _network_class(name)
    known = [
        key
        for key in inspect.signature(network).parameters
        if key not in ("in_channels", "out_channels")
    ]
    for key in parameters:
        if key not in known:
            raise ModelError(
                f"architecture {name} has no parameter {key!r}{nearest(key, known)}; "
                f"it has {', '.join(known)}"
            )
    return network(in_channels=in_channels, out_channels=out_channels, **parameters)


def build_twin(
    name: str, parameters: Mapping[str, Parameter], in_channels: int, out_channels: int
) -> Network:
    """The same architecture at width 1, where it has a width: same geometry, almost no cost."""
    narrow = dict(parameters)
    if "width" in inspect.signature(_network_class(name)).parameters:
        narrow["width"] = 1
    return build_network(name, narrow, in_channels, out_channels)


def describe_tensors(
    name: str, parameters: Mapping[str, Parameter], in_channels: int, out_channels: int
) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of what a model file of this architecture holds; allocates nothing.

    Batch norm's counter of batches is not among them: it serves only a training that goes on.
    """
    with torch.device("meta"):
        network = build_network(name, parameters, in_channels, out_channels)
    return {
        key: tuple(tensor.shape)
        for key, tensor in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


def check_range(name: str, value: object, low: int, high: int) -> None:
    """Refuse an architecture parameter that is not an integer from `low` to `high`.

    Raises
    ------
    ModelError
        When it is not.
    """
    if type(value) is not int or not low <= value <= high:
        raise ModelError(f"{name} is {value!r}; expected an integer from {low} to {high}")


def check_flag(name: str, value: object) -> None:
    """Refuse an architecture parameter that is neither true nor false.

    Raises
    ------
    ModelError
        When it is not.
    """
    if type(value) is not bool:
        raise ModelError(f"{name} is {value!r}; expected true or false")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse an architecture parameter that is none of `choices`.

    Raises
    ------
    ModelError
        When it is not.
    """
    if value not in (known := list(choices)):
        raise ModelError(
            f"{name} is {value!r}{nearest(str(value), known)}; expected {' or '.join(known)}"
        )


def _network_class(name: str) -> type[Network]:
    check_choice("architecture", name, NETWORKS)
    module, _, symbol = NETWORKS[name].partition(":")
    found: type[Network] = getattr(importlib.import_module(module), symbol)
    return found
