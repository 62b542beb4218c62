"""U-Net 3+: every level of the decoder sees every scale.

    encoder         decoder                       X_De(i) = fuse of depth + 1 branches:

    E0 ----------> D0 -> head                       E0 .. E(i-1)   max-pooled by 2^(i-l)
      | pool         ^  from E0, D1, D2, D3, E4     E(i)           as it is
    E1 ----------> D1 -> side head                  D(i+1) ..      scaled up by 2^(l-i), bilinear;
      | pool         ^  from E0, E1, D2, D3, E4     the deepest is E(depth) itself
    E2 ----------> D2 -> side head
      | pool                                      each branch: 3x3 convolution to `width` channels,
    E3 ----------> D3 -> side head                batch norm, ReLU. They are concatenated, finest
      | pool                                      first, and fused by another 3x3 convolution,
    E4 -------------- -> side head                batch norm, ReLU: (depth + 1) * width channels.

Each level of the encoder is two 3x3 convolutions, batch norm, ReLU, with width * 2^L channels. Heads
are 3x3 convolutions; those of deeper levels are scaled up, bilinear. The classification-guided
module sits on the deepest level: dropout, 1x1 convolution, global maximum; it says whether an output
occurs in the window at all, and takes it away where it does not.

Source: Huang et al., UNet 3+: A Full-Scale Connected UNet for Medical Image Segmentation, 2020, arXiv
2004.08790, sections 2.1 (full-scale skips: 5 x 64 = 320 channels), 2.2 (deep supervision) and 2.3
(classification-guided module); width 64, depth 4. Deviations: scaling up never aligns corners, which
would make it depend on the window's size. The module has one logit per output (the paper: organ or
not), with a threshold at 0 for the argmax, and as logits are not probabilities it takes away by a
logit of -30 instead of multiplying by 0. It needs labels of the window, so it acts in eval mode only.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from segpipe.models.network import (
    Network,
    TrainingOutput,
    WholeWindow,
    check_flag,
    check_range,
)
from segpipe.models.unet import MAX_CHANNELS, Block, crop_border, initialise

ABSENT = -30.0
"""Logit of an output that does not occur: a probability of 1e-13."""


class Guide(WholeWindow):
    """Classification-guided module: takes away the outputs that do not occur in the window."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.classify = nn.Sequential(
            nn.Dropout(0.5),
            nn.Conv2d(inputs, outputs, kernel_size=1),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )

    def forward(self, logits: Tensor, deepest: Tensor) -> Tensor:
        """(N, K, H, W) and the encoder's deepest level -> (N, K, H, W)."""
        present = (self.classify(deepest) > 0)[:, :, None, None]
        return torch.where(present, logits, torch.full_like(logits, ABSENT))


