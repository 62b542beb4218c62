"""Mobile U-Net: the features of MobileNetV2 as encoder, five deconvolutions as decoder.

    level 0   image                                                       up -> head
                | stem /2                                                  ^
    level 1   [IR 16] -------------------- skip ----------> cat -> [IR] ---+
                |                                            ^ up
    level 2   [IR 24 x2] ----------------- skip --> cat -> [IR]
                |                                    ^ up
    level 3   [IR 32 x3] -------- skip --> cat -> [IR]
                |                           ^ up
    level 4   [IR 64 x4, 96 x3] -> cat -> [IR]
                |                   ^ up
    level 5   [IR 160 x3, 320, 1x1 convolution to 1280]

    IR, inverted residual:  x -> 1x1 to t times the channels, norm, ReLU6 -> depthwise 3x3, norm, ReLU6
                              -> 1x1 to the output's channels, norm (linear bottleneck) -> (+ x)

x is added where stride is 1 and the channels agree; t is 6, and 1 in the first, which then has no first
convolution. Convolutions that a norm follows have no bias. Level L is at 1 / 2^L of the image's size.
`up` is a 2x2 transposed convolution of stride 2 to the channels of the skip, which comes first in the
concatenation; the fifth has no skip, and gives as many channels as it gets.

Sources: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, 2018, arXiv 1801.04381,
section 3 and table 2 (encoder; its width multiplier is width / 32, channels are rounded to multiples
of 8, and the last convolution is never narrower than 1280); Jing et al., Mobile-Unet: An Efficient
Convolutional Neural Network for Fabric Defect Detection, Textile Research Journal 92, 2022 (the decoder
of five deconvolutions and inverted residuals). Deviations: deconvolutions are 2x2, as in the U-Net; all
weights are trained here, from none that have seen other images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segpipe.models.network import Network, check_range
from segpipe.models.unet import crop_border, decoder_reach, initialise

STAGES = (
    # expansion, channels, units, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Table 2 of the MobileNetV2 paper."""
LEVELS = 5


class InvertedResidual(nn.Module):
    """Narrow -> wide, depthwise 3x3 -> narrow, and the input added where it fits."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, expansion: int = 6) -> None:
        super().__init__()
        wide = expansion * inputs
        self.residual = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            *(_convolution(inputs, wide, 1) if expansion > 1 else []),
            *_convolution(wide, wide, 3, stride=stride, groups=wide),
            nn.Conv2d(wide, outputs, kernel_size=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, image: Tensor) -> Tensor:
        """(N, outputs, H / stride, W / stride)."""
        result: Tensor = self.body(image)
        return image + result if self.residual else result


class MobileUNet(Network):
    """Mobile U-Net: (N, C, H, W) float -> logits (N, K, H, W).

    Parameters
    ----------
    in_channels, out_channels
        C and K.
    width
        Channels of the stem: 32 times MobileNetV2's width multiplier.

    Raises
    ------
    ModelError
        When a parameter is out of bounds; nothing has been allocated then.

    Examples
    --------
    >>> network = MobileUNet(width=1)
    >>> network.stride, network.exact
    (32, True)
    """

    exact = True
    margin = 0
    stride = 2**LEVELS

    def __init__(self, in_channels: int = 1, out_channels: int = 2, *, width: int = 32) -> None:
        check_range("in_channels", in_channels, 1, 256)
        check_range("out_channels", out_channels, 1, 256)
        check_range("width", width, 1, 128)
        super().__init__()
        self.channels = in_channels
        stem = round_channels(width)
        # one part per level; level 0 is the image
        parts: list[list[nn.Module]] = [_convolution(in_channels, stem, 3, stride=2)]
        inputs, skips = stem, []
        for expansion, channels, units, stride in STAGES:
            outputs = round_channels(channels * width / 32)
            if stride == 2:
                skips.append(inputs)
                parts.append([])
            for unit in range(units):
                parts[-1].append(
                    InvertedResidual(
                        inputs, outputs, stride=1 if unit else stride, expansion=expansion
                    )
                )
                inputs = outputs
        bottom = round_channels(1280 * max(1, width / 32))
        parts[-1] += _convolution(inputs, bottom, 1)
        self.encoder = nn.ModuleList(nn.Sequential(*part) for part in parts)
        # from level 0 down
        above = [skips[0], *skips, bottom]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(above[level + 1], above[level], kernel_size=2, stride=2)
            for level in range(LEVELS)
        )
        self.decoder = nn.ModuleList(InvertedResidual(2 * skip, skip) for skip in skips)
        self.head = nn.Conv2d(skips[0], out_channels, kernel_size=1)
        self._reach = decoder_reach(LEVELS, first=0, level=1)
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
                result = self.decoder[level - 1](torch.cat([skips[level - 1], result], dim=1))
        logits: Tensor = self.head(crop_border(result, halo - cut[0]))
        return logits


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and at least 0.9 times as many.

    MobileNetV2's rule, which EfficientNet took over.

    Examples
    --------
    >>> [round_channels(channels) for channels in (1, 17.6, 20, 115.2)]
    [8, 24, 24, 112]
    """
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _convolution(
    inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Convolution without bias -> batch norm -> ReLU6."""
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
        nn.ReLU6(inplace=True),
    ]
