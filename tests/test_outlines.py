"""Outlines: filled again they are the label image, all are valid, and no region shows in them."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from segpipe.geometry import Box, Lattice
from segpipe.outlines import Pieces, join_pieces, trace_region
from segpipe.polygons import bands_of_polygons, polygons_of
from segpipe.simplify import simplify

PINCH = ["###", "#.#", "##."]
TWICE = ["#####", "#.#.#", "##.##", "#.#.#", "#####"]
ISLAND = ["#######", "#.....#", "#.###.#", "#.#.#.#", "#.###.#", "#.....#", "#######"]
SHARED = ["11.22", "1.122", ".1112", "33132", "33.3."]


def drawn(*rows: str) -> np.ndarray:
    """A label image from characters: `.` is background, `#` is 1, digits are ids."""
    ids = {"#": 1, ".": 0}
    return np.array([[ids.get(one, one) for one in row] for row in rows]).astype(np.uint32)


def pieces_of(labels: np.ndarray, lattice: Lattice, index: tuple[int, int]) -> Pieces:
    """The pieces of one region, packed and unpacked."""
    box = lattice[index].box
    wide = np.pad(labels, 1)[box.y0 : box.y1 + 2, box.x0 : box.x1 + 2]
    return Pieces.unpack(trace_region(wide, box).pack(box), box)


def objects_in(labels, cell, most=1000, cuts=()):
    """(id, [[ring, hole, ...], ...]) of each object; rings are lists of (y, x) corners."""
    lattice = Lattice(labels.shape, (cell, cell))
    rows, columns = lattice.count
    last = int(labels.max()) + 1
    firsts = [1, *sorted(min(int(cut * last) + 1, last) for cut in cuts[: rows - 1])]
    firsts += [last] * (rows + 1 - len(firsts))
    bands = [
        lambda row=row: [pieces_of(labels, lattice, (row, column)) for column in range(columns)]
        for row in range(rows)
    ]
    found = []
    for polygons in bands_of_polygons(firsts, bands, most):
        for k, one in enumerate(polygons.ids.tolist()):
            parts = []
            for part in range(polygons.parts[k], polygons.parts[k + 1]):
                span = range(polygons.rings[part], polygons.rings[part + 1])
                ends = polygons.ends
                parts.append([polygons.corners[ends[r] : ends[r + 1]].tolist() for r in span])
            found.append((one, parts))
    return found


def test_memory_is_that_of_a_band_however_many_there_are():
    """Objects that cross from one band to another, of which there is one per band, keep no others."""

    def peak(count):
        lattice = Lattice((64 * count, 512), (64, 512))
        labels = np.zeros(lattice.shape, np.uint32)
        for y, x in itertools.product(range(2, 64 * count - 8, 8), range(2, 506, 8)):
            labels[y : y + 6, x : x + 6] = np.tri(6)  # steps
        for band in range(1, count):
            labels[64 * band - 20 : 64 * band + 20, 100] = 1
        labels = ndimage.label(labels, np.ones((3, 3)))[0].astype(np.uint32)
        firsts = [1]
        for row in range(count):
            firsts.append(int(labels[: 64 * (row + 1)].max()) + 1)
        traced = [
            trace_region(np.pad(labels, 1)[64 * row : 64 * row + 66], lattice[row, 0].box)
            for row in range(count)
        ]
        packed = [one.pack(lattice[row, 0].box) for row, one in enumerate(traced)]
        del traced
        bands = [
            lambda row=row: [Pieces.unpack(packed[row], lattice[row, 0].box)]
            for row in range(count)
        ]
        tracemalloc.start()
        assert all(len(polygons) for polygons in bands_of_polygons(firsts, bands))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    objects_in(drawn(*SHARED), 2)  # compiles
    assert peak(32) < 1.3 * peak(8)


def filled(objects, shape):
    """Paint objects by the even-odd rule, slowly: a pixel is inside when an odd number of upright
    lines is to its left; overlaps are an error."""
    image = np.zeros(shape, np.uint32)
    for one, parts in objects:
        inside = np.zeros(shape, bool)
        for ring in (ring for part in parts for ring in part):
            for (y0, x0), (y1, x1) in zip(ring, [*ring[1:], ring[0]], strict=True):
                assert (y0 == y1) != (x0 == x1), "lines run along the edges of pixels"
                if x0 == x1:
                    inside[min(y0, y1) : max(y0, y1), x0:] ^= True
        assert not image[inside].any()
        image[inside] = one
    return image


def check(labels, objects):
    """Filled they are the labels; all are valid, in order, and turn as they should."""
    np.testing.assert_array_equal(filled(objects, labels.shape), labels)
    assert [one for one, _ in objects] == sorted(set(np.unique(labels)) - {0})
    for one, parts in objects:
        pixels = labels == one
        assert len(parts) == ndimage.label(pixels)[1]
        shapes = [shapely.Polygon(part[0], part[1:]) for part in parts]
        whole = shapely.MultiPolygon(shapes)
        assert shapely.is_valid(whole) and all(map(shapely.is_valid, shapes)), one
        assert whole.area == pixels.sum()
        assert [part[0][0] for part in parts] == sorted(part[0][0] for part in parts)
        for part in parts:
            assert [ring[0] for ring in part[1:]] == sorted(ring[0] for ring in part[1:])
            for place, ring in enumerate(part):
                assert ring[0] == min(ring) and len(set(map(tuple, ring))) == len(ring)
                turned = shapely.LinearRing([(x, y) for y, x in ring])
                assert turned.is_ccw == (place == 0)
                for a, b, c in zip(ring, [*ring[1:], ring[0]], [*ring[2:], *ring[:2]], strict=True):
                    assert (a[0] == b[0]) != (b[0] == c[0]), "corners are where the way turns"


@pytest.mark.parametrize("cell", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "rows", [["#"], PINCH, TWICE, ISLAND, SHARED, ["#.", ".#"], ["....", "...."]]
)
def test_drawn_shapes(rows, cell):
    labels = drawn(*rows)
    check(labels, objects_in(labels, cell))


def test_a_pinch_is_a_ring_and_a_hole():
    assert objects_in(drawn(*PINCH), 100) == [
        (
            1,
            [
                [
                    [[0, 0], [0, 3], [2, 3], [2, 2], [3, 2], [3, 0]],
                    [[1, 1], [2, 1], [2, 2], [1, 2]],
                ]
            ],
        )
    ]


noise = arrays.arrays(
    np.uint32,
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    elements=st.sampled_from([0, 1, 1, 2, 7]),
)


@settings(max_examples=60)
@given(noise, st.integers(1, 10), st.integers(1, 3), st.lists(st.floats(0, 1), max_size=12))
def test_any_labels_in_any_regions(labels, cell, most, cuts):
    objects = objects_in(labels, cell, most, cuts)
    check(labels, objects)
    assert objects == objects_in(labels, 100)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1.5, 3.0]), st.integers(4, 40))
def test_touching_blobs_larger_than_regions(seed, sigma, cell):
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((44, 36)), sigma)
    labels = ndimage.label(field > np.quantile(field, rng.uniform(0.1, 0.9)))[0]
    seeds = ndimage.label(rng.random(labels.shape) > 0.97)[0]
    nearest = ndimage.distance_transform_edt(seeds == 0, return_indices=True)[1]
    apart = np.where(labels > 0, seeds[tuple(nearest)], 0)  # cut up so that neighbours touch
    for image in (labels, apart):
        image = image.astype(np.uint32)
        objects = objects_in(image, cell)
        check(image, objects)
        assert objects == objects_in(image, 100)


def test_a_lacking_region_is_told_and_not_closed_over():
    lattice = Lattice((4, 4), (2, 2))
    some = [pieces_of(np.ones((4, 4), np.uint32), lattice, index) for index in [(0, 0), (0, 1)]]
    with pytest.raises(ValueError, match="the outline of object 1 is not closed"):
        polygons_of(join_pieces(some))


def test_no_objects_no_pieces():
    pieces = trace_region(np.zeros((5, 6), np.uint32), Box(10, 10, 13, 14))
    assert len(pieces) == 0 and len(polygons_of(pieces)) == 0


def polygons_in(labels):
    return polygons_of(trace_region(np.pad(labels, 1), Box(0, 0, *labels.shape)))


def shapes_in(polygons):
    """A shapely shape per object."""
    shapes = []
    for k in range(len(polygons)):
        parts = []
        for part in range(polygons.parts[k], polygons.parts[k + 1]):
            ends = polygons.ends[polygons.rings[part] : polygons.rings[part + 1] + 1]
            rings = [polygons.corners[a:b] for a, b in itertools.pairwise(ends)]
            parts.append(shapely.Polygon(rings[0], rings[1:]))
        shapes.append(shapely.MultiPolygon(parts))
    return shapes


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([0.4, 1.0, 2.0]), st.sampled_from([0.3, 0.8, 2, 7])
)
def test_simplified_outlines_are_valid_and_within_the_tolerance(seed, sigma, tolerance):
    rng = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(rng.standard_normal((40, 40)), sigma)
    labels = ndimage.label(field > np.quantile(field, rng.uniform(0.2, 0.8)))[0].astype(np.uint32)
    exact = polygons_in(labels)
    simple = simplify(exact, tolerance)
    assert len(simple.corners) <= len(exact.corners)
    for before, after in zip(shapes_in(exact), shapes_in(simple), strict=True):
        assert shapely.is_valid(after)
        assert before.boundary.hausdorff_distance(after.boundary) <= tolerance + 1e-9
        corners = {tuple(one) for one in shapely.get_coordinates(after)}
        assert corners <= {tuple(one) for one in shapely.get_coordinates(before)}


def test_a_disc_needs_fewer_corners():
    y, x = np.mgrid[:41, :41]
    exact = polygons_in(((y - 20) ** 2 + (x - 20) ** 2 <= 15**2).astype(np.uint32))
    simple = simplify(exact, 1.0)
    assert len(simple.corners) < len(exact.corners) / 4
    (before,), (after,) = shapes_in(exact), shapes_in(simple)
    assert abs(before.area - after.area) < 0.06 * before.area
