"""Geometry: cores partition the image; read, mirror and crop are the identity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segpipe.errors import SettingsError
from segpipe.geometry import Box, Lattice, TileGrid, ceil_to

sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))
strides = st.sampled_from([1, 2, 8])


@st.composite
def grids(draw):
    stride = draw(strides)
    core = stride * draw(st.integers(-(-4 // stride), 64 // stride))
    return TileGrid(draw(sizes), core, draw(st.integers(0, 80)), stride)


@given(grids())
def test_kept_cores_partition_the_image(grid):
    times = np.zeros(grid.shape, int)
    for tile in grid:
        times[tile.keep.slices] += 1
    assert (times == 1).all()
    assert len(list(grid)) == len(grid)


@given(grids())
def test_read_mirror_crop_is_the_identity_and_windows_have_one_shape_and_phase(grid):
    image = np.arange(grid.shape[0] * grid.shape[1]).reshape(grid.shape)
    far = grid.core + 2 * grid.halo
    mirrored = np.pad(image, far, mode="reflect")
    for tile in grid:
        window = mirrored[tile.window.shift(far, far).slices]
        assert window.shape == grid.window_shape == tile.window.shape
        np.testing.assert_array_equal(window[tile.crop.slices], image[tile.keep.slices])
        rows, columns = np.unique(window // grid.shape[1]), np.unique(window % grid.shape[1])
        assert tile.read == Box(rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)
        assert tile.core.y0 % grid.stride == 0 and tile.core.x0 % grid.stride == 0
        assert tile.window.y0 == tile.core.y0 - grid.halo


@given(grids())
def test_a_window_has_every_pixel_within_the_halo_of_what_it_keeps(grid):
    image = Box(0, 0, *grid.shape)
    for tile in grid:
        assert tile.read.contains(tile.keep.grow(grid.halo).intersect(image))


@given(grids(), st.integers(1, 5))
def test_regions_of_whole_cores_hold_each_tile_once(grid, cores):
    cell = (grid.core_shape[0] * cores, grid.core_shape[1] * cores)
    seen = [tile.index for region in Lattice(grid.shape, cell) for tile in grid.meeting(region.box)]
    assert sorted(seen) == sorted(tile.index for tile in grid)


@given(sizes, sizes, st.tuples(*[st.integers(-40, 200)] * 4))
def test_cells_that_meet_a_box_are_those_that_share_a_pixel(shape, cell, corners):
    y0, y1 = sorted(corners[:2])
    x0, x1 = sorted(corners[2:])
    box = Box(y0, x0, y1, x1)
    lattice = Lattice(shape, cell)
    expected = [region for region in lattice if region.box.intersect(box).area]
    assert list(lattice.meeting(box)) == expected
    assert all(lattice.named(region.name) == region for region in lattice)


@given(st.tuples(*[st.integers(-20, 20)] * 8))
def test_intersection_is_the_common_pixels(corners):
    first, second = (
        Box(*sorted(c[:2])[:1], *sorted(c[2:])[:1], *sorted(c[:2])[1:], *sorted(c[2:])[1:])
        for c in (corners[:4], corners[4:])
    )
    pixels = [
        {(y, x) for y in range(b.y0, b.y1) for x in range(b.x0, b.x1)}
        for b in (first, second, first.intersect(second))
    ]
    assert pixels[2] == pixels[0] & pixels[1]
    assert first.contains(second) == (pixels[1] <= pixels[0])


def test_a_small_image_gets_a_window_of_its_own_size():
    grid = TileGrid((100, 1), 1024, 96, 16)
    assert grid.core_shape == (112, 16)
    assert grid.window_shape == (112 + 192, 16 + 192)
    assert len(grid) == 1


def test_two_tiles_share_an_axis_that_is_longer_than_one_core():
    grid = TileGrid((1392, 1040), 1024, 96, 16)
    assert grid.core_shape == (704, 528)
    assert len(grid) == 4
    assert TileGrid((2048, 1024), 1024, 96, 16).core_shape == (1024, 1024)
    assert TileGrid((2049, 1025), 1024, 96, 16).core_shape == (1024, 528)


@given(grids())
def test_no_axis_gets_more_tiles_or_larger_cores_than_the_core_asks_for(grid):
    for size, count, core in zip(grid.shape, grid.lattice.count, grid.core_shape, strict=True):
        assert count == -(-size // grid.core) and core <= grid.core


def test_boxes_move_and_grow():
    box = Box(2, 3, 5, 9)
    assert box.shape == (3, 6) and box.area == 18
    assert box.grow(1) == Box(1, 2, 6, 10)
    assert box.within(Box(1, 1, 9, 9)) == Box(1, 2, 4, 8)
    assert str(box) == "[2:5, 3:9]"
    with pytest.raises(ValueError, match="ends before it starts"):
        Box(1, 0, 0, 0)


def test_a_core_out_of_phase_is_refused_with_the_size_that_would_do():
    with pytest.raises(SettingsError, match=r"set tile\.core to 1008"):
        TileGrid((10, 10), 1000, 96, 16)
    with pytest.raises(SettingsError):
        TileGrid((0, 10), 16, 0, 16).lattice  # noqa: B018
    with pytest.raises(IndexError):
        TileGrid((10, 10), 16, 0, 16)[1, 0]
    with pytest.raises(IndexError):
        Lattice((10, 10), (5, 5))[2, 0]


@given(st.integers(0, 1000), st.integers(1, 50))
def test_ceil_to(value, step):
    up = ceil_to(value, step)
    assert up % step == 0 and 0 <= up - value < step
