"""U-Net++: U-Nets of all depths in one another, with a head on each.

    X00 ----> X01 ----> X02 ----> X03 ----> X04      level 0; heads on X01, X02, X03, X04
      \\      / \\       / \\       / \\       /
       X10 ----> X11 ----> X12 ----> X13             level 1
         \\      / \\       / \\       /
          X20 ----> X21 ----> X22                    level 2
            \\      / \\       /
             X30 ----> X31        down: 2x2 max-pool, between nodes of column 0 only
               \\      /           up:   2x2 transposed convolution of stride 2, halves the channels
                X40               across: to every node further right in the row

A node is two 3x3 convolutions, each with batch norm if asked for and ReLU; level L has width * 2^L
channels. Node Xij sees its row's Xi0 .. Xi(j-1) and, scaled up, X(i+1)(j-1), concatenated in this
order. A head is a 1x1 convolution.

X0L needs only the nodes with i + j <= L, which are the U-Net++ of depth L. So *pruning* to level L is
taking the tensors of that network (`prune`): fewer weights, less work, and a smaller context.

Source: Zhou et al., UNet++: A Nested U-Net Architecture for Medical Image Segmentation, 2018, arXiv
1807.10165, sections 3.1 (dense skips) and 3.2 (deep supervision, pruning); form and sizes as in the
authors' Keras code: width 32, depth 4, no norm. Deviations: no dropout. The ensemble is the mean of
the heads' logits, not of their probabilities, since a network does not know whether its outputs
exclude one another.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from segpipe.errors import ModelError
from segpipe.models.network import (
    Network,
    Parameter,
    TrainingOutput,
    check_choice,
    check_flag,
    check_range,
)
from segpipe.models.unet import MAX_CHANNELS, Block, crop_border, initialise


class UNetPlusPlus(Network):
    """U-Net++: (N, C, H, W) float -> logits (N, K, H, W).

    Parameters
    ----------
    in_channels, out_channels
        C and K.
    width
        Channels of level 0; doubled at each level below.
    depth
        Number of poolings. A network pruned to level L has depth L.
    norm
        "batch": batch norm between convolution and ReLU; "none": as in the authors' code.
    up
        "transposed": a convolution that halves the channels, as in the authors' code; "bilinear":
        without weights; "corners": bilinear with aligned corners, as much published code has it.
        Where a pixel looks then depends on the size of the window and its place in it, so that the
        network is not exact; in the middle of a window it does what "bilinear" does.
    deep_supervision
        Whether there is a head on each of X01 .. X0depth, and the output is their mean; else there
        is one on the last.

    Raises
    ------
    ModelError
        When a parameter is out of bounds; nothing has been allocated then.

    Examples
    --------
    >>> network = UNetPlusPlus(width=1)
    >>> network.stride, network.admissible(48), network.admissible(56)
    (16, True, False)
    """

    margin = 0

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        width: int = 32,
        depth: int = 4,
        norm: str = "none",
        up: str = "transposed",
        deep_supervision: bool = True,
    ) -> None:
        check_range("in_channels", in_channels, 1, 256)
        check_range("out_channels", out_channels, 1, 256)
        check_range("depth", depth, 1, 6)
        check_range("width", width, 1, MAX_CHANNELS // 2**depth)
        check_choice("norm", norm, ("none", "batch"))
        check_choice("up", up, ("transposed", "bilinear", "corners"))
        check_flag("deep_supervision", deep_supervision)
        super().__init__()
        self.channels = in_channels
        self.outputs = out_channels
        self.stride = 2**depth
        self.exact = up != "corners"
        self.width, self.depth, self.norm, self.scaling = width, depth, norm, up

        def node(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                Block(inputs, outputs, "same", norm), Block(outputs, outputs, "same", norm)
            )

        widths = [width * 2**level for level in range(depth + 1)]
        self.pool = nn.MaxPool2d(2)
        self.nodes = nn.ModuleDict()
        self.up = nn.ModuleDict()
        for level, (inputs, outputs) in enumerate(pairwise([in_channels, *widths])):
            self.nodes[_key(level, 0)] = node(inputs, outputs)
        for level, column in self._inner_nodes():
            here, below = widths[level : level + 2]
            if up == "transposed":
                scale: nn.Module = nn.ConvTranspose2d(below, here, kernel_size=2, stride=2)
                below = here
            else:
                scale = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=up == "corners")
            self.up[_key(level, column)] = scale
            self.nodes[_key(level, column)] = node(column * here + below, here)
        self.heads = nn.ModuleDict(
            {
                str(column): nn.Conv2d(width, out_channels, kernel_size=1)
                for column in range(1 if deep_supervision else depth, depth + 1)
            }
        )
        self._extent = self._node_extents()
        initialise(self)

    def admissible(self, size: int) -> bool:
        """Whether each pooling meets an even number of pixels."""
        return size > 0 and size % self.stride == 0

    def forward(self, image: Tensor) -> Tensor:
        """Mean of the heads' logits; height and width of `image` must be `admissible`."""
        return self.forward_core(image, 0)

    def forward_training(self, image: Tensor) -> TrainingOutput:
        """Logits of every head, that of the last column last."""
        return TrainingOutput(tuple(self._head_logits(image, 0)))

    def forward_core(self, image: Tensor, halo: int) -> Tensor:
        """Logits of what lies `halo` inside the window: (N, K, H - 2 halo, W - 2 halo).

        As in the U-Net, nodes but those of column 0 begin with no more than the core and what the
        nodes after them look at.
        """
        return torch.stack(self._head_logits(image, halo)).mean(dim=0)

    def _head_logits(self, image: Tensor, halo: int) -> list[Tensor]:
        rows = self._first_column(image)  # row -> (outputs from left to right, where each begins)
        logits = []
        for column in range(1, self.depth + 1):
            for level in range(self.depth - column + 1):
                start = max(0, (halo >> level) - self._extent[level, column])
                below, below_start = rows[level + 1][column - 1]
                scaled: Tensor = self.up[_key(level, column)](below)
                inputs = [crop_border(output, start - first) for output, first in rows[level]]
                inputs.append(crop_border(scaled, start - 2 * below_start))
                rows[level].append((self.nodes[_key(level, column)](torch.cat(inputs, 1)), start))
            if str(column) in self.heads:
                output, start = rows[0][column]
                logits.append(self.heads[str(column)](crop_border(output, halo - start)))
        return logits

    def _first_column(self, image: Tensor) -> list[list[tuple[Tensor, int]]]:
        """Xi0 of each row i, of the whole window."""
        rows: list[list[tuple[Tensor, int]]] = []
        result = image
        for level in range(self.depth + 1):
            result = self.nodes[_key(level, 0)](self.pool(result) if level else result)
            rows.append([(result, 0)])
        return rows

    def _inner_nodes(self) -> list[tuple[int, int]]:
        """(level, column) of the nodes right of column 0, column by column."""
        columns = range(1, self.depth + 1)
        return [(level, column) for column in columns for level in range(self.depth - column + 1)]

    def _node_extents(self) -> dict[tuple[int, int], int]:
        """Pixels beyond the core with which each inner node begins, in its level's own.

        Its two 3x3 convolutions take 2, which see the zeros of their padding; what is left must
        cover what the nodes right of it and above it begin with, and bilinear scaling looks at one
        pixel more. With aligned corners it needs all of the window, to know where the corners are.
        """
        if self.scaling == "corners":
            return dict.fromkeys(self._inner_nodes(), sys.maxsize)
        more = 1 if self.scaling == "bilinear" else 0
        extent: dict[tuple[int, int], int] = {}
        for level, column in reversed(self._inner_nodes()):
            right = [extent[level, other] for other in range(column + 1, self.depth - level + 1)]
            above = [-(-extent[level - 1, column + 1] // 2) + more] if level else []
            extent[level, column] = 2 + max([0, *right, *above])
        return extent


def prune(network: UNetPlusPlus, level: int) -> UNetPlusPlus:
    """The network of X0L's head alone, level L from 1 to the depth: its weights are copies.

    It gives what that head of the whole network gives.

    Raises
    ------
    ModelError
        When there is no such level, or the network has no head there.
    """
    check_range("level", level, 1, network.depth)
    if str(level) not in network.heads:
        raise ModelError(
            f"the network has no head at level {level}: it was trained without deep supervision"
        )
    pruned = UNetPlusPlus(
        network.channels,
        network.outputs,
        width=network.width,
        depth=level,
        norm=network.norm,
        up=network.scaling,
        deep_supervision=False,
    )
    tensors = network.state_dict()
    pruned.load_state_dict({key: tensors[key] for key in pruned.state_dict()})
    return pruned.train(network.training)


def prune_parameters(parameters: Mapping[str, Parameter], level: int) -> dict[str, Parameter]:
    """The architecture's parameters of a network pruned to this level."""
    return {**parameters, "depth": level, "deep_supervision": False}


def _key(level: int, column: int) -> str:
    return f"{level}_{column}"
