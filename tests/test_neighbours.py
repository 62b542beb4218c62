"""Distances to nearest neighbours: those of a k-d tree, however the points come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from segpipe.neighbours import nearest_distances


def in_batches(points, batch):
    return np.concatenate([np.zeros(0), *nearest_distances(points, batch)])


def scattered(seed, kind, count):
    rng = np.random.default_rng(seed)
    points = {
        "even": lambda: rng.random((count, 2)) * [5000, 3000],
        "clumps": lambda: rng.normal(rng.choice([0, 1e5], (count, 2)), 20),
        "grid": lambda: rng.integers(0, 12, (count, 2)).astype(float) * 10,
        "row": lambda: np.stack([np.full(count, 7.5), rng.random(count) * 1e6], axis=1),
        "column": lambda: np.stack([rng.random(count) * 1e6, np.full(count, 7.5)], axis=1),
        "one place": lambda: np.full((count, 2), 3.3),
        "far off": lambda: np.vstack([rng.random((count - 1, 2)), [[1e9, 1e9]]]),
    }[kind]()
    return points[np.argsort(points[:, 0] + rng.normal(size=count) * 5)]


KINDS = ["even", "clumps", "grid", "row", "column", "one place", "far off"]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS), st.integers(2, 200), st.integers(3, 90))
def test_distances_are_those_of_a_tree_and_the_same_for_any_batches(seed, kind, count, batch):
    points = scattered(seed, kind, count)
    found = in_batches(points, batch)
    expected, _ = cKDTree(points).query(points, k=2)
    np.testing.assert_allclose(found, expected[:, 1], rtol=1e-12)
    assert found.tobytes() == in_batches(points, count).tobytes()


@pytest.mark.parametrize("count", [0, 1])
def test_nobody_is_near(count):
    found = in_batches(np.ones((count, 2)), 5)
    assert len(found) == count and np.isnan(found).all()
