"""Measurements: the same for any cut, and what scikit-image measures on the whole image."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import regionprops

from segpipe.geometry import Lattice
from segpipe.properties import ROW, bands_of_rows, instance_columns, merge_rows, sum_region


def ids_by_seed(labels, rng):
    """Relabel so that ids rank the places of seeds, any pixel of each object; and those places."""
    flat = labels.ravel()
    seeds = np.array([rng.choice(np.flatnonzero(flat == one)) for one in range(1, flat.max() + 1)])
    ranks = np.zeros(flat.max() + 1, np.uint32)
    ranks[1 + np.argsort(seeds)] = np.arange(1, len(seeds) + 1)
    return ranks[labels], np.sort(seeds)


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.integers(3, 70),
    st.sampled_from([1, 3, 1000]),
)
def test_any_cut_gives_the_table_that_scikit_image_measures(seed, shape, cell, most):
    rng = np.random.default_rng(seed)
    blobs = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5) > 0.05
    labels, seeds = ids_by_seed(ndimage.label(blobs)[0], rng)
    foreground = rng.integers(0, 256, shape, dtype=np.uint8)
    lattice = Lattice(shape, (cell, cell))
    rows = {
        region.name: sum_region(
            labels[region.box.slices], foreground[region.box.slices], region.box
        )
        for region in lattice
    }
    edges = [row * cell * shape[1] for row in range(lattice.count[0])]
    firsts = np.array([*np.searchsorted(seeds, edges), len(seeds)]) + 1
    bands = list(
        bands_of_rows(
            firsts.tolist(),
            [
                lambda row=row: [
                    rows[lattice[row, column].name] for column in range(lattice.count[1])
                ]
                for row in range(lattice.count[0])
            ],
            most,
        )
    )
    assert all(len(part) <= most for _, part in bands)
    for band, part in bands:
        assert ((part["id"] >= firsts[band]) & (part["id"] < firsts[band + 1])).all()
    merged = np.concatenate([part for _, part in bands])
    np.testing.assert_array_equal(merged["id"], np.arange(1, labels.max() + 1))
    table = instance_columns(merged, shape, 0.5)
    for place, one in enumerate(regionprops(labels, foreground)):
        assert table["area_px"][place] == one.area
        np.testing.assert_allclose(
            (table["centroid_y_px"][place], table["centroid_x_px"][place]), one.centroid
        )
        y0, x0, y1, x1 = one.bbox
        assert [table[f"bbox_{key}_px"][place] for key in ("y0", "x0", "y1", "x1")] == [
            y0,
            x0,
            y1,
            x1,
        ]
        np.testing.assert_allclose(table["mean_probability"][place], one.intensity_mean / 255)
        np.testing.assert_allclose(
            table["equivalent_diameter_px"][place], one.equivalent_diameter_area
        )
        edge = y0 == 0 or x0 == 0 or y1 == shape[0] or x1 == shape[1]
        assert table["touches_border"][place] == edge
    np.testing.assert_allclose(table["area_um2"], table["area_px"] / 4)


def test_um_are_nan_where_the_pixel_size_is_not_known():
    labels = np.ones((2, 2), np.uint32)
    rows = sum_region(labels, labels.astype(np.uint8), Lattice((2, 2), (2, 2))[0, 0].box)
    assert np.isnan(instance_columns(rows, (2, 2), None)["area_um2"]).all()


def test_no_objects_no_rows():
    assert len(merge_rows(np.zeros(0, ROW))) == 0
    table = instance_columns(np.zeros(0, ROW), (5, 5), 1.0)
    assert all(len(column) == 0 for column in table.values())