class UNet3Plus(Network):
    """U-Net 3+: (N, C, H, W) float -> logits (N, K, H, W).

    Parameters
    ----------
    in_channels, out_channels
        C and K.
    width
        Channels of level 0, doubled at each level below, and of each branch.
    depth
        Number of poolings.
    deep_supervision
        Whether there are heads on all levels for training; only that of level 0 is the output.
    classification
        Whether it has the classification-guided module. The network is then not exact.

    Raises
    ------
    ModelError
        When a parameter is out of bounds; nothing has been allocated then.

    Examples
    --------
    >>> UNet3Plus(width=1).exact, UNet3Plus(width=1, classification=True).exact
    (True, False)
    """

    margin = 0

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 2,
        *,
        width: int = 64,
        depth: int = 4,
        deep_supervision: bool = True,
        classification: bool = False,
    ) -> None:
        check_range("in_channels", in_channels, 1, 256)
        check_range("out_channels", out_channels, 1, 256)
        check_range("depth", depth, 2, 6)
        check_range("width", width, 1, MAX_CHANNELS // 2**depth)
        check_flag("deep_supervision", deep_supervision)
        check_flag("classification", classification)
        super().__init__()
        self.channels = in_channels
        self.stride = 2**depth
        self.exact = not classification
        self.depth = depth
        widths = [width * 2**level for level in range(depth + 1)]
        fused = (depth + 1) * width
        self.encoder = nn.ModuleList(
            nn.Sequential(_block(inputs, outputs), _block(outputs, outputs))
            for inputs, outputs in pairwise([in_channels, *widths])
        )
        self.branches = nn.ModuleDict()
        self.fuse = nn.ModuleList()
        for here in range(depth):
            for level, channels in enumerate(widths):
                source = fused if here < level < depth else channels
                self.branches[_key(here, level)] = _block(source, width)
            self.fuse.append(_block(fused, fused))
        # index s: by 2^s
        self.pool = nn.ModuleList(nn.MaxPool2d(2**step) for step in range(depth))
        self.up = nn.ModuleList(
            nn.Upsample(scale_factor=2**step, mode="bilinear", align_corners=False)
            for step in range(depth + 1)
        )
        self.heads = nn.ModuleList(
            nn.Conv2d(channels, out_channels, kernel_size=3, padding=1)
            for channels in ([fused] * depth + widths[-1:] if deep_supervision else [fused])
        )
        self.guide = Guide(widths[-1], out_channels) if classification else None
        self._extent = _level_extents(depth)
        initialise(self)

    def admissible(self, size: int) -> bool:
        """Whether each pooling meets an even number of pixels."""
        return size > 0 and size % self.stride == 0

    def forward(self, image: Tensor) -> Tensor:
        """Logits of `image`, whose height and width must be `admissible`."""
        return self.forward_core(image, 0)

    def forward_training(self, image: Tensor) -> TrainingOutput:
        """Logits of every head at the image's size, the deepest level's first, level 0's last.

        Not gated; the classification's logits are beside them.
        """
        encoded = self._encode(image)
        decoded = [*self._decode(encoded, 0), encoded[-1]]
        sides = [self.up[level](head(decoded[level])) for level, head in enumerate(self.heads)]
        classification = self.guide.classify(encoded[-1]) if self.guide is not None else None
        return TrainingOutput(tuple(reversed(sides)), classification)

    def forward_core(self, image: Tensor, halo: int) -> Tensor:
        """Logits of what lies `halo` inside the window: (N, K, H - 2 halo, W - 2 halo).

        As in the U-Net, each level of the decoder begins with no more than the core and what those
        above it look at.
        """
        encoded = self._encode(image)
        start = max(0, halo - self._extent[0])
        logits: Tensor = self.heads[0](self._decode(encoded, halo)[0])
        logits = crop_border(logits, halo - start)
        if self.guide is not None and not self.training:
            logits = self.guide(logits, encoded[-1])
        return logits

    def _encode(self, image: Tensor) -> list[Tensor]:
        """The levels of the encoder, of the whole window."""
        levels: list[Tensor] = []
        for level in self.encoder:
            levels.append(level(self.pool[1](levels[-1]) if levels else image))
        return levels

    def _decode(self, encoded: list[Tensor], halo: int) -> list[Tensor]:
        """Levels 0 .. depth - 1 of the decoder, each from `_extent` pixels beyond the core on."""
        start = [max(0, (halo >> level) - extent) for level, extent in enumerate(self._extent)]
        decoded = {self.depth: crop_border(encoded[-1], start[-1])}
        for here in reversed(range(self.depth)):
            inputs = []
            for level in range(self.depth + 1):
                if level <= here:
                    step = here - level
                    source = crop_border(encoded[level], start[here] * 2**step)
                    source = self.pool[step](source) if step else source
                else:
                    step = level - here
                    source = self.up[step](decoded[level])
                    source = crop_border(source, start[here] - start[level] * 2**step)
                inputs.append(self.branches[_key(here, level)](source))
            decoded[here] = self.fuse[here](torch.cat(inputs, dim=1))
        return [decoded[level] for level in range(self.depth)]


def _level_extents(depth: int) -> list[int]:
    """Pixels beyond the core with which each level of the decoder begins, in its own pixels.

    Its two 3x3 convolutions take 2, the head above level 0 one more, and bilinear scaling looks at
    one pixel beyond what it covers. The bottom, which has no convolutions here, comes last.
    """
    extents = [3]
    for level in range(1, depth + 1):
        covered = [-(-extent // 2 ** (level - above)) for above, extent in enumerate(extents)]
        extents.append(max(covered) + 1 + (2 if level < depth else 0))
    return extents


def _block(inputs: int, outputs: int) -> Block:
    return Block(inputs, outputs, "same", "batch")


def _key(here: int, level: int) -> str:
    """Name of the branch by which level `here` of the decoder sees level `level`."""
    return f"{here}_{level}"
