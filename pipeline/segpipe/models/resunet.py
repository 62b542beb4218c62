"""ResUNet: a U-Net of residual units with identity mapping, without pooling.

    level 0   image -> [unit] ------------------ skip ----------------> cat -> [unit] -> head
                         |                                               ^ up
    level 1            [unit /2] ---------- skip ---------> cat -> [unit]
                         |                                  ^ up
    level 2            [unit /2] ---- skip ---> cat -> [unit]
                         |                       ^ up
    level 3            [unit /2: bridge] --------+

    unit:  x -> norm, ReLU, 3x3 convolution -> norm, ReLU, 3x3 convolution -> + -> y
           +------------------------- shortcut -----------------------------> +

The first unit's first convolution has no norm and ReLU before it. `/2`: that convolution has stride
2 instead of pooling. `up` repeats each pixel 2 x 2. Level L has width * 2^L channels.

Source: Zhang, Liu and Wang, Road Extraction by Deep Residual U-Net, 2018, arXiv 1711.10684, section
II-A (pre-activation unit, after He et al. 2016, arXiv 1603.05027) and table I: width 64, depth 3,
which are its seven units. The paper does not say how a shortcut gets from one number of channels to
another. Here it is the identity, without parameters, as in He et al. 2015 (arXiv 1512.03385, section
4.1, option A): every second pixel where the unit has stride 2; channels that are missing are zeros,
and of too many the first are taken. The encoder's skip comes first in the concatenation and has as
many channels as the unit gives, so the decoder's identity is that of the skip. Or, as published code
often has it, a 1x1 convolution. Deviations: up-sampling, of which the paper says nothing, is nearest.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from segpipe.models.network import Network, check_choice, check_range
from segpipe.models.unet import MAX_CHANNELS, crop_border, decoder_reach, initialise


class Identity(nn.Module):
    """The identity between numbers of channels: zeros for those that lack, the first of too many."""

    def __init__(self, outputs: int, stride: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.stride = stride

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, outputs, H / stride, W / stride)."""
        result = image[:, : self.outputs, :: self.stride, :: self.stride]
        missing = self.outputs - result.shape[1]
        return nn.functional.pad(result, (0, 0, 0, 0, 0, missing)) if missing > 0 else result


class Unit(nn.Module):
    """Two pre-activated 3x3 convolutions and a shortcut around them.

    Parameters
    ----------
    stride
        Of the first convolution.
    first
        Whether it sees the image itself, without norm and ReLU.
    """

    def __init__(
        self, inputs: int, outputs: int, shortcut: str, *, stride: int = 1, first: bool = False
    ) -> None:
        super().__init__()
        # not in place: the shortcut needs the input
        before = [] if first else [nn.BatchNorm2d(inputs), nn.ReLU()]
        self.body = nn.Sequential(
            *before,
            nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, kernel_size=3, padding=1),
        )
        self.shortcut = (
            Identity(outputs, stride)
            if shortcut == "identity"
            else nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride)
        )

    def forward(self, image: Tensor) -> Tensor:
        """(N, outputs, H / stride, W / stride)."""
        result: Tensor = self.body(image) + self.shortcut(image)
        return result


class ResUNet(Network):
    """Residual U-Net: (N, C, H, W) float -> logits (N, K, H, W).

    Parameters
    ----------
    in_channels, out_channels
        C and K.
    width
        Channels of level 0; doubled at each level below.
    depth
        Number of units with stride 2.
    shortcut
        "identity": without parameters; "convolution": 1x1, also where the channels agree.

    Raises
    ------
    ModelError
        When a parameter is out of bounds; nothing has been allocated then.

    Examples
    --------
    >>> network = ResUNet(width=1)
    >>> network.stride, network.admissible(24), network.admissible(20)
    (8, True, False)
    """

    exact = True
    margin = 0

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        width: int = 64,
        depth: int = 3,
        shortcut: str = "identity",
    ) -> None:
        check_range("in_channels", in_channels, 1, 256)
        check_range("out_channels", out_channels, 1, 256)
        check_range("depth", depth, 1, 7)
        check_range("width", width, 1, MAX_CHANNELS // 2**depth)
        check_choice("shortcut", shortcut, ("identity", "convolution"))
        super().__init__()
        self.channels = in_channels
        self.stride = 2**depth
        widths = [width * 2**level for level in range(depth + 1)]
        self.encoder = nn.ModuleList([Unit(in_channels, width, shortcut, first=True)])
        self.decoder = nn.ModuleList()
        for here, below in pairwise(widths):
            self.encoder.append(Unit(here, below, shortcut, stride=2))
            self.decoder.append(Unit(here + below, here, shortcut))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.head = nn.Conv2d(width, out_channels, kernel_size=1)
        self._reach = decoder_reach(depth)
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
        skips: list[Tensor] = []
        result = image
        for level, unit in enumerate(self.encoder):
            result = unit(result)
            skips.append(crop_border(result, cut[level]))
        result = skips.pop()
        for level in reversed(range(len(skips))):
            result = crop_border(self.up(result), cut[level] - 2 * cut[level + 1])
            result = self.decoder[level](torch.cat([skips[level], result], dim=1))
        logits: Tensor = self.head(crop_border(result, halo - cut[0]))
        return logits
