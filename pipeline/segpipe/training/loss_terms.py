"""Losses of one map: what logits and targets make of each other, without a network around them.

The functions take logits (N, K, H, W) and targets of the same shape in [0, 1], apply the sigmoid
themselves and give a scalar. They compute in float32 whatever they are given, also under autocast:
in bfloat16, sums of ones stop growing at 256. All raise ValueError where shapes differ.

Targets between 0 and 1 (the interior) are no hard labels, and the usual soft Dice, IoU and focal
loss are not smallest where prediction and target are equal: at a target of .5 Dice wants 1. The
forms here are, and for targets of 0 and 1 they are the published ones.
"""

from __future__ import annotations

from math import exp

import torch
import torch.nn.functional as F
from torch import Tensor

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the levels, finest first: Wang, Simoncelli and Bovik 2003, section 3.2."""
SSIM_WINDOW = 11
"""Pixels along the side of the Gaussian window, whose sigma is 1.5."""


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
    check_shapes(logits, targets)
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


def one_against_rest(logits: Tensor) -> Tensor:
    """Logits (N, K, H, W) whose sigmoid is the softmax of the given ones over K: the same shape.

    s(x_k - log sum_(j != k) exp x_j) = exp x_k / sum_j exp x_j.
    """
    logits = logits.float()
    rest = [
        torch.cat([logits[:, :one], logits[:, one + 1 :]], dim=1).logsumexp(dim=1)
        for one in range(logits.shape[1])
    ]
    return logits - torch.stack(rest, dim=1)


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
    Intersection-Over-Union in Deep Neural Networks for Image Segmentation, 2016, section 3
    (`smooth` is added: else an empty image is 0 / 0); I from Wang et al., Jaccard Metric
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
    check_shapes(logits, targets)
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
    check_shapes(logits, targets)
    side = min(logits.shape[-2:])
    if side < SSIM_WINDOW:
        raise ValueError(f"MS-SSIM of {side} px; expected sides of {SSIM_WINDOW} px or more")
    levels = min(len(MS_SSIM_WEIGHTS), (side // SSIM_WINDOW).bit_length())
    total = sum(MS_SSIM_WEIGHTS[:levels])
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

    Source: Huang et al., UNet 3+, 2020, arXiv 2004.08790, classification-guided module.

    Parameters
    ----------
    logits
        (N, K).
    targets
        (N, K, H, W): occurs where it is above 0.
    """
    occurs = (targets.amax(dim=(2, 3)) > 0).float()
    check_shapes(logits, occurs)
    return F.binary_cross_entropy_with_logits(logits.float(), occurs)


def check_shapes(logits: Tensor, targets: Tensor) -> None:
    """Refuse targets of another shape: torch would broadcast them and give a number.

    Raises
    ------
    ValueError
        When shapes differ.
    """
    if logits.shape != targets.shape:
        raise ValueError(f"targets are {tuple(targets.shape)}; expected {tuple(logits.shape)}")


def _overlap(logits: Tensor, targets: Tensor, over_batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of probabilities, of targets and of what they share, each (N, K), or (K)."""
    check_shapes(logits, targets)
    probabilities, targets = logits.float().sigmoid(), targets.float()
    axes = (0, 2, 3) if over_batch else (2, 3)
    predicted, true = probabilities.sum(axes), targets.sum(axes)
    return predicted, true, (predicted + true - (probabilities - targets).abs().sum(axes)) / 2


def _similarity_maps(images: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, of each window: (N, K, H - 10, W - 10) each."""
    product, square, other_square = images * others, images**2, others**2
    means = _window_means(torch.stack([images, others, square, other_square, product]))
    mean, other, square, other_square, product = means.unbind()
    first, second = 0.01**2, 0.03**2
    luminance = (2 * mean * other + first) / (mean**2 + other**2 + first)
    variances = square - mean**2 + other_square - other**2
    return luminance, (2 * (product - mean * other) + second) / (variances + second)


def _window_means(images: Tensor) -> Tensor:
    """(..., H, W) -> (..., H - 10, W - 10), means under the Gaussian window.

    Sums of shifted slices: a convolution with one channel takes 14 times as long on CPU, and on GPU
    it may round to TF32, under autocast to bfloat16, where variances would be noise.
    """
    half = SSIM_WINDOW // 2
    window = [exp(-(offset**2) / (2 * 1.5**2)) for offset in range(-half, half + 1)]
    for axis in (-2, -1):
        size = images.shape[axis] - SSIM_WINDOW + 1
        means = torch.zeros_like(images.narrow(axis, 0, size))
        for start, weight in enumerate(window):
            means = means.add(images.narrow(axis, start, size), alpha=weight / sum(window))
        images = means
    return images


def _positive(similarity: Tensor) -> Tensor:
    """The same from `low` up; below, a curve of equal value and slope there, that stays above 0."""
    low = 0.01
    below = low**2 / (2 * low - similarity.clamp(max=low))
    return torch.where(similarity > low, similarity, below)
