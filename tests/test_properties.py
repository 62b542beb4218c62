"""Measurements: the same to the last bit for any cut, and what scikit-image measures on the whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from skimage.measure import regionprops

from segpipe.bands import Bands
from segpipe.columns import Frame, instance_columns
from segpipe.geometry import Box, Lattice
from segpipe.intensities import largest_of, unit_of
from segpipe.perimeters import MARGIN
from segpipe.properties import (
    ROW,
    Features,
    ObjectSums,
    measure_region,
    merge_rows,
    plane_sums,
    row_dtype,
    sum_region,
)

COPIED = {
    "area_px": "area",
    "centroid_y_px": "centroid-0",
    "centroid_x_px": "centroid-1",
    "equivalent_diameter_px": "equivalent_diameter_area",
    "perimeter_px": "perimeter",
    "major_axis_px": "axis_major_length",
    "minor_axis_px": "axis_minor_length",
    "eccentricity": "eccentricity",
    "solidity": "solidity",
}


def ids_by_seed(labels, rng):
    """Relabel so that ids rank the places of seeds, any pixel of each object; and those places."""
    flat = labels.ravel()
    order = np.argsort(flat, kind="stable")
    first = np.searchsorted(flat[order], np.arange(1, flat.max(initial=0) + 2))
    seeds = np.array([rng.choice(order[a:b]) for a, b in pairwise(first)], np.int64)
    ranks = np.zeros(len(seeds) + 1, np.uint32)
    ranks[1 + np.argsort(seeds)] = np.arange(1, len(seeds) + 1)
    return ranks[labels], np.sort(seeds)


def padded(labels, box):
    """Labels of a box and what is around it, 0 outside the image."""
    return np.pad(labels, MARGIN)[box.grow(MARGIN).shift(MARGIN, MARGIN).slices]


def measured(labels, seeds, foreground, planes, cells, most=1000, connected=True):
    """Merged rows of an image that is cut into cells, and the units of its channels."""
    shape = labels.shape
    lattice = Lattice(shape, cells)
    units = [1.0] * len(planes)
    if planes.dtype.kind == "f":
        parts = [
            largest_of(plane_sums(labels[one.box.slices], [p[one.box.slices] for p in planes]))
            for one in lattice
        ]
        units = [unit_of(float(largest)) for largest in np.max(parts, axis=0)]

    def sums_of(region):
        box = region.box
        parts = zip((plane[box.slices] for plane in planes), units, strict=True)
        return measure_region(
            padded(labels, box), box, shape, foreground[box.slices], parts,
            Features(True, len(planes), connected),
        )  # fmt: skip

    sums = {region.index: sums_of(region) for region in lattice}
    edges = [row * cells[0] * shape[1] for row in range(lattice.count[0])]
    firsts = np.array([*np.searchsorted(seeds, edges), len(seeds)]) + 1
    bands = [
        lambda row=row: [sums[row, column] for column in range(lattice.count[1])]
        for row in range(lattice.count[0])
    ]
    parts = []
    for band, part in Bands(firsts.tolist(), bands, most):
        rows = part.closed()
        assert len(rows) <= most
        assert ((rows["id"] >= firsts[band]) & (rows["id"] < firsts[band + 1])).all()
        parts.append(rows)
    return np.concatenate(parts), units


def compare(table, labels, foreground, planes):
    """Every column against scikit-image on the whole image."""
    found = regionprops(labels, np.stack([foreground, *planes], axis=-1).astype(np.float64))
    np.testing.assert_array_equal(table["id"], [one.label for one in found])
    for ours, theirs in COPIED.items():
        name, _, place = theirs.partition("-")
        values = [getattr(one, name)[int(place)] if place else getattr(one, name) for one in found]
        # the root of what is left of a difference: a line has a minor axis of 1e-8 there, 0 here
        loose = 1e-6 if name in ("axis_minor_length", "eccentricity") else 1e-12
        np.testing.assert_allclose(table[ours], values, rtol=1e-9, atol=loose, err_msg=ours)
    boxes = [table[f"bbox_{key}_px"] for key in ("y0", "x0", "y1", "x1")]
    np.testing.assert_array_equal(np.transpose(boxes), np.reshape([o.bbox for o in found], (-1, 4)))
    height, width = labels.shape
    edge = [o.bbox[0] == 0 or o.bbox[1] == 0 or o.bbox[2] == height or o.bbox[3] == width
            for o in found]  # fmt: skip
    np.testing.assert_array_equal(table["touches_border"], np.array(edge, bool))
    # Where the axes are equal, or the tensor symmetric but for rounding, theirs is a matter of chance.
    for place, one in enumerate(found):
        a, b, _, c = one.inertia_tensor.flat
        if abs(a - c) + abs(b) > 1e-9 and abs(a - c) > 1e-9:
            turned = (table["orientation_rad"][place] - one.orientation) % np.pi
            assert min(turned, np.pi - turned) < 1e-7
    means = np.array([one.intensity_mean for one in found]).reshape(-1, 1 + len(planes))
    np.testing.assert_allclose(table["mean_probability"], means[:, 0] / 255, rtol=1e-12)
    for channel in range(len(planes)):
        for ours, theirs in (("mean", "mean"), ("min", "min"), ("max", "max"), ("sd", "std")):
            values = [getattr(one, f"intensity_{theirs}")[channel + 1] for one in found]
            largest = np.abs(planes[channel]).max(initial=0)
            np.testing.assert_allclose(
                table[f"{ours}_intensity_{channel}"], values, rtol=1e-6, atol=1e-7 * largest
            )


def check(labels, seeds, foreground, planes, cells, most=1000, connected=True):
    """The table of a cut image is that of the whole, bit for bit; and scikit-image's."""
    names = [str(channel) for channel in range(len(planes))]
    tables = []
    for cut in (cells, labels.shape):
        rows, units = measured(labels, seeds, foreground, planes, cut, most, connected)
        frame = Frame(labels.shape, labels.shape, 0.5, channels=names, units=units)
        tables.append(instance_columns(rows, frame))
    assert tables[0].keys() == tables[1].keys()
    for name, column in tables[0].items():
        assert column.tobytes() == tables[1][name].tobytes(), name
    compare(tables[0], labels, foreground, planes)
    return tables[0]


