"""What training minimises: functions of one map of logits, and the losses that settings name.

The functions take logits (N, K, H, W) and targets of the same shape in [0, 1], apply the sigmoid
themselves and give a scalar. They compute in float32 whatever they are given, also under autocast:
sums over a million pixels in bfloat16 stop growing at 256.

A loss of `LOSSES` takes all that a network gives in training, and all targets:

    loss = LOSSES["unet3plus"](gamma=2.0)
    loss(network.forward_training(image), targets).backward()

With deep supervision each takes the mean over the sides or their sum, as its source does; with one
side that is the same. If the network has a classification head, every loss adds its cross-entropy:
the head's answer blanks the outputs, so a head that nothing trains would blank them at random.

Targets between 0 and 1 (the interior) are no probabilities of a class, and the usual soft Dice, IoU
and focal loss are not smallest where prediction and target are equal: at a target of .5 Dice
wants 1. The forms here are, and with targets of 0 and 1 they are the published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from segpipe.models.network import TrainingOutput

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the levels, finest first: Wang, Simoncelli and Bovik 2003, section 3.2."""
SSIM_WINDOW = 11
"""Pixels along the side of the Gaussian window, whose sigma is 1.5."""


@dataclass(frozen=True, eq=False)
class Targets:
    """What a batch should give; H and W are those of the network's output.

    Parameters
    ----------
    maps
        (N, K, H, W) float32 in [0, 1], a map for each output.
    weights
        (N, H, W) float32, what a pixel counts in a cross-entropy; None: 1.
    classes
        (N, H, W) int64 in [0, K), for networks whose outputs exclude each other; else None.

    Raises
    ------
    ValueError
        When shapes do not fit each other.
    """

    maps: Tensor
    weights: Tensor | None = None
    classes: Tensor | None = None

    def __post_init__(self) -> None:
        if self.maps.ndim != 4:
            raise ValueError(f"maps are {tuple(self.maps.shape)}; expected (N, K, H, W)")
        expected = (self.maps.shape[0], *self.maps.shape[2:])
        for name, tensor in (("weights", self.weights), ("classes", self.classes)):
            if tensor is not None and tensor.shape != expected:
                raise ValueError(f"{name} are {tuple(tensor.shape)}; expected {expected}")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def without_border(self, pixels: int) -> Targets:
        """What is left for a network whose output is so much smaller on each side."""
        if not pixels:
            return self
        return self._each(lambda tensor: tensor[..., pixels:-pixels, pixels:-pixels])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Targets:
        return Targets(
            change(self.maps),
            None if self.weights is None else change(self.weights),
            None if self.classes is None else change(self.classes),
        )


class Loss(Protocol):
    """What a training step minimises: a scalar float32 of a network's output and its targets."""

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Raises ValueError when shapes do not fit."""


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of every output, each pixel times its weight: scalar.

    The sum is divided by the number of values, not by the sum of weights. So, up to the number, it
    is the energy of the U-Net paper (Ronneberger et al. 2015, arXiv 1505.04597, equation 1), and a
    pixel pulls equally hard whatever else is in the batch.

    Parameters
    ----------
    logits, targets
        (N, K, H, W).
    weights
        (N, H, W), for all outputs.
    """
    _check_shapes(logits, targets)
    losses = F.binary_cross_entropy_with_logits(
        logits.float(), targets.float(), reduction="none"
    ).mean(dim=1)
    return (losses if weights is None else losses * weights).mean()


