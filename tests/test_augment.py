"""Crops: the identity, alignment of image and targets, and what varies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage import color
from torch.nn import functional

from segpipe.training.augment import (
    Warp,
    Window,
    blurred,
    draw_warp,
    mirrored_places,
    plain_warp,
    vary_intensity,
    vary_stain,
)
from segpipe.training.settings import AugmentSettings

STILL = AugmentSettings(
    gain=(1, 1), offset=(0, 0), noise=0, blur_px=0, scale=(1, 1), elastic_px=0, flip=False
)


def sampled(array, warp, size):
    window = Window.of(warp, array.shape[1:], size)
    return window.sample(array[:, window.rows, window.columns])


@given(st.integers(1, 40), st.integers(1, 40), st.integers(-30, 50), st.integers(-30, 50))
@settings(max_examples=40)
def test_a_plain_crop_is_the_mirrored_image_as_it_is(height, width, y, x):
    image = np.random.default_rng(0).random((2, height, width), np.float32)
    size, border = 16, 100
    padded = np.pad(image, ((0, 0), (border, border), (border, border)), mode="reflect")
    expected = padded[:, y + border : y + border + size, x + border : x + border + size]
    assert np.allclose(sampled(image, plain_warp((y, x), size), size), expected, atol=2e-6)


@pytest.mark.parametrize("seed", range(6))
def test_a_warped_crop_is_what_scipy_samples(seed):
    random = np.random.default_rng(seed)
    image = random.random((1, 70, 90), np.float32)
    warp = draw_warp((70, 90), 48, AugmentSettings(), random)
    places = warp.places(48)
    expected = ndimage.map_coordinates(image[0], places, order=1, mode="mirror")
    assert np.allclose(sampled(image, warp, 48)[0], expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_image_and_targets_stay_aligned(seed):
    """Were image and target read at different places, a mask would differ from its own image."""
    random = np.random.default_rng(seed)
    mask = np.zeros((1, 120, 120), np.float32)
    mask[0, 30:60, 20:70] = 1
    mask[0, 80:100, 75:110] = 1
    warp = draw_warp((120, 120), 96, AugmentSettings(), random)
    image, target = sampled(np.repeat(mask, 2, 0), warp, 96)
    assert np.array_equal(image, target)
    assert 0 < target.mean() < 1


def test_the_elastic_displacement_is_bicubic_between_nine_points():
    """The corners, edges' middles and the centre of the crop move by what was drawn."""
    drawn = np.random.default_rng(0).normal(0, 10, (2, 3, 3)).astype(np.float32)
    plain = plain_warp((0, 0), 33)
    moved = Warp(plain.centre, plain.matrix, drawn).places(33) - plain.places(33)
    assert np.allclose(moved[:, ::16, ::16], drawn, atol=1e-4)
    coarse = torch.from_numpy(drawn)[None]
    fine = functional.interpolate(coarse, (33, 33), mode="bicubic", align_corners=True)
    assert np.allclose(moved, fine[0].numpy(), atol=1e-4)


def test_displacements_have_the_given_deviation():
    random = np.random.default_rng(0)
    drawn = [draw_warp((50, 50), 32, AugmentSettings(), random).displacements for _ in range(300)]
    assert np.std(drawn) == pytest.approx(10, rel=0.05)


def test_a_crop_of_a_large_image_lies_inside_it():
    random = np.random.default_rng(0)
    augment = AugmentSettings(elastic_px=0, rotate=False)
    for _ in range(50):
        places = draw_warp((300, 260), 128, augment, random).places(128)
        assert places.min() >= -1e-9
        assert places[0].max() <= 299 + 1e-9
        assert places[1].max() <= 259 + 1e-9


def mirrored(warp):
    """Whether the crop's rows and columns run against the image's."""
    return warp.matrix[0, 0] < 0, warp.matrix[1, 1] < 0


def test_crops_are_mirrored_and_turned_half_of_the_time():
    """Every combination, as often as any other; not at all where it is off."""
    random = np.random.default_rng(0)
    upright = AugmentSettings(rotate=False)
    drawn = [mirrored(draw_warp((90, 90), 32, upright, random)) for _ in range(400)]
    for both in ((False, False), (False, True), (True, False), (True, True)):
        assert drawn.count(both) == pytest.approx(100, abs=40)
    turned = [draw_warp((90, 90), 32, AugmentSettings(), random).matrix for _ in range(400)]
    assert sum(np.linalg.det(matrix) < 0 for matrix in turned) == pytest.approx(200, abs=50)
    still = AugmentSettings(rotate=False, flip=False)
    drawn = [mirrored(draw_warp((90, 90), 32, still, random)) for _ in range(50)]
    assert drawn.count((False, False)) == 50
    never = AugmentSettings(flip=False)
    assert all(np.linalg.det(draw_warp((90, 90), 32, never, random).matrix) > 0 for _ in range(50))


