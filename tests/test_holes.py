"""Holes: whatever the cuts, those of the whole image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from segpipe import holes
from segpipe.geometry import Lattice
from segpipe.holes import fill_holes, label_holes

EIGHT = np.ones((3, 3), bool)


def plain(mask, max_hole):
    """Every component of the complement by itself."""
    filled = mask.copy()
    components, count = ndimage.label(~mask, EIGHT)
    frame = {*components[0], *components[-1], *components[:, 0], *components[:, -1]}
    for number in range(1, count + 1):
        if number not in frame and (components == number).sum() <= max_hole:
            filled |= components == number
    return filled


def tiled(mask, cell, max_hole):
    lattice = Lattice(mask.shape, (cell, cell))
    found = {
        region.name: label_holes(mask[region.box.slices], region, lattice, max_hole)
        for region in lattice
    }
    filled = mask.copy()
    tables = fill_holes(lattice, lambda region: found[region.name][1], max_hole)
    for region, table in zip(lattice, tables, strict=True):
        filled[region.box.slices] |= table[found[region.name][0]]
    return filled


@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.integers(3, 60),
    st.sampled_from([0.0, 0.6, 1.0, 2.0]),
    st.sampled_from([-0.3, 0.0, 0.2]),
    st.sampled_from([1, 5, 40, 10_000]),
)
def test_tiled_equals_whole(seed, shape, cell, sigma, level, max_hole):
    noise = np.random.default_rng(seed).standard_normal(shape)
    field = ndimage.gaussian_filter(noise, sigma)
    mask = field > level * field.std()
    np.testing.assert_array_equal(tiled(mask, cell, max_hole), plain(mask, max_hole))


def test_a_ring_over_many_regions_is_filled_up_to_the_size_of_its_hole():
    y, x = np.mgrid[:40, :40]
    ring = np.abs(np.hypot(y - 19, x - 20) - 15) < 2
    hole = int(ndimage.binary_fill_holes(ring).sum() - ring.sum())
    assert tiled(ring, 7, hole).sum() == ring.sum() + hole
    assert tiled(ring, 7, hole - 1).sum() == ring.sum()


def test_diagonals_across_a_corner_of_four_regions_count():
    mask = np.ones((8, 8), bool)
    mask[3, 3] = mask[4, 4] = False  # one hole of two pixels, seen 8-connected
    assert tiled(mask, 4, 1).sum() == 62
    assert tiled(mask, 4, 2).sum() == 64


def test_a_broken_seam_is_seen(monkeypatch):
    y, x = np.mgrid[:40, :40]
    ring = np.abs(np.hypot(y - 19, x - 20) - 15) < 2
    monkeypatch.setattr(holes, "_meeting", lambda _one, _other: np.empty((0, 2), np.int64))
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(tiled(ring, 7, 60), plain(ring, 60))
