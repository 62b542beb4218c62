"""What training minimises: losses of all that a network gives in training.

A loss takes all that a network gives in training, and all targets:

    loss = UNet3PlusLoss(gamma=2.0)
    loss(network.forward_training(image), targets).backward()

With deep supervision each takes the mean over the sides or their sum, as its source does; with one
side that is the same. If the network has a classification head, every loss adds its cross-entropy:
the head's answer blanks the outputs, so a head that nothing trains would blank them at random.

Where the targets have classes, which exclude one another, cross-entropy is that of the softmax, and
the other losses compare each output's share of the softmax, not its sigmoid, with its map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from segpipe.models.network import TrainingOutput
from segpipe.training.batch_targets import Targets
from segpipe.training.loss_terms import (
    check_shapes,
    class_cross_entropy,
    classification_loss,
    cross_entropy,
    focal,
    iou,
    ms_ssim,
    one_against_rest,
    soft_dice,
)


class Loss(Protocol):
    """What a training step minimises: a scalar float32 of a network's output and its targets."""

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Raises ValueError when shapes do not fit."""


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with the weight map, over classes where the targets have them: see
    `cross_entropy` and `class_cross_entropy`. Mean over the sides."""

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32."""
        return _mean_over_sides(
            lambda logits: _weighed_cross_entropy(logits, targets), output, targets
        )


@dataclass(frozen=True)
class SoftDice:
    """`soft_dice`, mean over the sides. Weights of pixels play no part."""

    smooth: float = 1.0
    over_batch: bool = False

    def __post_init__(self) -> None:
        _check_smooth(self.smooth)

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32."""
        return _mean_over_sides(
            lambda logits: soft_dice(
                _shares(logits, targets), targets.maps, self.smooth, self.over_batch
            ),
            output,
            targets,
        )


@dataclass(frozen=True)
class Focal:
    """`focal`, mean over the sides. Weights of pixels play no part."""

    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        _check_focal(self.alpha, self.gamma)

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32."""
        return _mean_over_sides(
            lambda logits: focal(_shares(logits, targets), targets.maps, self.alpha, self.gamma),
            output,
            targets,
        )


@dataclass(frozen=True)
class MsSsim:
    """`ms_ssim`, mean over the sides. Weights of pixels play no part."""

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32."""
        return _mean_over_sides(
            lambda logits: ms_ssim(_shares(logits, targets), targets.maps), output, targets
        )


@dataclass(frozen=True)
class Iou:
    """`iou`, mean over the sides. Weights of pixels play no part."""

    smooth: float = 1.0
    over_batch: bool = False

    def __post_init__(self) -> None:
        _check_smooth(self.smooth)

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32."""
        return _mean_over_sides(
            lambda logits: iou(
                _shares(logits, targets), targets.maps, self.smooth, self.over_batch
            ),
            output,
            targets,
        )


@dataclass(frozen=True)
class UNetPlusPlusLoss:
    """0.5 cross-entropy + soft Dice by image, mean over all depths.

    Source: Zhou et al., UNet++, 2018, arXiv 1807.10165, equation 1, plus the constant 1 (there it is
    minus the coefficient). The cross-entropy takes the weights of pixels if there are any; the paper
    has none.
    """

    smooth: float = 1.0

    def __post_init__(self) -> None:
        _check_smooth(self.smooth)

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32, 0 or more."""
        return _mean_over_sides(
            lambda logits: (
                0.5 * _weighed_cross_entropy(logits, targets)
                + soft_dice(_shares(logits, targets), targets.maps, self.smooth)
            ),
            output,
            targets,
        )


