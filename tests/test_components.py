"""Stitching: whatever the cuts, the labels of the whole image, ids included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

import plain
from segpipe import seams
from segpipe.components import Decode, RegionComponents, label_region, to_byte
from segpipe.errors import SettingsError
from segpipe.geometry import Box, Lattice
from segpipe.growth import Field, grow, reach
from segpipe.runs import Runs
from segpipe.seams import merge_seams


def cut_and_stitch(foreground, interior, decode, cell, order=None, last=4):
    """The three passes in memory; `order` shuffles the regions of the parallel passes."""
    lattice = Lattice(foreground.shape, (cell, cell))
    regions = list(lattice)
    if order is not None:
        regions = [regions[i] for i in np.random.default_rng(order).permutation(len(regions))]
    found: dict[str, RegionComponents] = {}
    for region in regions:
        box = region.box.slices
        found[region.name] = label_region(foreground[box], interior[box], region, lattice, decode)
    ids_of = {}
    count = 0
    for band in merge_seams(
        lattice,
        lambda region: found[region.name].seams,
        lambda region: found[region.name].anchors,
        decode,
    ):
        assert band.first_id == count + 1
        count = band.last_id
        for column, ids in enumerate(band.ids):
            ids_of[lattice[band.row, column].name] = ids
    labels = None
    steps, halo = reach(decode, last)
    while True:
        state = np.zeros(foreground.shape, np.uint32)
        moving = False
        for region in regions:
            window = region.box.grow(halo).intersect(Box(0, 0, *foreground.shape))
            field = Field.empty(window.shape)
            for near in lattice.meeting(window):
                runs = Runs.unpack(found[near.name].runs.pack())
                runs.paint(ids_of[near.name], near.box.within(window), *field.inner)
            if labels is not None:
                field.inner[0][...] = labels[window.slices]
            core = region.box.within(window)
            moving |= grow(field, steps, core).area > 0
            state[region.box.slices] = field.inner[0][core.slices]
        labels = state
        if not moving:
            return labels, count
        steps, halo = (0,) * (len(steps) - 1) + (last,), last + 1


def check(foreground, interior, decode, cell, order=None, last=4):
    expected = plain.instances(
        foreground,
        interior,
        decode.foreground,
        decode.interior,
        decode.min_area,
        decode.growth,
        decode.growth_steps,
    )
    labels, count = cut_and_stitch(foreground, interior, decode, cell, order, last)
    np.testing.assert_array_equal(labels, expected)
    assert count == expected.max(initial=0)
    mask = foreground >= decode.foreground
    components, number = ndimage.label(mask, plain.CROSS)
    areas = np.bincount(components.ravel(), minlength=number + 1)
    kept = mask & (areas[components] >= decode.min_area)
    np.testing.assert_array_equal(labels > 0, kept)
    return labels


def smooth(rng, shape, sigma):
    field = ndimage.gaussian_filter(rng.standard_normal(shape), sigma, mode="wrap")
    span = field.max() - field.min()
    return (
        np.zeros(shape, np.uint8)
        if span == 0
        else (255 * (field - field.min()) / span).astype(np.uint8)
    )


DEFAULT = Decode(128, (128,), 10, (102, 76, 51, 25, 0), 4)


@settings(max_examples=120)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    cell=st.integers(7, 80),
    sigma=st.sampled_from([0.0, 0.6, 1.0, 2.0, 5.0]),
    interior=st.sampled_from([(), (128,), (200, 140, 90), (255, 1)]),
    foreground=st.sampled_from([1, 90, 128, 255]),
    min_area=st.sampled_from([1, 3, 10, 60]),
    growth=st.sampled_from([(0,), (102, 76, 51, 25, 0), (200, 0)]),
    steps=st.integers(1, 5),
    last=st.integers(1, 9),
)
@example(1, (64, 64), 7, 2.0, (200, 140, 90), 90, 10, (102, 76, 51, 25, 0), 2, 3)
def test_tiled_equals_whole_for_independent_random_fields(
    seed, shape, cell, sigma, interior, foreground, min_area, growth, steps, last
):
    rng = np.random.default_rng(seed)
    decode = Decode(foreground, interior, min_area, growth, steps)
    check(smooth(rng, shape, sigma), smooth(rng, shape, sigma), decode, cell, seed, last)


def test_full_and_empty_images():
    for value in (0, 255):
        full = np.full((50, 33), value, np.uint8)
        labels = check(full, full, DEFAULT, 8)
        assert labels.max() == (1 if value else 0)


def test_an_object_larger_than_a_region_and_one_across_four():
    foreground = np.zeros((60, 60), np.uint8)
    foreground[2:50, 3:40] = 255
    foreground[52:59, 43:55] = 255
    interior = ndimage.distance_transform_edt(foreground)
    interior = (255 * interior / interior.max()).astype(np.uint8)
    assert check(foreground, interior, DEFAULT, 14).max() == 2


def test_a_ring_and_a_line_one_pixel_thin_that_wind_through_many_regions():
    y, x = np.mgrid[:64, :64]
    radius = np.hypot(y - 31.5, x - 31.5)
    ring = ((radius > 24) & (radius < 28)).astype(np.uint8) * 255
    assert check(ring, ring // 2 + 1, DEFAULT, 9).max() == 1
    snake = np.zeros((64, 64), np.uint8)
    snake[::4] = 255
    snake[1::8, -1] = snake[2::8, -1] = snake[3::8, -1] = 255
    snake[5::8, 0] = snake[6::8, 0] = snake[7::8, 0] = 255
    interior = np.zeros_like(snake)
    interior[0, :12] = 255  # growth has to run the whole way, through many rounds
    assert check(snake, interior, DEFAULT, 10).max() == 1


def test_two_discs_that_meet_at_a_seam_stay_two():
    y, x = np.mgrid[:40, :80]
    interior = np.zeros((40, 80), np.uint8)
    for centre in (28, 51):
        distance = 1 - np.hypot(y - 20, x - centre) / 12
        interior = np.maximum(interior, (255 * distance.clip(0)).astype(np.uint8))
    foreground = (interior > 0).astype(np.uint8) * 255
    labels = check(foreground, interior, DEFAULT, 40)
    assert labels.max() == 2
    assert labels[20, 38] == 1 and labels[20, 41] == 2


def test_order_of_the_regions_does_not_matter():
    rng = np.random.default_rng(3)
    foreground, interior = smooth(rng, (90, 90), 1.5), smooth(rng, (90, 90), 1.5)
    results = [cut_and_stitch(foreground, interior, DEFAULT, 16, order)[0] for order in range(4)]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_thresholds_in_bytes_are_those_that_reach_the_probability():
    assert to_byte(0.5) == 128
    assert to_byte(0.0) == 0
    assert to_byte(1.0) == 255
    assert to_byte(0.2) == 51  # 51 / 255 is .2 but for rounding


@pytest.mark.parametrize(
    "change",
    [
        {"foreground": 0},
        {"interior": (100, 128)},
        {"growth": (100, 50)},
        {"growth": ()},
        {"min_area": 0},
        {"growth_steps": 0},
    ],
)
def test_senseless_decoding_is_refused(change):
    fields = {
        "foreground": 128,
        "interior": (128,),
        "min_area": 10,
        "growth": (0,),
        "growth_steps": 4,
    }
    with pytest.raises(SettingsError):
        Decode(**(fields | change))


@pytest.mark.parametrize(
    "broken",
    [
        # What meets is not joined.
        lambda one, other: np.empty((0, 2), np.int64),
        # Every pair is moved by one pixel.
        lambda one, other: np.stack([one[1:], other[:-1]], axis=1)[
            (one[1:] >= 0) & (other[:-1] >= 0)
        ],
    ],
    ids=["forgotten", "moved"],
)
def test_a_broken_seam_is_seen(monkeypatch, broken):
    """The property above can fail: break the line that pairs components across a seam."""
    rng = np.random.default_rng(5)
    foreground, interior = smooth(rng, (64, 64), 0.7), smooth(rng, (64, 64), 0.7)
    check(foreground, interior, DEFAULT, 16)
    monkeypatch.setattr(
        seams,
        "_meeting",
        broken,
    )
    with pytest.raises(AssertionError):
        check(foreground, interior, DEFAULT, 16)