def class_cross_entropy(logits: Tensor, classes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of a softmax over the outputs, each pixel times its weight: scalar.

    Source and division as in `cross_entropy`.

    Parameters
    ----------
    logits
        (N, K, H, W).
    classes
        (N, H, W) int64 in [0, K).
    weights
        (N, H, W).
    """
    losses = F.cross_entropy(logits.float(), classes, reduction="none")
    return (losses if weights is None else losses * weights).mean()


def soft_dice(
    logits: Tensor, targets: Tensor, smooth: float = 1.0, over_batch: bool = False
) -> Tensor:
    """1 - (2 I + smooth) / (P + T + smooth), its mean over images and outputs: scalar in [0, 1].

    P and T are the sums of probabilities and targets over an image, I = (P + T - sum |p - t|) / 2
    what they share: sum p t for targets of 0 and 1. Sources: Milletari et al., V-Net, 2016, arXiv
    1606.04797, section 3, with P and T not squared, as Zhou et al. 2018 (`unetplusplus_loss`); I from
    Wang et al., Dice Semimetric Losses, 2023, arXiv 2303.16296.

    Parameters
    ----------
    over_batch
        Sum over the whole batch before dividing. Default is by image, as in U-Net++'s equation 1:
        an image of few objects counts as much as a full one. Over the batch, it counts by its
        pixels, and an image without any gives no large constant part to the loss.
    """
    predicted, true, shared = _overlap(logits, targets, over_batch)
    return (1 - (2 * shared + smooth) / (predicted + true + smooth)).mean()


def iou(logits: Tensor, targets: Tensor, smooth: float = 1.0, over_batch: bool = False) -> Tensor:
    """1 - (I + smooth) / (P + T - I + smooth), its mean over images and outputs: scalar in [0, 1].

    P, T, I and `over_batch` as in `soft_dice`. Sources: Rahman and Wang, Optimizing
    Intersection-Over-Union in Deep Neural Networks for Image Segmentation, 2016, equations 3 to 5
    (`smooth` is added, else an empty image would be 0 / 0); I from Wang et al., Jaccard Metric
    Losses, 2023, arXiv 2302.05666.
    """
    predicted, true, shared = _overlap(logits, targets, over_batch)
    return (1 - (shared + smooth) / (predicted + true - shared + smooth)).mean()


def focal(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Cross-entropy times a |t - p|^gamma, its mean: scalar; a is alpha for 1 and 1 - alpha for 0.

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017, arXiv 1708.02002, equation 5,
    where the factor is (1 - p_t)^gamma: |t - p| for targets of 0 and 1. In between it follows Li et
    al., Generalized Focal Loss, 2020, arXiv 2006.04388, equation 5, and alpha is interpolated. Mean
    over all values; Lin divides by the number of objects' boxes, which a map has not.

    Parameters
    ----------
    alpha
        In [0, 1]; 0.5 weighs both classes alike.
    gamma
        0 or more; 0 is a cross-entropy.
    """
    _check_shapes(logits, targets)
    logits, targets = logits.float(), targets.float()
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    # gamma below 1 has an infinite slope at 0, and infinity times the slope of |.| there is NaN
    error = (targets - logits.sigmoid()).abs().clamp(min=1e-12)
    return (balance * error**gamma * losses).mean()


def ms_ssim(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - multi-scale structural similarity, its mean over images and outputs: scalar in [0, 1].

    Source: Wang, Simoncelli and Bovik, Multi-scale Structural Similarity for Image Quality
    Assessment, 2003, equation 7 and section 3: five levels, each half the size of the last (means of
    2x2), contrast and structure compared at each, luminance at the coarsest. Windows of 11 x 11
    pixels lie inside the image; constants are 0.01^2 and 0.03^2 for values in [0, 1].

    Deviations: an image with a side under 176 px has room for fewer levels; those there are share
    the exponents in proportion. A level's similarity under 0.01, of which a broken power would be
    steep or undefined, is continued by a curve that stays above 0 and keeps a slope.

    Raises
    ------
    ValueError
        When a side is smaller than the window.
    """
    _check_shapes(logits, targets)
    side = min(logits.shape[-2:])
    if side < SSIM_WINDOW:
        raise ValueError(f"MS-SSIM of {side} px; expected sides of {SSIM_WINDOW} px or more")
    levels = min(len(MS_SSIM_WEIGHTS), (side // SSIM_WINDOW).bit_length())
    total = sum(MS_SSIM_WEIGHTS[:levels])
    with torch.autocast(logits.device.type, enabled=False):
        images, others = logits.float().sigmoid(), targets.float()
        similarity = images.new_ones(images.shape[:2])
        for level in range(levels):
            if level:
                images, others = F.avg_pool2d(images, 2), F.avg_pool2d(others, 2)
            luminance, structure = _similarity_maps(images, others)
            last = level == levels - 1
            mean = ((luminance * structure) if last else structure).mean(dim=(2, 3))
            similarity = similarity * _positive(mean) ** (MS_SSIM_WEIGHTS[level] / total)
    return (1 - similarity).mean()


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of whether an output occurs in the image at all: scalar.

    Source: Huang et al., UNet 3+, 2020, arXiv 2004.08790, section 2.4.

    Parameters
    ----------
    logits
        (N, K).
    targets
        (N, K, H, W): occurs where it is above 0.
    """
    occurs = (targets.amax(dim=(2, 3)) > 0).float()
    _check_shapes(logits, occurs)
    return F.binary_cross_entropy_with_logits(logits.float(), occurs)


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with the weight map, over classes where the targets have them: see
    `cross_entropy` and `class_cross_entropy`. Mean over the sides."""

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32."""

        def side_loss(logits: Tensor) -> Tensor:
            if targets.classes is not None:
                return class_cross_entropy(logits, targets.classes, targets.weights)
            return cross_entropy(logits, targets.maps, targets.weights)

        return _mean_over_sides(side_loss, output, targets)


@dataclass(frozen=True)
class SoftDice:
    """`soft_dice`, mean over the sides. Weights of pixels play no part."""

    smooth: float = 1.0
    over_batch: bool = False

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32."""
        return _mean_over_sides(
            lambda logits: soft_dice(logits, targets.maps, self.smooth, self.over_batch),
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
            lambda logits: focal(logits, targets.maps, self.alpha, self.gamma), output, targets
        )


@dataclass(frozen=True)
class MsSsim:
    """`ms_ssim`, mean over the sides. Weights of pixels play no part."""

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32."""
        return _mean_over_sides(lambda logits: ms_ssim(logits, targets.maps), output, targets)


@dataclass(frozen=True)
class Iou:
    """`iou`, mean over the sides. Weights of pixels play no part."""

    smooth: float = 1.0
    over_batch: bool = False

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32."""
        return _mean_over_sides(
            lambda logits: iou(logits, targets.maps, self.smooth, self.over_batch), output, targets
        )


@dataclass(frozen=True)
class UNetPlusPlusLoss:
    """0.5 cross-entropy + soft Dice by image, mean over all depths.

    Source: Zhou et al., UNet++, 2018, arXiv 1807.10165, equation 1, plus the constant 1 (there it is
    minus the coefficient). The cross-entropy takes the weights of pixels if there are any; the paper
    has none.
    """

    smooth: float = 1.0

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32, 0 or more."""
        return _mean_over_sides(
            lambda logits: (
                0.5 * cross_entropy(logits, targets.maps, targets.weights)
                + soft_dice(logits, targets.maps, self.smooth)
            ),
            output,
            targets,
        )


@dataclass(frozen=True)
class UNet3PlusLoss:
    """Focal + MS-SSIM + IoU, summed over all sides, + the classification's cross-entropy.

    Source: Huang et al., UNet 3+, 2020, arXiv 2004.08790, section 2.2 (full-scale deep supervision),
    equations 3 to 5 (the three levels: pixel, patch, map) and section 2.4. Weights of pixels play no
    part.
    """

    alpha: float = 0.25
    gamma: float = 2.0
    smooth: float = 1.0

    def __post_init__(self) -> None:
        _check_focal(self.alpha, self.gamma)

    def __call__(self, output: TrainingOutput, targets: Targets) -> Tensor:
        """Scalar float32."""
        losses = [
            focal(logits, targets.maps, self.alpha, self.gamma)
            + ms_ssim(logits, targets.maps)
            + iou(logits, targets.maps, self.smooth)
            for logits in output.sides
        ]
        return _with_classification(torch.stack(losses).sum(), output, targets)


@dataclass(frozen=True)
class InstanceLoss:
    """The default for the outputs [foreground, interior]; mean over the sides.

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
            When there are not two outputs.
        """
        if targets.maps.shape[1] != 2:
            raise ValueError(
                f"the instance loss of {targets.maps.shape[1]} outputs; "
                "expected two, foreground and interior"
            )
        return _mean_over_sides(lambda logits: self._of_side(logits, targets), output, targets)

    def _of_side(self, logits: Tensor, targets: Targets) -> Tensor:
        _check_shapes(logits, targets.maps)
        foreground, inside = targets.maps[:, :1], targets.maps[:, 0]
        depth, true_depth = logits[:, 1].float().sigmoid(), targets.maps[:, 1].float()
        error = F.smooth_l1_loss(depth, true_depth, reduction="none", beta=self.beta)
        return (
            self.cross_entropy * cross_entropy(logits[:, :1], foreground, targets.weights)
            + self.dice * soft_dice(logits[:, :1], foreground)
            + self.interior * _mean_where(error, inside)
            + self.background * _mean_where(depth, 1 - inside)
        )


LOSSES: Mapping[str, Callable[..., Loss]] = {
    "instance": InstanceLoss,
    "cross_entropy": CrossEntropy,
    "soft_dice": SoftDice,
    "focal": Focal,
    "ms_ssim": MsSsim,
    "iou": Iou,
    "unetplusplus": UNetPlusPlusLoss,
    "unet3plus": UNet3PlusLoss,
}
"""Name in settings -> builder, whose parameters are the fields of the class."""


def _mean_over_sides(
    side_loss: Callable[[Tensor], Tensor], output: TrainingOutput, targets: Targets
) -> Tensor:
    losses = torch.stack([side_loss(logits) for logits in output.sides])
    return _with_classification(losses.mean(), output, targets)


def _with_classification(loss: Tensor, output: TrainingOutput, targets: Targets) -> Tensor:
    if output.classification is None:
        return loss
    return loss + classification_loss(output.classification, targets.maps)


def _check_shapes(logits: Tensor, targets: Tensor) -> None:
    if logits.shape != targets.shape:  # torch would broadcast, and give a number
        raise ValueError(f"targets are {tuple(targets.shape)}; expected {tuple(logits.shape)}")


def _check_focal(alpha: float, gamma: float) -> None:
    if not 0 <= alpha <= 1 or gamma < 0:
        raise ValueError(f"alpha {alpha}, gamma {gamma}; expected alpha in [0, 1], gamma >= 0")


def _overlap(logits: Tensor, targets: Tensor, over_batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of probabilities, of targets and of what they share, each (N, K), or (K)."""
    _check_shapes(logits, targets)
    probabilities, targets = logits.float().sigmoid(), targets.float()
    axes = (0, 2, 3) if over_batch else (2, 3)
    predicted, true = probabilities.sum(axes), targets.sum(axes)
    return predicted, true, (predicted + true - (probabilities - targets).abs().sum(axes)) / 2


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values weighted by a mask of 0 and 1; 0 where the mask is empty."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def _similarity_maps(images: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, of each window: (N, K, H - 10, W - 10) each."""
    product, square, other_square = images * others, images**2, others**2
    stack = torch.stack([images, others, square, other_square, product])
    means = _window_means(stack.flatten(0, 2)[:, None]).view(*stack.shape[:3], *_inner(stack))
    mean, other, square, other_square, product = means.unbind()
    first, second = 0.01**2, 0.03**2
    luminance = (2 * mean * other + first) / (mean**2 + other**2 + first)
    variances = square - mean**2 + other_square - other**2
    return luminance, (2 * (product - mean * other) + second) / (variances + second)


def _inner(images: Tensor) -> tuple[int, int]:
    return images.shape[-2] - SSIM_WINDOW + 1, images.shape[-1] - SSIM_WINDOW + 1


def _window_means(images: Tensor) -> Tensor:
    """(M, 1, H, W) -> (M, 1, H - 10, W - 10), means under the Gaussian window."""
    offsets = torch.arange(SSIM_WINDOW, device=images.device, dtype=images.dtype) - SSIM_WINDOW // 2
    window = (-(offsets**2) / (2 * 1.5**2)).exp()
    window = window / window.sum()
    return F.conv2d(F.conv2d(images, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))


def _positive(similarity: Tensor) -> Tensor:
    """The same from `low` up; below, a curve of equal value and slope there, that stays above 0."""
    low = 0.01
    below = low**2 / (2 * low - similarity.clamp(max=low))
    return torch.where(similarity > low, similarity, below)
