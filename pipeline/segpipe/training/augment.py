"""A crop of an image and its target maps, warped alike, and the image's intensities varied.

Geometry, in one resampling:

    pixel of the crop --turn, scale, mirror--> --elastic--> place in the image --mirror at its border-->

The elastic displacements are drawn on a coarse 3 x 3 grid over the crop, from a normal distribution
of 10 px, and interpolated bicubically (Ronneberger et al. 2015, section 3.1). Image and maps are
read at the same places, bilinearly; the foreground is then cut at one half. The image is mirrored at
its own border as in inference, and only there.

The weight map and the interior were computed at the image's own scale: the first is not computed
again for an enlarged crop, and the second does not depend on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from segpipe.training.settings import AugmentSettings

Array = NDArray[Any]
Random = np.random.Generator


@dataclass(frozen=True)
class Warp:
    """Where the pixels of a crop lie in the image.

    centre
        (y, x) of the crop's centre in the image.
    matrix
        (2, 2): from an offset in the crop to one in the image.
    displacements
        (2, 3, 3) float32, pixels of the image, or None.
    """

    centre: tuple[float, float]
    matrix: NDArray[np.float64]
    displacements: NDArray[np.float32] | None = None

    def places(self, size: int) -> NDArray[np.float64]:
        """(2, size, size): y and x in the image of each pixel of the crop; unbounded."""
        offsets = np.arange(size) - (size - 1) / 2
        grid = np.stack(np.meshgrid(offsets, offsets, indexing="ij"))
        places: NDArray[np.float64] = np.tensordot(self.matrix, grid, axes=1)
        places += np.reshape(self.centre, (2, 1, 1))
        if self.displacements is not None:
            coarse = torch.from_numpy(self.displacements)[None]
            fine = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
            places += fine[0].numpy()
        return places


def draw_warp(shape: tuple[int, int], size: int, augment: AugmentSettings, random: Random) -> Warp:
    """A warp whose crop of `size` pixels lies inside an image of this shape, where it fits."""
    factor = math.exp(random.uniform(*np.log(augment.scale)))
    angle = random.uniform(0, 2 * math.pi) if augment.rotate else 0.0
    cosine, sine = math.cos(angle) / factor, math.sin(angle) / factor
    matrix = np.array([[cosine, -sine], [sine, cosine]])
    if augment.flip and random.random() < 0.5:
        matrix[:, 0] *= -1
    if augment.flip and not augment.rotate and random.random() < 0.5:
        matrix[:, 1] *= -1
    half = (size - 1) / 2 / factor
    centre = tuple(
        random.uniform(half, length - 1 - half)
        if length - 1 > 2 * half
        else random.uniform(0, length - 1)
        for length in shape
    )
    displacements = None
    if augment.elastic_px > 0:
        drawn = random.normal(0, augment.elastic_px, (2, 3, 3))
        displacements = drawn.astype(np.float32)
    return Warp((centre[0], centre[1]), matrix, displacements)


def plain_warp(corner: tuple[int, int], size: int) -> Warp:
    """The crop of `size` pixels whose first one is `corner`, as it is."""
    half = (size - 1) / 2
    return Warp((corner[0] + half, corner[1] + half), np.eye(2))


def mirrored_places(places: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Places between 0 and size - 1 that show what lies at `places` of the mirrored image."""
    if size == 1:
        return np.zeros_like(places)
    if places.min() >= 0 and places.max() <= size - 1:
        return places
    period = 2.0 * (size - 1)
    folded = np.mod(places, period)
    return np.minimum(folded, period - folded)


@dataclass(frozen=True)
class Window:
    """What of an image a crop needs, and where in it the crop's pixels lie.

    rows, columns
        Of the image.
    grid
        (1, size, size, 2) float32 for `torch.nn.functional.grid_sample`: x, y in [-1, 1].
    """

    rows: slice
    columns: slice
    grid: Tensor

    @classmethod
    def of(cls, warp: Warp, shape: tuple[int, int], size: int) -> Window:
        """Of an image of this shape."""
        places = warp.places(size)
        scaled, slices = [], []
        for axis, length in enumerate(shape):
            folded = mirrored_places(places[axis], length)
            first = int(folded.min())
            last = min(int(folded.max()) + 1, length - 1)
            span = max(1, last - first)
            slices.append(slice(first, last + 1))
            scaled.append(2 * (folded - first) / span - 1)
        grid = torch.from_numpy(np.stack(scaled[::-1], axis=-1).astype(np.float32))[None]
        return cls(slices[0], slices[1], grid)

    def sample(self, part: Array) -> Tensor:
        """Bilinear samples of an array already cut to rows and columns: (M, size, size) float32."""
        source = torch.from_numpy(np.ascontiguousarray(part, np.float32))[None]
        sampled = F.grid_sample(
            source, self.grid, mode="bilinear", padding_mode="border", align_corners=True
        )
        return sampled[0]


def vary_intensity(image: Tensor, augment: AugmentSettings, random: Random) -> Tensor:
    """The crop (C, H, W), normalised, with other stain, blur, gain, offset, gamma and noise."""
    if augment.stain > 0 and len(image) == 3:
        image = vary_stain(image, augment.stain, random)
    if augment.blur_px > 0 and random.random() < 0.5:
        image = blurred(image, random.uniform(0.1, augment.blur_px))
    gain, offset = random.uniform(*augment.gain), random.uniform(*augment.offset)
    gamma = random.uniform(*augment.gamma)
    if gamma != 1.0:
        image = torch.where(image > 0, image.clamp(min=0) ** gamma, image)
    image = image * gain + offset
    if augment.noise > 0:
        noise = random.standard_normal(image.shape, np.float32)
        image = image + torch.from_numpy(noise) * random.uniform(0, augment.noise)
    return image


def blurred(image: Tensor, sigma: float) -> Tensor:
    """(C, H, W) under a Gaussian of this many pixels, cut at three sigma; mirrored at the border."""
    reach = min(max(1, math.ceil(3 * sigma)), min(image.shape[1:]) - 1)
    if reach < 1:
        return image
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = F.pad(image[:, None], (reach,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel.reshape(1, 1, -1, 1))
    return F.conv2d(rows, kernel.reshape(1, 1, 1, -1))[:, 0]


STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
"""Optical densities of haematoxylin, eosin and DAB in red, green and blue: Ruifrok and Johnston 2001,
Quantification of histochemical staining by color deconvolution, table 1."""
_UNMIX = torch.from_numpy(
    np.linalg.inv(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True))
).float()
_DARKEST = 1 / 255


def vary_stain(image: Tensor, share: float, random: Random) -> Tensor:
    """An RGB crop (3, H, W) in [0, 1] as if stained more or less strongly, stain by stain.

    Each stain's density is multiplied within 1 +- share and shifted within +- share / 10 (Tellez et
    al. 2018, Whole-slide mitosis detection in H&E breast histology, section III-D: HED jitter).
    """
    density = -torch.log(image.clamp(_DARKEST, 1.0)).flatten(1)
    stains = _UNMIX.T @ density
    factor = torch.from_numpy(random.uniform(1 - share, 1 + share, (3, 1))).float()
    shift = torch.from_numpy(random.uniform(-share / 10, share / 10, (3, 1))).float()
    mixed = torch.linalg.inv(_UNMIX).T @ (stains * factor + shift)
    return torch.exp(-mixed).clamp(0, 1).reshape(image.shape)
