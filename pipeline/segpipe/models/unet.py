"""The U-Net, padded or not, at any width and depth.

    level 0   image -> [block block] ------------- skip ------------> cat -> [block block] -> head
                            | pool                                     ^ up
    level 1            [block block] ---------- skip ------> cat -> [block block]
                            | pool                            ^ up
    level d                 +------------> [block block] -----+

A block is a 3x3 convolution, batch norm if asked for, and ReLU. Level L has width * 2^L channels.
Pooling takes the maximum of 2x2 pixels; `up` is a 2x2 transposed convolution of stride 2, which
halves the channels. The skip comes first in the concatenation, cropped to the centre if the
convolutions are not padded.

Source: Ronneberger, Fischer and Brox, U-Net: Convolutional Networks for Biomedical Image
Segmentation, 2015, arXiv 1505.04597, section 2 (network) and section 3 (initialisation). Its form
is the default here: width 64, depth 4, unpadded, no norm. Deviation: no dropout.
"""

from __future__ import annotations

from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor, nn

from segpipe.models.network import Network, check_choice, check_range

MAX_CHANNELS = 4096
"""At the deepest level: 64 times the paper's weights, and still a network that can be built."""


class Block(nn.Module):
    """3x3 convolution -> batch norm, or nothing -> ReLU."""

    def __init__(self, inputs: int, outputs: int, padding: str, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size=3, padding=padding)
        self.norm = nn.BatchNorm2d(outputs) if norm == "batch" else nn.Identity()
        self.activation = nn.ReLU(inplace=True)

    def forward(self, image: Tensor) -> Tensor:
        """(N, outputs, H, W), or 2 pixels smaller along both axes where not padded."""
        result: Tensor = self.activation(self.norm(self.conv(image)))
        return result


class UNet(Network):
    """U-Net: (N, C, H, W) float -> logits (N, K, H - 2 margin, W - 2 margin).

    Parameters
    ----------
    in_channels, out_channels
        C and K.
    width
        Channels of level 0; doubled at each level below.
    depth
        Number of poolings.
    padding
        "valid": convolutions lose their border, as in the paper; "same": it is padded with zeros.
    norm
        "batch": batch norm between convolution and ReLU; "none": as in the paper.

    Raises
    ------
    ModelError
        When a parameter is out of bounds; nothing has been allocated then.

    Examples
    --------
    >>> network = UNet(width=1)
    >>> network.stride, network.margin, network.admissible(572), network.admissible(576)
    (16, 92, True, False)
    """

    exact = True

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        width: int = 64,
        depth: int = 4,
        padding: str = "valid",
        norm: str = "none",
    ) -> None:
        check_range("in_channels", in_channels, 1, 256)
        check_range("out_channels", out_channels, 1, 256)
        check_range("depth", depth, 1, 7)
        check_range("width", width, 1, MAX_CHANNELS // 2**depth)
        check_choice("padding", padding, ("valid", "same"))
        check_choice("norm", norm, ("none", "batch"))
        super().__init__()
        self.channels = in_channels
        self.stride = 2**depth
        # two convolutions a level lose 2 px each at the level's scale, once on the way down
        # (levels 0..depth) and once on the way up (depth-1..0): 92 px a side for depth 4
        self.margin = 0 if padding == "same" else 2 * (3 * 2**depth - 2)

        def level(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                Block(inputs, outputs, padding, norm), Block(outputs, outputs, padding, norm)
            )

        widths = [width * 2**index for index in range(depth + 1)]
        self.encoder = nn.ModuleList(level(*pair) for pair in pairwise([in_channels, *widths]))
        self.pool = nn.MaxPool2d(2)
        self._reach = decoder_reach(depth)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(below, here, kernel_size=2, stride=2)
            for here, below in pairwise(widths)
        )
        self.decoder = nn.ModuleList(level(2 * here, here) for here in widths[:-1])
        self.head = nn.Conv2d(width, out_channels, kernel_size=1)
        initialise(self)

    def forward(self, image: Tensor) -> Tensor:
        """Logits of `image`, whose height and width must be `admissible`."""
        return self.forward_core(image, self.margin)

    def forward_core(self, image: Tensor, halo: int) -> Tensor:
        """Logits of what lies `halo` inside the window: (N, K, H - 2 halo, W - 2 halo).

        Two thirds of the work are the decoder's, which looks less far than the encoder. So each of
        its levels begins with no more than the core and its own reach; what lies further out has
        done its part in the encoder. A core of 1024 in a window of 1216 at depth 4 takes 17 % less
        arithmetic, and each pixel the same as before.
        """
        depth = len(self.up)
        cut = [0] * (depth + 1)
        if self.margin == 0:
            cut = [max(0, (halo >> index) - reach) for index, reach in enumerate(self._reach)]
        skips: list[Tensor] = []
        result = image
        for index, level in enumerate(self.encoder):
            if index == depth:  # the bottom: it has no skip
                result = level(crop_border(result, cut[index]))
            else:
                result = level(result)
                skips.append(crop_border(result, cut[index]))
                result = self.pool(result)
        for index in reversed(range(depth)):
            result = crop_border(self.up[index](result), cut[index] - 2 * cut[index + 1])
            skip = crop_centre(skips[index], result) if self.margin else skips[index]
            result = self.decoder[index](torch.cat([skip, result], dim=1))
        logits: Tensor = self.head(crop_border(result, halo - self.margin - cut[0]))
        return logits

    def admissible(self, size: int) -> bool:
        """Whether each pooling meets an even number of pixels, and some output is left."""
        if self.margin == 0:
            return size > 0 and size % self.stride == 0
        result = size
        for _ in self.up:
            result -= 4
            if result < 2 or result % 2:
                return False
            result //= 2
        return result > 4 and size > 2 * self.margin


def decoder_reach(depth: int, *, first: int = 2, level: int = 2) -> list[int]:
    """Pixels that each level, 0 to the bottom, computes beyond the core, in its own pixels.

    `first` and `level` are what the convolutions of level 0 and of the others look at: 2 for two of
    3x3. They see the zeros of their padding there, which are thrown away; what is left must cover
    what the level above begins with, at half its size: 2, 3, 4, 4, ...
    """
    reach = [first]
    for _ in range(depth):
        reach.append(-(-reach[-1] // 2) + level)
    return reach


def crop_border(image: Tensor, pixels: int) -> Tensor:
    """`image` without so many pixels on each of its four sides."""
    return image[..., pixels:-pixels, pixels:-pixels] if pixels else image


def crop_centre(image: Tensor, like: Tensor) -> Tensor:
    """The central part of `image` that has height and width of `like`."""
    y = (image.shape[-2] - like.shape[-2]) // 2
    x = (image.shape[-1] - like.shape[-1]) // 2
    return image[..., y : y + like.shape[-2], x : x + like.shape[-1]]


def initialise(network: nn.Module) -> None:
    """Draw weights from N(0, 2 / n), n the values that meet in an output pixel; biases are 0.

    He et al. 2015, arXiv 1502.01852, as in section 3 of the paper. In a 2x2 transposed convolution
    of stride 2 a pixel has one source pixel, hence n = its input channels (torch's own fan-in
    counts the output's).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            incoming = module.weight[0].numel()
        elif isinstance(module, nn.ConvTranspose2d):
            incoming = module.in_channels
        else:
            continue
        if module.weight.is_meta:  # nothing to draw; on meta torch would import its compiler, 2 s
            continue
        nn.init.normal_(module.weight, std=sqrt(2 / incoming))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
