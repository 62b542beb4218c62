"""Targets and weights of pixels: against one distance transform per object."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from segpipe.training.targets import interior_of
from segpipe.training.weights import balanced_class_weights, weight_map

small = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9).flatmap(
    lambda shape: hnp.arrays(np.int32, shape, elements=st.integers(0, 3))
)


def scatter(shape, count, radius, seed):
    """Ellipses that touch, overlap, are cut by the border and by each other into pieces."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, np.int32)
    for one in range(1, count + 1):
        centre_y, centre_x = random.uniform(0, shape)
        height, width = random.uniform(1, radius, 2)
        labels[((y - centre_y) / height) ** 2 + ((x - centre_x) / width) ** 2 < 1] = one
    return labels


def ids_of(labels):
    return np.setdiff1d(labels, [0])


def plain_interior(labels):
    result = np.zeros(labels.shape)
    for one in ids_of(labels):
        inside = labels == one
        if inside.all():
            return np.ones(labels.shape)
        distance = ndimage.distance_transform_edt(inside)
        result[inside] = distance[inside] / distance.max()
    return result


def plain_weights(labels, w0, sigma):
    ids = ids_of(labels)
    result = np.ones(labels.shape)
    if len(ids) > 1:
        distances = np.sort([ndimage.distance_transform_edt(labels != one) for one in ids], axis=0)
        term = w0 * np.exp(-((distances[0] + distances[1]) ** 2) / (2 * sigma**2))
        result += np.where(labels == 0, term, 0)
    return result


crowds = [
    scatter((60, 75), 30, 9, 0),  # touching and cut into pieces
    scatter((90, 40), 4, 20, 1),
    scatter((40, 150), 9, 3, 2),  # far apart: most pairs are beyond the reach
    scatter((64, 64), 1, 10, 3),
    scatter((30, 30), 60, 4, 4),  # hardly any background
]


@given(small)
@settings(max_examples=150)
def test_interior_equals_a_distance_transform_per_object_on_any_labels(labels):
    np.testing.assert_allclose(interior_of(labels), plain_interior(labels), atol=1e-6)


@pytest.mark.parametrize("labels", crowds)
def test_interior_equals_a_distance_transform_per_object(labels):
    result = interior_of(labels)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, plain_interior(labels), atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (5, 7), (0, 4)])
def test_an_image_of_one_object_or_none(shape):
    assert (interior_of(np.ones(shape, int)) == 1).all()
    assert (interior_of(np.zeros(shape, int)) == 0).all()
    for labels in (np.ones(shape, int), np.zeros(shape, int)):
        assert (weight_map(labels) == 1).all()


def test_the_border_of_the_image_is_no_edge():
    """What a crop sees of an object equals the whole wherever the nearest edge is in view."""
    labels = np.zeros((41, 41), int)
    labels[4:37, 10:31] = 1
    assert (interior_of(labels[:, :21])[10:31] == interior_of(labels)[10:31, :21]).all()


@given(small)
@settings(max_examples=100)
def test_weights_equal_a_distance_transform_per_object_on_any_labels(labels):
    np.testing.assert_allclose(
        weight_map(labels, 10, 1.5), plain_weights(labels, 10, 1.5), atol=1e-5
    )


@pytest.mark.parametrize("labels", crowds)
@pytest.mark.parametrize(("w0", "sigma"), [(10, 5), (10, 2), (3, 9), (0, 5), (1e-7, 5)])
def test_weights_equal_a_distance_transform_per_object(labels, w0, sigma):
    result = weight_map(labels, w0, sigma)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, plain_weights(labels, w0, sigma), atol=1e-5)


def test_the_error_is_bounded_where_the_second_object_stops_counting():
    """And no pair of objects is dropped before."""
    line = np.zeros((1, 80), int)
    line[0, 0] = 1
    for gap in range(2, 79):
        labels = line.copy()
        labels[0, gap] = 2
        expected = plain_weights(labels, 10, 5)
        assert (expected - weight_map(labels)).max() <= 5e-6 + 1e-6
        assert (weight_map(labels) > 1).any() or gap > 26


def test_class_weights_are_those_of_background_and_objects():
    labels = crowds[0]
    plain = weight_map(labels)
    result = weight_map(labels, class_weights=(0.5, 2.0))
    assert (result[labels != 0] == 2).all()
    np.testing.assert_allclose(result[labels == 0], plain[labels == 0] - 0.5, atol=1e-6)
    pixels = np.bincount((labels != 0).ravel()).tolist()
    weights = weight_map(labels, w0=0, class_weights=balanced_class_weights(pixels))
    assert weights[labels == 0].sum() == pytest.approx(weights[labels != 0].sum(), rel=1e-4)
    assert weights.mean() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.uint32, np.int64, np.uint64])
def test_any_integers_in_any_memory_order_give_the_same_and_stay_as_they_are(dtype):
    labels = crowds[0]
    strided = np.zeros((120, 75), dtype, order="F")[::2]
    strided[:] = labels
    strided.flags.writeable = False
    for function in (interior_of, weight_map):
        assert (function(strided) == function(labels)).all()
    assert (strided == labels).all()


@pytest.mark.parametrize("background", [0, 1])
def test_ids_may_be_as_large_as_they_come(background):
    labels = np.maximum(crowds[0], background)  # without background the smallest id is no 0
    large = np.where(labels == 0, 0, 2**32 - 1 - labels.astype(np.uint32)).astype(np.uint32)
    for function in (interior_of, weight_map):
        assert (function(large) == function(labels)).all()


@given(st.lists(st.integers(0, 50), min_size=2, max_size=5).filter(any))
def test_balanced_weights_give_each_class_its_share(pixels):
    weights = balanced_class_weights(pixels)
    shares = [weight * count for weight, count in zip(weights, pixels, strict=True) if count]
    assert shares == pytest.approx([sum(pixels) / len(shares)] * len(shares))
    assert all(weight == 1 for weight, count in zip(weights, pixels, strict=True) if not count)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((2, 3, 4), int), "labels are 3-D int64; expected 2-D integers"),
        (np.zeros((2, 3)), "labels are 2-D float64; expected 2-D integers"),
        (np.full((2, 3), -1), "labels go down to -1; expected 0 and positive ids"),
    ],
)
@pytest.mark.parametrize("function", [interior_of, weight_map])
def test_what_is_no_label_image_is_refused(function, labels, message):
    with pytest.raises(ValueError, match=message):
        function(labels)


@pytest.mark.parametrize("numbers", [{"w0": -1}, {"sigma": 0}, {"class_weights": (1, -1)}])
def test_numbers_out_of_bounds_are_refused(numbers):
    with pytest.raises(ValueError, match="expected sigma above 0 and the others 0 or more"):
        weight_map(np.zeros((2, 3), int), **numbers)