def test_scale_enlarges():
    """A crop at scale 2 shows half the image's length."""
    warp = draw_warp(
        (300, 300), 64, STILL.model_copy(update={"scale": (2, 2), "rotate": False}),
        np.random.default_rng(0),
    )  # fmt: skip
    places = warp.places(64)
    assert np.ptp(places[0]) == pytest.approx(63 / 2)


@given(st.integers(1, 9), st.lists(st.integers(-40, 40), min_size=1, max_size=8))
def test_places_are_mirrored_as_numpy_mirrors(size, places):
    expected = np.pad(np.arange(size), 50, mode="reflect")[np.array(places) + 50]
    assert np.array_equal(mirrored_places(np.array(places, float), size), expected)


def test_the_blur_is_scipys():
    image = np.random.default_rng(0).random((2, 30, 40), np.float32)
    expected = ndimage.gaussian_filter(image, (0, 1.3, 1.3), mode="mirror", radius=4)
    assert np.allclose(blurred(image, 1.3), expected, atol=1e-5)


def test_nothing_varies_where_all_is_off():
    image = np.random.default_rng(1).random((1, 20, 20), np.float32)
    assert np.array_equal(vary_intensity(image, STILL, np.random.default_rng(0)), image)


@pytest.mark.parametrize(
    "change", [{"gain": (2, 2)}, {"offset": (0.3, 0.3)}, {"noise": 0.1}, {"gamma": (2, 2)}]
)
def test_each_of_them_varies(change):
    image = np.random.default_rng(1).random((1, 20, 20), np.float32)
    varied = vary_intensity(image, STILL.model_copy(update=change), np.random.default_rng(0))
    assert np.abs(varied - image).max() > 0.01


def test_half_of_the_crops_are_blurred_by_up_to_the_given_sigma():
    image = np.random.default_rng(1).random((1, 30, 30), np.float32)
    blurring = STILL.model_copy(update={"blur_px": 2.0})
    made = [vary_intensity(image, blurring, np.random.default_rng(seed)) for seed in range(60)]
    changed = [one for one in made if not np.array_equal(one, image)]
    assert 15 < len(changed) < 45
    least = blurred(image, 2.0).std()  # the wider the blur, the less is left of the noise
    assert all(least <= one.std() < image.std() for one in changed)
    assert min(one.std() for one in changed) < 1.3 * least


def test_the_stain_of_every_crop_is_varied():
    image = np.random.default_rng(1).random((3, 20, 20), np.float32) * np.float32(0.8)
    staining = STILL.model_copy(update={"stain": 0.3})
    for seed in range(5):
        varied = vary_intensity(image, staining, np.random.default_rng(seed))
        expected = vary_stain(image, 0.3, np.random.default_rng(seed))
        assert np.array_equal(varied, expected)
        assert np.abs(varied - image).max() > 0.01


def test_stain_jitter_of_nothing_is_the_image_and_unmixes_as_scikit_image():
    image = np.random.default_rng(1).random((3, 12, 12), np.float32) * np.float32(0.9) + np.float32(
        0.05
    )
    assert np.allclose(vary_stain(image, 0.0, np.random.default_rng(0)), image, atol=1e-4)

    class Double:
        """Doubles the haematoxylin, and shifts nothing."""

        def uniform(self, low, high, shape):
            return np.array([[2.0], [1], [1]]) if low > 0 else np.zeros(shape)

    doubled = vary_stain(image, 0.5, Double())
    stains = [color.rgb2hed(np.moveaxis(one, 0, -1)) for one in (image, doubled)]
    free = (doubled > 0.005).all(0) & (doubled < 0.995).all(0)
    free &= (stains[0] > 1e-3).all(-1)  # scikit-image clips negative densities
    assert free.sum() > 5
    assert np.allclose(stains[1][free, 0], 2 * stains[0][free, 0], rtol=0.02, atol=0.01)
    assert np.allclose(stains[1][free, 1], stains[0][free, 1], rtol=0.02, atol=0.01)
