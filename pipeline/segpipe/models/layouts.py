"""State dicts of other people's U-Nets, as the tables of what their tensors are called here.

A layout names every module of a network written elsewhere and the module of ours that has its weights.
What is not a matter of names is said by its other fields:

    up_first   they put the up-scaled channels before the skip's in a concatenation, ours come after:
               the first convolution of each decoder level gets the halves of its inputs exchanged
    narrow     modules that have half of our channels: the missing weights are zeros, and so are the
               channels that they give, so that the network computes the same
    biasless   its convolutions have no bias: they get zeros

Layouts known, all with batch norm and padded convolutions:

    overview   the U-Net and U-Net++ of the widely copied lecture on the U-Net family (11 classes; 512 x
               512 pixels baked in). Its U-Net gives 64 channels instead of 128 at the end of decoder
               level 1. Its U-Net++ is that of jinglescode.github.io/2019/12/02.
    milesial   github.com/milesial/Pytorch-UNet, with transposed convolutions
    nested     github.com/4uiiurz1/pytorch-nested-unet, its NestedUNet

The U-Net++ of both kinds scales up bilinearly with aligned corners: what a pixel sees then depends on
the window's size and its place in it, and tiling would show. They are imported as `up: bilinear`, which
does the same in the middle of a window, and needs no size; `up: corners` in the card's parameters keeps
their own arithmetic, and is not exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from segpipe.errors import ModelError
from segpipe.models.network import Parameter, describe_tensors

DEPTH = 4
"""Of every network here; levels are 0 to 4."""
BLOCK = ("0.conv", "0.norm", "1.conv", "1.norm")
"""The modules with weights of a level or a node of ours, in their order."""

Names = Mapping[str, str]
"""Module of theirs -> module of ours."""


@dataclass(frozen=True)
class Layout:
    """How a network written elsewhere names its tensors; see the top of the module."""

    name: str
    architecture: str
    parameters: Mapping[str, Parameter]
    """Ours, but for the width."""
    names: Names
    first: str
    """Their first convolution: its outputs are the width, and by its name they are recognised."""
    up_first: bool = False
    narrow: tuple[str, ...] = ()
    biasless: bool = False


def _block(theirs: tuple[str, str, str, str], ours: str) -> dict[str, str]:
    return {their: f"{ours}.{part}" for their, part in zip(theirs, BLOCK, strict=True)}


def _overview_unet() -> Names:
    names = {"score_fr": "head"}
    for level in range(DEPTH + 1):
        first, second = f"enc{level + 1}_1", f"enc{level + 1}_2"
        names |= _block(
            (f"{first}.0", f"{first}.1", f"{second}.0", f"{second}.1"), f"encoder.{level}"
        )
    for level in range(DEPTH):
        first, second = f"dec{level + 1}_2", f"dec{level + 1}_1"  # counted towards the output
        names |= _block(
            (f"{first}.0", f"{first}.1", f"{second}.0", f"{second}.1"), f"decoder.{level}"
        )
        names[f"unpool{level + 1}"] = f"up.{level}"
    return names


def _milesial() -> Names:
    def double(name: str) -> tuple[str, str, str, str]:
        return (f"{name}.0", f"{name}.1", f"{name}.3", f"{name}.4")

    names = {"outc.conv": "head", **_block(double("inc.double_conv"), "encoder.0")}
    for level in range(1, DEPTH + 1):
        names |= _block(double(f"down{level}.maxpool_conv.1.double_conv"), f"encoder.{level}")
    for level in range(DEPTH):
        names |= _block(double(f"up{DEPTH - level}.conv.double_conv"), f"decoder.{level}")
        names[f"up{DEPTH - level}.up"] = f"up.{level}"
    return names


def _nested(heads: Names) -> Names:
    names = dict(heads)
    for level in range(DEPTH + 1):
        for column in range(DEPTH - level + 1):
            node = f"conv{level}_{column}"
            names |= _block(
                (f"{node}.conv1", f"{node}.bn1", f"{node}.conv2", f"{node}.bn2"),
                f"nodes.{level}_{column}",
            )
    return names


UNET: Mapping[str, Parameter] = {"depth": DEPTH, "padding": "same", "norm": "batch"}
NESTED: Mapping[str, Parameter] = {"depth": DEPTH, "norm": "batch", "up": "bilinear"}
LAYOUTS = (
    Layout(
        "the overview's U-Net",
        "unet",
        UNET,
        _overview_unet(),
        "enc1_1.0",
        up_first=True,
        narrow=("decoder.1.1.conv", "decoder.1.1.norm", "up.0"),
    ),
    Layout(
        "the overview's U-Net++",
        "unetplusplus",
        NESTED,
        _nested({f"seg_outputs.{column}": f"heads.{column + 1}" for column in range(DEPTH)}),
        "conv0_0.conv1",
    ),
    Layout("milesial's U-Net", "unet", UNET, _milesial(), "inc.double_conv.0", biasless=True),
    Layout(
        "a nested U-Net with four heads",
        "unetplusplus",
        NESTED,
        _nested({f"final{column}": f"heads.{column}" for column in range(1, DEPTH + 1)}),
        "conv0_0.conv1",
    ),
    Layout(
        "a nested U-Net with one head",
        "unetplusplus",
        {**NESTED, "deep_supervision": False},
        _nested({"final": f"heads.{DEPTH}"}),
        "conv0_0.conv1",
    ),
)


def recognise(tensors: Mapping[str, Tensor], source: str) -> Layout | None:
    """The layout by which these tensors are named, or None; `source` names them in messages.

    Raises
    ------
    ModelError
        When they begin as a layout does, but a module lacks or is not of it: another version of
        that network, or another depth.
    """
    modules = {_split(key)[0] for key in tensors}
    begun = [layout for layout in LAYOUTS if f"{layout.first}.weight" in tensors]
    for layout in begun:
        if modules == layout.names.keys():
            return layout
    if not begun:
        return None
    layout = min(begun, key=lambda layout: len(modules ^ layout.names.keys()))
    apart = min(modules ^ layout.names.keys())
    what = f"has {apart[:100]}, which that has not" if apart in modules else f"lacks {apart}"
    raise ModelError(
        f"{source}: tensors are named as in {layout.name}, but it {what}: another version"
    )


def architecture_fields(
    layout: Layout, tensors: Mapping[str, Tensor], given: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """The card's `architecture` for tensors of this layout.

    Parameters
    ----------
    given
        What the user says of it: parameters of theirs go before those of the layout.

    Raises
    ------
    ModelError
        When the user names another architecture.
    """
    name = given.get("name", layout.architecture)
    if name != layout.architecture:
        raise ModelError(
            f"{source}: the card says architecture {name}, but the tensors are named as in "
            f"{layout.name}, which is {layout.architecture}"
        )
    if not isinstance(given.get("parameters", {}), Mapping):
        return dict(given)  # for the card to complain of
    width = next(iter(tensors[f"{layout.first}.weight"].shape), 0)
    parameters = {"width": width, **layout.parameters, **given.get("parameters", {})}
    return {"name": name, "parameters": parameters}


def translate(
    layout: Layout,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Parameter],
    in_channels: int,
    out_channels: int,
) -> dict[str, Tensor]:
    """The tensors as our network names and orders them; what does not fit is left as it is.

    Parameters
    ----------
    parameters, in_channels, out_channels
        Of our network.

    Raises
    ------
    ModelError
        When a parameter is out of bounds.
    """
    shapes = describe_tensors(layout.architecture, parameters, in_channels, out_channels)
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, leaf = _split(key)
        result[f"{layout.names[module]}.{leaf}"] = tensor
    if layout.biasless:
        for key, shape in shapes.items():
            if key.endswith(".conv.bias") and key not in result:
                result[key] = torch.zeros(shape)
    if layout.up_first:
        for level in range(DEPTH):
            key = f"decoder.{level}.0.conv.weight"
            if key in result and result[key].dim() == 4:
                scaled, skip = result[key].chunk(2, dim=1)
                result[key] = torch.cat([skip, scaled], dim=1)
    for key in list(result):
        if key.startswith("heads.") and key not in shapes:
            del result[key]  # of a network whose last head alone is wanted
        elif _split(key)[0] in layout.narrow and key in shapes:
            result[key] = _pad(result[key], shapes[key])
    return result


def _pad(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`tensor` with as many zeros after it along every axis of which it has half."""
    padded = tensor
    for axis, size in enumerate(shape[: tensor.dim()]):
        if 2 * padded.shape[axis] == size:
            padded = torch.cat([padded, torch.zeros_like(padded)], dim=axis)
    return padded


def _split(key: str) -> tuple[str, str]:
    """(module, tensor of the module)."""
    module, _, leaf = key.rpartition(".")
    return module, leaf
