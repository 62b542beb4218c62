"""Percentiles: exact order statistics, however the pixels are counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segpipe import percentiles
from segpipe.percentiles import Histogram

floats = hnp.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@given(hnp.arrays(np.uint16, st.integers(1, 80)), st.floats(0, 100), st.integers(1, 79))
def test_integers_equal_numpy_without_interpolation(pixels, percent, cut):
    parts = [Histogram.of(part) for part in np.split(pixels, [min(cut, len(pixels))])]
    total = Histogram.sum(parts)
    key, below = total.order_statistic(percentiles.rank(percent, total.total))
    assert percentiles.value_of(key, pixels.dtype) == pytest.approx(
        np.percentile(pixels, percent, method="inverted_cdf"), abs=0
    )
    assert below == (pixels < key).sum()


@given(floats, st.sampled_from([0.0, 1.0, 25.0, 50.0, 99.8, 100.0]))
def test_floats_in_two_passes_equal_numpy(pixels, percent):
    keys = percentiles.keys_of(pixels)
    total = Histogram.of(percentiles.upper(keys))
    rank = percentiles.rank(percent, total.total)
    half, below = total.order_statistic(rank)
    lower = percentiles.lower(keys, [half])[0]
    value = percentiles.value_of(half << 16 | lower.order_statistic(rank - below)[0], pixels.dtype)
    assert value == np.percentile(pixels, percent, method="inverted_cdf")


@given(floats)
def test_keys_of_floats_have_the_order_of_the_values(pixels):
    keys = percentiles.keys_of(pixels)
    np.testing.assert_array_equal(keys[np.argsort(pixels, kind="stable")], np.sort(keys))
    assert [percentiles.value_of(int(key), pixels.dtype) for key in keys] == pixels.tolist()


def test_what_is_not_finite_is_left_out():
    pixels = np.array([np.nan, 1, np.inf, -np.inf, 2], np.float32)
    assert len(percentiles.keys_of(pixels)) == 2


def test_a_tile_is_occupied_unless_every_channel_is_constant():
    pixels = np.zeros((2, 4, 4), np.uint8)
    pixels[1] = 7
    assert not percentiles.is_occupied(pixels)
    pixels[1, 2, 2] = 8
    assert percentiles.is_occupied(pixels)