def planes_of(rng, dtype, shape):
    """Two channels."""
    if dtype == np.float32:
        return (rng.normal(size=(2, *shape)) * [[[1]], [[1e-30]]]).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, (2, *shape), dtype, endpoint=True)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.sampled_from([1, 3, 1000]),
    st.sampled_from([np.uint8, np.uint16, np.float32]),
    st.sampled_from([(0.6, -0.3), (1.5, 0.05), (4.0, 0.0), (0.0, 0.0), (1.0, -9.0), (1.0, 9.0)]),
)
def test_any_cut_gives_the_table_that_scikit_image_measures(seed, shape, cells, most, dtype, blobs):
    rng = np.random.default_rng(seed)
    sigma, level = blobs  # specks, blobs, larger than a cell; one object; none
    mask = ndimage.gaussian_filter(rng.standard_normal(shape), sigma) / (1 if sigma < 1 else 0.3)
    labels, seeds = ids_by_seed(ndimage.label(mask > level)[0], rng)
    foreground = rng.integers(0, 256, shape, dtype=np.uint8)
    check(labels, seeds, foreground, planes_of(rng, dtype, shape), cells, most)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_objects_that_touch_each_other(seed, cell):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 40, (12, 2))
    grid = np.stack(np.mgrid[:40, :47], axis=-1)
    nearest = np.linalg.norm(grid[:, :, None] - points, axis=-1).argmin(axis=-1)
    pieces = [ndimage.label(nearest == one)[0] for one in range(12)]
    labels = np.zeros(nearest.shape, int)
    for piece in pieces:
        labels[piece > 0] = piece[piece > 0] + labels.max()
    labels[rng.random(labels.shape) < 0.1] = 0
    parts = np.zeros_like(labels)
    for one in range(1, labels.max() + 1):
        piece, _ = ndimage.label(labels == one)
        parts[piece > 0] = piece[piece > 0] + parts.max()
    labels, seeds = ids_by_seed(parts, rng)
    foreground = rng.integers(0, 256, labels.shape, dtype=np.uint8)
    check(labels, seeds, foreground, foreground[np.newaxis], (cell, cell))


@pytest.mark.parametrize("cell", [16, 7, 100])
def test_an_object_across_four_regions_and_one_that_is_larger_than_a_region(cell):
    labels = np.zeros((64, 64), int)
    yy, xx = np.mgrid[:64, :64]
    labels[(yy - 16) ** 2 + (xx - 16) ** 2 < 50] = 1
    ring = (yy - 40) ** 2 + (xx - 38) ** 2
    labels[(ring < 500) & (ring > 250)] = 2
    labels[(ring < 200) & (ring > 150)] = 3
    labels[40, 38] = 4
    labels[63, 63] = 5
    rng = np.random.default_rng(3)
    labels, seeds = ids_by_seed(labels, rng)
    table = check(labels, seeds, (labels > 0).astype(np.uint8), labels[None] * 3.5, (cell, cell))
    assert table["solidity"].min() < 0.5 and table["solidity"].max() == 1


@pytest.mark.parametrize("cell", [5, 17, 60])
def test_ids_of_classes_whose_pixels_do_not_hang_together(cell):
    rng = np.random.default_rng(cell)
    field = ndimage.gaussian_filter(rng.standard_normal((50, 61)), 2)
    labels = np.digitize(field, [-0.02, 0.05]).astype(np.uint32)
    seeds = np.zeros(2, int)
    planes = rng.integers(0, 9, (1, *labels.shape), np.uint8)
    check(labels, seeds, planes[0], planes, (cell, cell), connected=False)


