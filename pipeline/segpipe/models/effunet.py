"""Eff-UNet: the features of an EfficientNet, B0 to B7, as encoder, and the U-Net's decoder.

    level 0   image                                                 up -> [block block] -> head
                | stem /2                                            ^
    level 1   [MB 16] ---------------------- skip ---> cat -> [block block]
                |                                       ^ up
    level 2   [MB 24 x2] -------- skip ---> cat -> [block block]
                |                            ^ up
    level 3   [MB 40 x2, 5x5] --> cat -> [block block]
                |                  ^ up
    level 4   [MB 80 x3, 112 x3 5x5] -> cat -> [block block]
                |                        ^ up
    level 5   [MB 192 x4 5x5, 320, 1x1 convolution to 1280]

    MB, mobile inverted bottleneck:  x -> 1x1 to 6 times the channels, norm, SiLU
        -> depthwise, norm, SiLU -> squeeze-and-excite -> 1x1 to the output's channels, norm -> (+ x)

    squeeze-and-excite:  each channel times sigmoid(dense(SiLU(dense(mean of each channel))))

The numbers are B0's. The other variants multiply channels (rounded to multiples of 8) and the units of
a stage (rounded up) by the coefficients of `VARIANTS`. x is added where stride is 1 and the channels
agree; the first stage does not widen. Convolutions that a norm follows have no bias. The decoder's level
L has width / 2 * 2^L channels; its blocks and `up` are the U-Net's, with batch norm.

The mean is one of the whole window, so the network is not exact: where the image is cut shows in the
result. Its context is that of everything else.

Sources: Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, 2019,
arXiv 1905.11946, table 1 (B0) and section 3.3 (compound scaling); Hu et al., Squeeze-and-Excitation
Networks, 2018, arXiv 1709.01507, section 3; Baheti et al., Eff-UNet: A Novel Architecture for Semantic
Segmentation in Unstructured Environment, CVPR Workshops 2020, section 3 (encoder's features to a U-Net's
decoder). Deviations: no dropout and no stochastic depth; all weights are trained here, from none that
have seen other images.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor, nn

from segpipe.models.mobileunet import LEVELS, round_channels
from segpipe.models.network import Network, WholeWindow, check_choice, check_range
from segpipe.models.unet import Block, crop_border, decoder_reach, initialise

VARIANTS = {
    # width and depth coefficient
    "b0": (1.0, 1.0),
    "b1": (1.0, 1.1),
    "b2": (1.1, 1.2),
    "b3": (1.2, 1.4),
    "b4": (1.4, 1.8),
    "b5": (1.6, 2.2),
    "b6": (1.8, 2.6),
    "b7": (2.0, 3.1),
}
STAGES = (
    # expansion, kernel, stride of the first, channels, units
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
"""Table 1 of the EfficientNet paper."""


class SqueezeExcite(WholeWindow):
    """Each channel times a number between 0 and 1 that depends on the means of all."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, squeezed)
        self.excite = nn.Linear(squeezed, channels)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W), the same."""
        means = image.mean(dim=(2, 3))
        # a vector's left-over is computed by other code than the vector, so that the last bits of a
        # few numbers depend on their slot in the batch; in double precision, rounded, they do not
        precise = means.double() if image.device.type == "cpu" else means
        squeezed = nn.functional.silu(_dense(precise, self.squeeze))
        gates = torch.sigmoid(_dense(squeezed, self.excite)).to(image.dtype)
        return image * gates[:, :, None, None]


class MBConv(nn.Module):
    """Mobile inverted bottleneck with squeeze-and-excite."""

    def __init__(
        self, inputs: int, outputs: int, *, expansion: int, size: int, stride: int
    ) -> None:
        super().__init__()
        wide = expansion * inputs
        self.residual = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *(_convolution(inputs, wide, 1) if expansion > 1 else []),
            *_convolution(wide, wide, size, stride=stride, groups=wide),
            SqueezeExcite(wide, max(1, inputs // 4)),
            nn.Conv2d(wide, outputs, kernel_size=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, image: Tensor) -> Tensor:
        """(N, outputs, H / stride, W / stride)."""
        result: Tensor = self.body(image)
        return image + result if self.residual else result


class EffUNet(Network):
    """Eff-UNet: (N, C, H, W) float -> logits (N, K, H, W).

    Parameters
    ----------
    in_channels, out_channels
        C and K.
    variant
        "b0" to "b7": by how much the encoder is wider and deeper than B0.
    width
        Channels of B0's stem: 32 in the paper. All others scale with it.

    Raises
    ------
    ModelError
        When a parameter is out of bounds; nothing has been allocated then.

    Examples
    --------
    >>> network = EffUNet(width=1)
    >>> network.stride, network.exact
    (32, False)
    """

    exact = False
    margin = 0
    stride = 2**LEVELS

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        variant: str = "b0",
        width: int = 32,
    ) -> None:
        check_range("in_channels", in_channels, 1, 256)
        check_range("out_channels", out_channels, 1, 256)
        check_choice("variant", variant, VARIANTS)
        check_range("width", width, 1, 64)
        super().__init__()
        self.channels = in_channels
        wider, deeper = VARIANTS[variant]
        wider *= width / 32
        inputs = round_channels(32 * wider)
        # one part per level; level 0 is the image
        parts: list[list[nn.Module]] = [_convolution(in_channels, inputs, 3, stride=2)]
        skips = []
        for expansion, size, stride, channels, units in STAGES:
            outputs = round_channels(channels * wider)
            if stride == 2:
                skips.append(inputs)
                parts.append([])
            for unit in range(ceil(units * deeper)):
                parts[-1].append(
                    MBConv(
                        inputs,
                        outputs,
                        expansion=expansion,
                        size=size,
                        stride=1 if unit else stride,
                    )
                )
                inputs = outputs
        bottom = 4 * inputs
        parts[-1] += _convolution(inputs, bottom, 1)
        self.encoder = nn.ModuleList(nn.Sequential(*part) for part in parts)
        widths = [*(max(1, width // 2) * 2**level for level in range(LEVELS)), bottom]
        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for level, skip in enumerate([0, *skips]):
            here, below = widths[level : level + 2]
            self.up.append(nn.ConvTranspose2d(below, here, kernel_size=2, stride=2))
            self.decoder.append(
                nn.Sequential(
                    Block(skip + here, here, "same", "batch"), Block(here, here, "same", "batch")
                )
            )
        self.head = nn.Conv2d(widths[0], out_channels, kernel_size=1)
        self._reach = decoder_reach(LEVELS)
        initialise(self)

    def admissible(self, size: int) -> bool:
        """Whether each convolution of stride 2 meets an even number of pixels."""
        return size > 0 and size % self.stride == 0

    def forward(self, image: Tensor) -> Tensor:
        """Logits of `image`, whose height and width must be `admissible`."""
        return self.forward_core(image, 0)

    def forward_core(self, image: Tensor, halo: int) -> Tensor:
        """Logits of what lies `halo` inside the window: (N, K, H - 2 halo, W - 2 halo).

        As in the U-Net, each level of the decoder begins with no more than the core and its reach.
        """
        cut = [max(0, (halo >> level) - reach) for level, reach in enumerate(self._reach)]
        skips: list[Tensor] = []  # of levels 1 .. 5
        result = image
        for level, part in enumerate(self.encoder, start=1):
            result = part(result)
            skips.append(crop_border(result, cut[level]))
        result = skips.pop()
        for level in reversed(range(LEVELS)):
            result = crop_border(self.up[level](result), cut[level] - 2 * cut[level + 1])
            if level:
                result = torch.cat([skips[level - 1], result], dim=1)
            result = self.decoder[level](result)
        logits: Tensor = self.head(crop_border(result, halo - cut[0]))
        return logits


def _convolution(
    inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Convolution without bias -> batch norm -> SiLU."""
    return [
        nn.Conv2d(
            inputs,
            outputs,
            kernel_size=size,
            stride=stride,
            padding=size // 2,
            groups=groups,
            bias=False,
        ),
        nn.BatchNorm2d(outputs),
        nn.SiLU(inplace=True),
    ]


def _dense(values: Tensor, layer: nn.Linear) -> Tensor:
    """(N, C) -> (N, outputs), in the precision of the values."""
    return nn.functional.linear(values, layer.weight.to(values.dtype), layer.bias.to(values.dtype))
