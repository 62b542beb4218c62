"""Level and contrast of windows: never below those of the pixels, wherever the image is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.util import view_as_blocks

from segpipe.geometry import Box, Lattice, TileGrid
from segpipe.occupancy import (
    SCALES,
    cell_extremes,
    cell_size,
    empty_tiles,
    from_text,
    tile_occupancy,
    to_text,
)


def random_image(shape, dtype, seed=0):
    random = np.random.default_rng(seed)
    values = random.gamma(2.0, 40.0, shape) + 5
    return np.minimum(values, 255).astype(dtype)


def direct(pixels, ranges):
    """Level and contrast of a window (C, h, w) whose sides are multiples of 8."""
    level = contrast = 0.0
    for plane, (low, high) in zip(pixels.astype(np.float64), ranges, strict=True):
        normal = (plane - low) / (high - low)
        level = max(level, np.abs(normal).max())
        for k in SCALES:
            squares = view_as_blocks(np.ascontiguousarray(normal), (k, k))
            means = squares.mean((2, 3))
            contrast = max(contrast, k * np.ptp(means))
    return level, contrast


def starts(size, cell, k):
    """Where squares of k pixels start along an axis, and the cell that each belongs to."""
    even = [(at, at // cell) for at in range(0, size // 8 * 8, k)]
    last = [(at, (size - 1) // cell) for at in range(size - 8, size, k)]
    return even + (last if size % 8 else [])


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(8, 60), st.integers(8, 60)),
    cell=st.sampled_from([8, 16, 32]),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
)
def test_extremes_by_the_plain_version(shape, cell, dtype):
    image = random_image((2, *shape), dtype, sum(shape))
    expected = np.empty((2, len(SCALES), 2, -(-shape[0] // cell), -(-shape[1] // cell)))
    expected[0], expected[1] = np.inf, -np.inf
    for place, k in enumerate(SCALES):
        rows, columns = (starts(size, cell, k) for size in shape)
        for y, row in rows:
            for x, column in columns:
                for channel, plane in enumerate(image):
                    mean = plane[y : y + k, x : x + k].mean(dtype=np.float64)
                    at = place, channel, row, column
                    expected[0][at] = min(expected[0][at], mean)
                    expected[1][at] = max(expected[1][at], mean)
        covered = {at + step for at, _ in rows for step in range(k)}
        assert covered == set(range(shape[0]))
    np.testing.assert_array_equal(cell_extremes(image, cell), expected.astype(np.float32))


@settings(max_examples=25)
@given(shape=st.tuples(st.integers(1, 90), st.integers(1, 90)))
def test_nothing_is_taken_from_elsewhere(shape):
    """One bright pixel is seen at each scale, by its own cell and at most the last one beside it."""
    height, width = shape
    image = np.zeros((1, *shape), np.uint16)
    y, x = height // 2, width // 3
    image[0, y, x] = 64
    found = cell_extremes(image, 16)[1]
    assert not cell_extremes(image, 16)[0, 0].any() or image.size == 1
    for place, k in enumerate(SCALES):
        # a side shorter than 8 pixels repeats its last ones
        copies = [
            (8 - n if at == n - 1 else 0) + 1 if n < 8 else 1 for at, n in ((y, height), (x, width))
        ]
        assert 64 / k**2 <= found[place].max() <= 64 / k**2 * min(copies[0], k) * min(copies[1], k)
        for row, column in zip(*np.nonzero(found[place, 0]), strict=True):
            assert 0 <= row - y // 16 <= 1
            assert 0 <= column - x // 16 <= 1


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_regions_cannot_be_seen(dtype):
    image = random_image((1, 150, 203), dtype)
    whole = cell_extremes(image, 32)
    for region in (32, 64, 96):
        parts = [
            [cell_extremes(image[:, *lattice[row, column].box.slices], 32) for column in columns]
            for lattice in [Lattice((150, 203), (region, region))]
            for row, columns in [(row, range(lattice.count[1])) for row in range(lattice.count[0])]
        ]
        np.testing.assert_array_equal(np.block(parts), whole)


@pytest.mark.parametrize(
    ("shape", "core", "halo", "stride"),
    [((200, 160), 32, 16, 16), ((160, 96), 64, 24, 8), ((137, 43), 16, 40, 4), ((9, 90), 32, 8, 8)],
)
def test_windows_have_what_their_cells_have_and_no_less_than_their_pixels(
    shape, core, halo, stride
):
    image = random_image((2, *shape), np.uint16)
    ranges = [(3.0, 90.0), (10.0, 60.0)]
    grid = TileGrid(shape, core, halo, stride)
    cell = cell_size(core)
    found = tile_occupancy(cell_extremes(image, cell), cell, grid, ranges)
    for tile in grid:
        read = tile.read
        inner = Box(*rounded(read, 8, -1))
        level, contrast = direct(image[:, *inner.slices], ranges)
        assert found[0][tile.index] >= np.float32(level)
        assert found[1][tile.index] >= np.float32(contrast)
        outer = Box(*rounded(read, cell, 1)).intersect(Box(0, 0, *shape))
        if not any(size % 8 for size in shape):
            expected = direct(image[:, *outer.slices], ranges)
            np.testing.assert_allclose(found[:, *tile.index], expected, rtol=1e-6)
        low, high = image[:, *outer.slices].min((1, 2)), image[:, *outer.slices].max((1, 2))
        ends = [
            (end - r[0]) / (r[1] - r[0])
            for r, *both in zip(ranges, low, high, strict=True)
            for end in both
        ]
        assert found[0][tile.index] == np.float32(np.abs(ends).max())


def rounded(box, step, sign):
    """Corners of a box on a lattice: outwards, or inwards with sign -1."""
    down, up = (lambda v: v // step * step), (lambda v: -(-v // step) * step)
    low, high = (down, up) if sign > 0 else (up, down)
    return low(box.y0), low(box.x0), high(box.y1), high(box.x1)


def test_what_is_not_finite_is_never_empty():
    image = np.ones((1, 64, 64), np.float32)
    image[0, 5, 5], image[0, 40, 40] = np.nan, np.inf
    grid = TileGrid((64, 64), 32, 0, 1)
    found = tile_occupancy(cell_extremes(image, 32), 32, grid, [(0.0, 1e9)])
    assert empty_tiles(found, 1.0, 1.0).tolist() == [[False, True], [True, False]]


def test_a_channel_of_no_width_does_not_count():
    image = random_image((2, 32, 32), np.uint8)
    grid = TileGrid((32, 32), 32, 0, 1)
    extremes = cell_extremes(image, 32)
    both = tile_occupancy(extremes, 32, grid, [(7.0, 7.0), (0.0, 100.0)])
    alone = tile_occupancy(extremes[:, :, 1:], 32, grid, [(0.0, 100.0)])
    np.testing.assert_array_equal(both, alone)
    assert not tile_occupancy(extremes, 32, grid, [(7.0, 7.0)] * 2).any()


def test_noise_has_one_contrast_at_every_scale_and_an_object_more_where_it_fits():
    noise = np.random.default_rng(0).normal(0, 0.01, (1, 512, 512)).astype(np.float32)
    low, high = cell_extremes(noise, 512)[:, :, 0, 0, 0]
    of_noise = np.array(SCALES) * (high - low)
    assert of_noise.max() < 1.4 * of_noise.min()
    noise[0, 240:256, 240:256] += 0.05
    low, high = cell_extremes(noise, 512)[:, :, 0, 0, 0]
    assert (np.array(SCALES) * (high - low)).argmax() == 3


def test_a_manifest_keeps_it():
    occupancy = np.random.default_rng(0).random((2, 3, 5)).astype(np.float32)
    occupancy[0, 1, 1] = np.nan
    np.testing.assert_array_equal(from_text(to_text(occupancy)), occupancy)


@pytest.mark.parametrize(
    ("core", "cell"), [(1024, 128), (64, 64), (80, 16), (24, 8), (100, None), (50, None)]
)
def test_cells_divide_cores_and_hold_whole_squares(core, cell):
    assert cell_size(core) == cell