@dataclass(frozen=True)
class UNet3PlusLoss:
    """Focal + MS-SSIM + IoU, summed over all sides, + the classification's cross-entropy.

    Source: Huang et al., UNet 3+, 2020, arXiv 2004.08790, section 2.2 (full-scale deep supervision;
    the hybrid loss of pixel, patch and map) and its classification-guided module. Weights of pixels
    play no part.
    """

    alpha: float = 0.25
    gamma: float = 2.0
    smooth: float = 1.0

    def __post_init__(self) -> None:
        _check_focal(self.alpha, self.gamma)
        _check_smooth(self.smooth)

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32."""
        losses = [
            focal(logits, targets.maps, self.alpha, self.gamma)
            + ms_ssim(logits, targets.maps)
            + iou(logits, targets.maps, self.smooth)
            for logits in (_shares(side, targets) for side in output.sides)
        ]
        return _with_classification(torch.stack(losses).sum(), output, targets)


@dataclass(frozen=True)
class InstanceLoss:
    """The default for [foreground, interior], and without I for [foreground]; mean over the sides.

        L = cross_entropy BCE(F, w) + dice Dice(F) + interior R(I) + background mean of I outside

    F are the foreground's logits, w the weights of pixels, I the interior after its sigmoid, and R
    the mean smooth L1 distance of I to its target over pixels inside objects. Outside, the decoder
    ignores I, so there it is only held down a little. Where nothing is inside (or outside), its term
    is 0.

    Sources: masked regression of a distance that is normalised per object, beside overlap of the
    foreground: torch-em's distance losses, as in Archit et al., Segment Anything for Microscopy, 2025;
    smooth L1: Girshick, Fast R-CNN, 2015, arXiv 1504.08083, equation 3.

    Parameters
    ----------
    cross_entropy, dice, interior, background
        Weights of the terms.
    beta
        Error of the interior below which smooth L1 is a parabola.
    """

    cross_entropy: float = 1.0
    dice: float = 1.0
    interior: float = 1.0
    background: float = 0.1
    beta: float = 0.1

    def __post_init__(self) -> None:
        terms = (self.cross_entropy, self.dice, self.interior, self.background)
        if min(terms) < 0 or self.beta <= 0:
            raise ValueError(f"weights {terms}, beta {self.beta}; expected 0 or more, beta above 0")

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32.

        Raises
        ------
        ValueError
            When there are more than two outputs, or they are classes.
        """
        if targets.maps.shape[1] > 2 or targets.classes is not None:
            raise ValueError(
                f"the instance loss of {targets.maps.shape[1]} outputs or classes; "
                "expected foreground, or foreground and interior"
            )
        return _mean_over_sides(lambda logits: self._of_side(logits, targets), output, targets)

    def _of_side(self, logits: Tensor, targets: Targets) -> Tensor:
        check_shapes(logits, targets.maps)
        foreground, inside = targets.maps[:, :1], targets.maps[:, 0]
        of_foreground = self.cross_entropy * cross_entropy(
            logits[:, :1], foreground, targets.weights
        ) + self.dice * soft_dice(logits[:, :1], foreground)
        if logits.shape[1] == 1:
            return of_foreground
        depth, true_depth = logits[:, 1].float().sigmoid(), targets.maps[:, 1].float()
        error = F.smooth_l1_loss(depth, true_depth, reduction="none", beta=self.beta)
        return (
            of_foreground
            + self.interior * _mean_where(error, inside)
            + self.background * _mean_where(depth, 1 - inside)
        )


def _mean_over_sides(
    side_loss: Callable[[Tensor], Tensor], output: TrainingOutput, targets: Targets
) -> Tensor:
    losses = torch.stack([side_loss(logits) for logits in output.sides])
    return _with_classification(losses.mean(), output, targets)


def _with_classification(loss: Tensor, output: TrainingOutput, targets: Targets) -> Tensor:
    if output.classification is None:
        return loss
    return loss + classification_loss(output.classification, targets.maps)


def _weighed_cross_entropy(logits: Tensor, targets: Targets) -> Tensor:
    if targets.classes is not None:
        return class_cross_entropy(logits, targets.classes, targets.weights)
    return cross_entropy(logits, targets.maps, targets.weights)


def _shares(logits: Tensor, targets: Targets) -> Tensor:
    """Logits whose sigmoid is what each output claims of a pixel."""
    return logits if targets.classes is None else one_against_rest(logits)


def _check_smooth(smooth: float) -> None:
    if not 0 < smooth <= 1e6:
        raise ValueError(f"smooth {smooth}; expected a number above 0, without which 0 / 0 occurs")


def _check_focal(alpha: float, gamma: float) -> None:
    if not 0 <= alpha <= 1 or gamma < 0:
        raise ValueError(f"alpha {alpha}, gamma {gamma}; expected alpha in [0, 1], gamma >= 0")


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values weighted by a mask of 0 and 1; 0 where the mask is empty."""
    return (values * mask).sum() / mask.sum().clamp(min=1)
