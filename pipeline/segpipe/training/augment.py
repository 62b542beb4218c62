"""A crop of an image and its target maps, warped alike, and the image's intensities varied.

Geometry, in one resampling:

    pixel of the crop --turn, scale, mirror--> --elastic--> place in the image --mirror at its border-->

The elastic displacements are drawn on a coarse 3 x 3 grid over the crop, from a normal distribution
of 10 px, and interpolated bicubically (Ronneberger et al. 2015, section 3.1). Image and maps are
read at the same places, bilinearly; the foreground is then cut at one half. The image is mirrored at
its own border as in inference, and only there.

The weight map and the interior were computed at the image's own scale: the first is not computed
again for an enlarged crop, and the second does not depend on it.

All of it is NumPy and SciPy: crops are made by threads beside the network's, and torch's operations
would bring threads of their own into each.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

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
            weights = bicubic_weights(size)
            places += weights @ self.displacements @ weights.T
        return places


@functools.lru_cache(maxsize=8)
def bicubic_weights(size: int) -> NDArray[np.float64]:
    """(size, 3): how much of each of three values, at both ends and the middle, a place between has.

    Cubic convolution of Keys 1981 with a = -0.75, as in torch's bicubic interpolation; the values
    beyond the ends are those at the ends.
    """
    places = np.linspace(0, 2, size)
    weights = np.zeros((size, 3))
    for node in range(-2, 5):
        far = np.abs(places - node)
        near_part = (1.25 * far - 2.25) * far * far + 1
        far_part = ((-0.75 * far + 3.75) * far - 6) * far + 3
        kernel = np.where(far <= 1, near_part, np.where(far < 2, far_part, 0.0))
        weights[:, min(max(node, 0), 2)] += kernel
    return weights


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
    places
        (2, size, size): y and x in what is cut out by them.
    """

    rows: slice
    columns: slice
    places: NDArray[np.float64]

    @classmethod
    def of(cls, warp: Warp, shape: tuple[int, int], size: int) -> Window:
        """Of an image of this shape."""
        places = warp.places(size)
        slices = []
        for axis, length in enumerate(shape):
            places[axis] = mirrored_places(places[axis], length)
            first = int(places[axis].min())
            slices.append(slice(first, min(int(places[axis].max()) + 1, length - 1) + 1))
            places[axis] -= first
        return cls(slices[0], slices[1], places)

    def sample(self, part: Array, order: int = 1) -> NDArray[np.float32]:
        """Samples of an array already cut to rows and columns: (M, size, size) float32.

        Parameters
        ----------
        order
            1: bilinear; 0: the nearest pixel, for numbers between which there is nothing.
        """
        sampled = np.empty((len(part), *self.places.shape[1:]), np.float32)
        for plane, result in zip(part, sampled, strict=True):
            whole = np.asarray(plane, np.float32)
            ndimage.map_coordinates(whole, self.places, result, order=order, mode="nearest")
        return sampled


def vary_intensity(
    image: NDArray[np.float32], augment: AugmentSettings, random: Random
) -> NDArray[np.float32]:
    """The crop (C, H, W), normalised, with other stain, blur, gain, offset, gamma and noise."""
    if augment.stain > 0:
        image = vary_stain(image, augment.stain, random)
    if augment.blur_px > 0 and random.random() < 0.5:
        image = blurred(image, random.uniform(0.1, augment.blur_px))
    gain, offset = random.uniform(*augment.gain), random.uniform(*augment.offset)
    gamma = random.uniform(*augment.gamma)
    if gamma != 1.0:
        image = np.where(image > 0, np.maximum(image, 0) ** np.float32(gamma), image)
    image = image * np.float32(gain) + np.float32(offset)
    if augment.noise > 0:
        noise = random.standard_normal(image.shape, np.float32)
        image = image + noise * np.float32(random.uniform(0, augment.noise))
    return image


def blurred(image: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """(C, H, W) under a Gaussian of this many pixels, cut at three sigma; mirrored at the border."""
    result: NDArray[np.float32] = ndimage.gaussian_filter(
        image, (0, sigma, sigma), mode="mirror", truncate=3
    )
    return result


STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
"""Optical densities of haematoxylin, eosin and DAB in red, green and blue: Ruifrok and Johnston 2001,
Quantification of histochemical staining by color deconvolution, table 1."""
_MIX = (STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)).T.astype(np.float32)
_UNMIX = np.linalg.inv(_MIX)
_DARKEST = np.float32(1 / 255)


def vary_stain(image: NDArray[np.float32], share: float, random: Random) -> NDArray[np.float32]:
    """An RGB crop (3, H, W) in [0, 1] as if stained more or less strongly, stain by stain.

    Each stain's density is multiplied within 1 +- share and shifted within +- share / 10 (Tellez et
    al. 2018, Whole-slide mitosis detection in H&E breast histology, section III-D: HED jitter).
    """
    density = -np.log(np.clip(image, _DARKEST, 1)).reshape(3, -1)
    stains = _UNMIX @ density
    factor = random.uniform(1 - share, 1 + share, (3, 1)).astype(np.float32)
    shift = random.uniform(-share / 10, share / 10, (3, 1)).astype(np.float32)
    mixed = _MIX @ (stains * factor + shift)
    varied: NDArray[np.float32] = np.clip(np.exp(-mixed), 0, 1).reshape(image.shape)
    return varied