def test_sums_do_not_overflow_in_objects_of_ten_thousand_million_pixels():
    """Rows of a rectangle, as regions know them, against closed sums in Python integers."""
    side, height, width = 2**15, 70_000, 150_000
    parts = []
    lattice = Lattice((height, width), (side, side))
    for region in lattice:
        box = region.box
        row = np.zeros(1, row_dtype(shape=True, channels=1))
        h, w = box.shape
        row["id"], row["area"] = 1, h * w
        row["y0"], row["x0"], row["y1"], row["x1"] = box.y0, box.x0, box.y1, box.x1
        row["sum_y"] = w * (h * box.y0 + h * (h - 1) // 2)
        row["sum_x"] = h * (w * box.x0 + w * (w - 1) // 2)
        squares = [w * sum(k * k for k in range(h)), h * sum(k * k for k in range(w))]
        products = h * (h - 1) // 2 * (w * (w - 1) // 2)
        for name, value in zip(("yy", "yx", "xx"), (squares[0], products, squares[1]), strict=True):
            row[f"{name}_high"], row[f"{name}_low"] = value >> 32, value & (2**32 - 1)
        row["hull"] = h * w
        row["total"] = 60_000 * h * w
        value = 60_000**2 * h * w
        row["squares_high"], row["squares_low"] = value >> 32, value & (2**32 - 1)
        row["least"] = row["most"] = 60_000
        parts.append(row)
    merged = merge_rows(np.concatenate(parts))
    frame = Frame((height, width), (height, width), None, channels=["x"], units=[1.0])
    table = {name: column[0] for name, column in instance_columns(merged, frame).items()}
    assert table["area_px"] == height * width
    np.testing.assert_allclose(table["major_axis_px"], 4 * np.sqrt((width**2 - 1) / 12), rtol=1e-14)
    np.testing.assert_allclose(
        table["minor_axis_px"], 4 * np.sqrt((height**2 - 1) / 12), rtol=1e-14
    )
    assert table["sd_intensity_x"] == 0 and table["mean_intensity_x"] == 60_000
    assert abs(table["orientation_rad"]) == np.pi / 2


def test_pixels_that_are_not_finite_are_left_out():
    labels = np.array([[1, 1, 1, 2, 0, 3]], np.uint32)
    plane = np.array([[1, np.nan, 3, np.inf, np.nan, -2]], np.float32)
    foreground = np.zeros(labels.shape, np.uint8)
    rows, units = measured(labels, np.array([0, 3, 5]), foreground, plane[None], (1, 2))
    frame = Frame(labels.shape, labels.shape, None, channels=["x"], units=units)
    table = instance_columns(rows, frame)
    for key, values in {
        "mean": [2, np.nan, -2],
        "min": [1, np.nan, -2],
        "sd": [1, np.nan, 0],
    }.items():
        np.testing.assert_allclose(table[f"{key}_intensity_x"], values)


def test_lengths_and_places_are_those_of_the_full_resolution():
    labels = np.zeros((9, 9), np.uint32)
    labels[2:4, 3:7] = 1
    box = Box(0, 0, 9, 9)
    foreground = np.zeros(labels.shape, np.uint8)
    rows = measure_region(
        padded(labels, box), box, (9, 9), foreground, [], Features(shape=True, channels=0)
    ).closed()
    one, two = (
        instance_columns(rows, Frame((9, 9), full, 0.25, scale))
        for full, scale in (((9, 9), 1.0), ((18, 18), 2.0))
    )
    for name in ("perimeter_px", "major_axis_um", "equivalent_diameter_px"):
        np.testing.assert_allclose(two[name], 2 * one[name])
    assert two["area_px"] == 32 and two["area_um2"] == 2
    assert [int(two[f"bbox_{key}_px"][0]) for key in ("y0", "x0", "y1", "x1")] == [4, 6, 8, 14]
    assert (two["centroid_y_px"], two["centroid_x_px"]) == (5.5, 9.5)
    for name in ("eccentricity", "orientation_rad", "solidity"):
        assert two[name] == one[name]
    odd = instance_columns(rows, Frame((9, 9), (12, 12), None, 1.37))
    assert [int(odd[f"bbox_{key}_px"][0]) for key in ("y0", "x0", "y1", "x1")] == [2, 4, 6, 10]


def test_um_are_nan_where_the_pixel_size_is_not_known():
    labels = np.ones((2, 2), np.uint32)
    rows = sum_region(labels, labels.astype(np.uint8), Lattice((2, 2), (2, 2))[0, 0].box)
    assert np.isnan(instance_columns(rows, Frame((2, 2), (2, 2), None))["area_um2"]).all()


def test_no_objects_no_rows():
    assert len(merge_rows(np.zeros(0, ROW))) == 0
    assert len(ObjectSums.of_rows(np.zeros(0, ROW)).closed()) == 0
    frame = Frame((5, 5), (5, 5), 1.0, channels=["a"], units=[1.0])
    table = instance_columns(np.zeros(0, row_dtype(shape=True, channels=1)), frame)
    assert all(len(column) == 0 for column in table.values())
