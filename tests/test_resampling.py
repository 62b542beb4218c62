"""The working resolution: resampled in regions is resampled whole, bit for bit, and as others do it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from segpipe.errors import InputError, SettingsError
from segpipe.geometry import Box, Lattice
from segpipe.resampling import (
    Wish,
    axis_taps,
    choose_resolution,
    full_box,
    resample,
    source_box,
    to_full,
    wanted_scale,
)

RATIOS = st.one_of(st.sampled_from([0.5, 1.0, 2.0, 0.3, 1.06, 1.9, 4 / 3, 7.3]), st.floats(0.2, 12))
DTYPES = [np.uint8, np.uint16, np.float32]


def made(shape, dtype, seed):
    rng = np.random.default_rng(seed)
    if dtype == np.float32:
        return rng.normal(0, 100, shape).astype(np.float32)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def plainly(image, ratio):
    """Each output pixel by itself, from the definition: a triangle around its centre."""
    channels, height, width = image.shape
    out = tuple(max(1, math.ceil(size / ratio - 1e-6)) for size in (height, width))
    result = np.empty((channels, *out))
    radius = max(1.0, ratio)

    def weights(place, size):
        centre = min(max((place + 0.5) * ratio - 0.5, 0), size - 1)
        found = np.array([max(0.0, 1 - abs(one - centre) / radius) for one in range(size)])
        return found / found.sum()

    across = [weights(x, width) for x in range(out[1])]
    for y in range(out[0]):
        down = weights(y, height)
        for x in range(out[1]):
            result[:, y, x] = np.einsum("y,cyx,x->c", down, image.astype(float), across[x])
    return result


def whole(image, ratio):
    shape = image.shape[1:]
    out = choose_resolution([shape], [1.0], ratio).shape if abs(ratio - 1) > 0.05 else None
    box = Box(0, 0, *(out or (max(1, math.ceil(size / ratio - 1e-6)) for size in shape)))
    return resample(image, Box(0, 0, *shape), box, ratio, shape)


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    RATIOS,
    st.sampled_from(DTYPES),
    st.integers(3, 17),
)
def test_in_regions_of_any_size_it_is_the_whole_bit_for_bit(seed, shape, ratio, dtype, region):
    image = made((2, *shape), dtype, seed)
    expected = whole(image, ratio)
    found = np.empty_like(expected)
    for one in Lattice(expected.shape[1:], (region, region)):
        at = source_box(one.box, ratio, shape)
        block = image[(slice(None), *at.slices)]
        found[(slice(None), *one.box.slices)] = resample(block, at, one.box, ratio, shape)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.4, 0.5, 1.06, 1.5, 2.0, 3.7])
def test_it_is_the_slow_obvious_version(ratio, dtype):
    image = made((2, 19, 23), dtype, 3)
    found, expected = whole(image, ratio), plainly(image, ratio)
    assert found.dtype == dtype
    if dtype == np.float32:
        assert np.allclose(found, expected, rtol=1e-6, atol=1e-4)
    else:
        assert np.abs(found - expected).max() <= 0.5 + 1e-6  # rounded, not cut off


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.25, 2.0, 5.0])
def test_pillow_does_the_same(ratio):
    image = made((1, 40, 60), np.float32, 5)
    found = whole(image, ratio)[0]
    theirs = Image.fromarray(image[0]).resize(found.shape[::-1], Image.Resampling.BILINEAR)
    inside = slice(1, -1)  # at the ends Pillow's centres are not held inside where it enlarges
    assert np.allclose(found[inside, inside], np.asarray(theirs)[inside, inside], atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.3, 1.7, 2.0, 9.1])
def test_a_constant_stays_what_it_is_and_the_mean_of_a_ramp_its_place(dtype, ratio):
    top = 3e7 if dtype == np.float32 else np.iinfo(dtype).max
    assert (whole(np.full((1, 30, 30), top, dtype), ratio) == dtype(top)).all()
    ramp = np.broadcast_to(np.arange(200, dtype=np.float32), (1, 4, 200))
    found = whole(ramp, ratio)[0, 0]
    inside = slice(math.ceil(2 / min(ratio, 1)), -math.ceil(2 / min(ratio, 1)) - 1)
    # the weights of a triangle that no whole number of pixels fits add up to 1 by division
    places = to_full(np.arange(len(found)), ratio)
    assert np.abs(found[inside] - places[inside]).max() <= (0.08 if ratio in (1.7, 9.1) else 1e-4)


def test_what_is_not_a_number_stays_where_it_is():
    image = np.ones((1, 21, 21), np.float32)
    image[0, 10, 10] = np.nan
    assert np.isnan(whole(image, 3.0)).sum() <= 4
    assert np.isnan(whole(image, 1.0)).sum() == 1


@given(st.integers(0, 500), st.integers(1, 40), RATIOS, st.integers(1, 900))
def test_weights_are_a_mean_of_pixels_that_exist(start, count, ratio, size):
    taps = axis_taps(start, start + count, ratio, size)
    assert (taps.count >= 1).all() and (taps.first >= 0).all()
    assert (taps.first + taps.count <= size).all()
    assert np.allclose(taps.weight.sum(1), 1) and (taps.weight >= 0).all()
    used = np.arange(taps.weight.shape[1]) < taps.count[:, None]
    assert not taps.weight[~used].any()


def wish(**told):
    told = {"factor": None, "diameter_px": None, "pixel_size_um": None} | told
    told = {"model_diameter_px": None, "model_pixel_size_um": None} | told
    return Wish(model="net", **told)


def test_the_scale_follows_from_the_first_that_is_said():
    assert wanted_scale(wish()) == 1.0
    assert wanted_scale(wish(pixel_size_um=0.25)) == 1.0  # the model takes what there is
    assert wanted_scale(wish(pixel_size_um=0.25, model_pixel_size_um=0.5)) == 2.0
    assert wanted_scale(wish(diameter_px=60, model_diameter_px=20, model_pixel_size_um=0.5)) == 3.0
    assert wanted_scale(wish(factor=0.5, model_pixel_size_um=0.5)) == 2.0


@pytest.mark.parametrize(
    ("told", "error", "says"),
    [
        ({"model_pixel_size_um": 0.5}, InputError, "--pixel-size UM"),
        ({"diameter_px": 30}, SettingsError, "tile.scale"),
        ({"pixel_size_um": 250.0, "model_pixel_size_um": 0.5}, InputError, "500 times as wide"),
        ({"pixel_size_um": 1e-4, "model_pixel_size_um": 0.5}, InputError, "5,000 times narrower"),
        ({"factor": 1e-3}, InputError, "tile.scale 0.001"),
    ],
)
def test_a_scale_that_cannot_be_known_is_an_error_that_names_the_setting(told, error, says):
    with pytest.raises(error, match=says):
        wanted_scale(wish(**told))


def test_the_nearest_finer_level_is_read_and_a_level_that_is_near_enough_is_taken_as_it_is():
    shapes, downsamples = [(4001, 3000), (1000, 750), (250, 187)], [1.0, 4.0, 16.0]
    for wanted, level, resampled in [
        (0.3, 0, True),
        (0.96, 0, False),
        (1.05, 0, False),
        (1.06, 0, True),
        (3.7, 0, True),
        (3.81, 1, False),
        (4.2, 1, False),
        (5, 1, True),
        (16.3, 2, False),
        (40, 2, True),
    ]:
        found = choose_resolution(shapes, downsamples, wanted)
        assert (found.level, found.resampled) == (level, resampled), wanted
        if not found.resampled:
            assert found.shape == shapes[level] and found.scale == downsamples[level]
        else:
            assert found.scale == wanted
            assert found.shape == tuple(math.ceil(size / wanted) for size in shapes[0])
    assert choose_resolution([(5, 3)], [1.0], 40).shape == (1, 1)
    assert choose_resolution([(300, 300)], [1.0], 0.1 * 3).shape == (1000, 1000)  # not 1001


def test_boxes_of_full_resolution_hold_every_pixel_that_is_shown():
    assert full_box(Box(1, 2, 3, 4), 1.0, (9, 9)) == Box(1, 2, 3, 4)
    assert full_box(Box(1, 2, 3, 4), 2.0, (9, 9)) == Box(2, 4, 6, 8)
    assert full_box(Box(1, 0, 3, 5), 1.9, (5, 9)) == Box(1, 0, 5, 9)
    assert full_box(Box(0, 1, 3, 3), 0.5, (5, 9)) == Box(0, 0, 2, 2)
    assert to_full(7, 1.0) == 7 and to_full(0, 2.0) == 0.5 and to_full(0, 0.5) == -0.25
