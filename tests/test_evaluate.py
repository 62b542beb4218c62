"""Scores: against dense versions of the published procedures, written out here word by word."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import linear_sum_assignment

from segpipe.evaluate import Scores, count_matches, score_image, score_images
from segpipe.image_scores import THRESHOLDS, Counts, ImageScores
from segpipe.overlaps import Overlaps, split_ids
from segpipe.pairing import assigned_pairs

scattered = hnp.arrays(np.uint32, (6, 7), elements=st.integers(0, 4))
# Few runs of few lengths: objects are often halves, thirds and equals of each other.
runs = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 4)).map(lambda run: [run[0]] * run[1]),
    min_size=12,
    max_size=12,
).map(lambda found: np.concatenate(found)[:12].astype(np.int32).reshape(1, 12))
images = st.one_of(st.tuples(scattered, scattered), st.tuples(runs, runs))

HALVES = (np.array([[1, 1, 1, 1]]), np.array([[2, 2, 3, 3]]))
TWO_TIES = (np.array([[1, 1, 2, 2, 5, 5, 5, 5]]), np.array([[3, 3, 3, 3, 7, 7, 8, 8]]))
NOTHING = (np.zeros((2, 2), np.uint8), np.zeros((2, 2), np.uint8))


def dense(truth, predicted):
    """(common, IoU) of all pairs of objects, (T, P), as tables."""
    truths, found = np.unique(truth[truth > 0]), np.unique(predicted[predicted > 0])
    masks = [truth == one for one in truths], [predicted == one for one in found]
    common = np.array([[(a & b).sum() for b in masks[1]] for a in masks[0]])
    either = np.array([[(a | b).sum() for b in masks[1]] for a in masks[0]])
    common, either = (table.reshape(len(truths), len(found)) for table in (common, either))
    return common, common / either, either


def stardist(truth, predicted, tau):
    """(tp, fp, fn, sum of the matches' IoU) as stardist.matching counts them."""
    _, iou, _ = dense(truth, predicted)
    most = min(iou.shape)
    tp, total = 0, 0.0
    if most and (iou >= tau).any():
        cost = -(iou >= tau).astype(float) - iou / (2 * most)
        pairs = linear_sum_assignment(cost)
        assert len(pairs[0]) == most
        matched = iou[pairs][iou[pairs] >= tau]
        tp, total = len(matched), matched.sum()
    return tp, iou.shape[1] - tp, iou.shape[0] - tp, total


@given(images)
@example(HALVES)
@example(HALVES[::-1])
@example(TWO_TIES)
@example(NOTHING)
def test_counts_and_panoptic_quality_are_those_of_stardist_matching(pair):
    scores = score_image(*pair)
    for tau in THRESHOLDS:
        tp, fp, fn, total = stardist(*pair, tau)
        assert scores.counts(tau) == Counts(tp, fp, fn)
        assert scores.ap(tau) == (tp / (tp + fp + fn) if tp else 0)
        if tau == 0.5:
            assert count_matches(*pair) == Counts(tp, fp, fn)
            expected = total / (tp + fp / 2 + fn / 2) if tp else 0
            assert scores.pq == pytest.approx(expected, abs=1e-12)
            assert (scores.missed, scores.false) == (fn, fp)


def test_halves_match_once_at_one_half_and_never_above():
    """Each half has IoU .5 exactly; both would be two matches for one object."""
    for pair in (HALVES, HALVES[::-1]):
        scores = score_image(*pair)
        assert scores.matched == (1, *[0] * 9)
        assert scores.found_iou == 0.5


def test_a_threshold_that_is_met_exactly_is_met():
    truth, predicted = np.repeat([1], 20)[np.newaxis], np.repeat([4, 0], [11, 9])[np.newaxis]
    assert score_image(truth, predicted).matched == (1, 1, *[0] * 8)


@given(st.lists(images, min_size=1, max_size=4))
def test_pooled_scores_add_counts_first_and_those_by_image_average_quotients(pairs):
    scores = score_images(pairs)
    for tau in (0.5, 0.75):
        counted = np.array([stardist(*pair, tau) for pair in pairs])
        tp, fp, fn, total = counted.sum(0)
        assert scores.ap(tau) == pytest.approx(tp / (tp + fp + fn) if tp else 0)
        each = [n[0] / sum(n[:3]) if n[0] else 0 for n in counted]
        assert scores.ap_by_image(tau) == pytest.approx(np.mean(each))
        if tau == 0.5:
            assert scores.pq == pytest.approx(total / (tp + fp / 2 + fn / 2) if tp else 0)
    assert scores == Scores(tuple(score_image(*pair) for pair in pairs))


def united(pair, chosen):
    """Common and united pixels of chosen pairs; objects in none are added to the latter."""
    common, _, either = dense(*pair)
    areas = [[(one == n).sum() for n in np.unique(one[one > 0])] for one in pair]
    alone = sum(
        area
        for side in (0, 1)
        for n, area in enumerate(areas[side])
        if n not in {p[side] for p in chosen}
    )
    return sum(common[p] for p in chosen), sum(either[p] for p in chosen) + alone


@given(images)
@example(HALVES)
@example(NOTHING)
def test_aji_takes_the_nearest_of_each_true_object(pair):
    iou = dense(*pair)[1]
    nearest = [(i, int(np.argmax(row))) for i, row in enumerate(iou) if row.any()]
    assert score_image(*pair).aji_pixels == united(pair, nearest)


@pytest.mark.parametrize("batch", [1, 2000])
@given(pair=images)
@example(HALVES)
@example(NOTHING)
def test_aji_plus_assigns_for_the_largest_sum(batch, pair):
    pairs, iou = Overlaps.of(*pair), dense(*pair)[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segpipe.pairing._BATCH", batch)
        places = assigned_pairs(pairs)
    chosen = list(zip(pairs.first[places].tolist(), pairs.second[places].tolist(), strict=True))
    assert all(len(set(side)) == len(places) for side in zip(*chosen, strict=True))
    assert sum(iou[p] for p in chosen) == pytest.approx(iou[linear_sum_assignment(-iou)].sum())
    if batch > 1:
        assert score_image(*pair).aji_plus_pixels == united(pair, chosen)


@given(images)
def test_dice_is_that_of_the_pixels(pair):
    truth, predicted = pair[0] > 0, pair[1] > 0
    area = truth.sum() + predicted.sum()
    assert score_image(*pair).dice == (2 * (truth & predicted).sum() / area if area else 0)


@given(images)
def test_ids_and_parts_do_not_matter(pair):
    """Ids up to 2^32 - 1 take no more memory than small ones."""
    truth, predicted = (labels.astype(np.uint64) for labels in pair)
    far = np.uint64(2**32 - 1) - predicted
    far[predicted == 0] = 0
    told, renamed = score_image(truth, predicted), score_image(truth, far)
    assert renamed.matched == told.matched and renamed.pq == pytest.approx(told.pq)
    rows = zip(truth, predicted, strict=True)
    parts = Overlaps.of_parts((a[np.newaxis], b[np.newaxis]) for a, b in rows)
    assert ImageScores.of(parts) == told


def test_many_parts_add_up(monkeypatch):
    monkeypatch.setattr("segpipe.overlaps._PENDING", 5)
    monkeypatch.setattr("segpipe.overlaps._BAND", 7)
    rng = np.random.default_rng(3)
    truth, predicted = rng.integers(0, 30, (2, 40, 9))
    banded = score_image(truth, predicted)
    monkeypatch.undo()
    assert banded == score_image(truth, predicted)


def test_means_over_thresholds_and_what_empty_images_do():
    one = np.repeat([1, 2, 0], [20, 20, 2])[np.newaxis]
    other = np.repeat([1, 0, 2], [14, 6, 22])[np.newaxis]  # IoU .7 and 20 / 22
    scores = score_images([(one, other), NOTHING])
    assert scores.ap(0.7) == 1 and scores.ap(0.75) == pytest.approx(1 / 3)
    assert scores.mean_ap() == pytest.approx((5 + 4 / 3) / 9)
    assert scores.mean_ap(high=0.95) == pytest.approx((5 + 4 / 3) / 10)
    assert scores.mean_ap_by_image() == scores.mean_ap() / 2
    assert scores.empty == 1
    assert scores.pooled.sq == pytest.approx((0.7 + 20 / 22) / 2)
    assert scores.by_image(lambda image: image.pq) == scores.pq / 2


def test_what_cannot_be_scored_is_an_error():
    labels = np.ones((2, 3), np.int64)
    for wrong, words in (
        (labels[:1], "shape|pixels"),
        (-labels, "ids from -1"),
        (labels * 2**32, "4294967295"),
        (labels * 0.5, "float64"),
    ):
        with pytest.raises(ValueError, match=words):
            score_image(labels, wrong)
    for threshold in (0.45, 1.1, float("nan")):
        with pytest.raises(ValueError, match="threshold"):
            score_image(labels, labels, [threshold])
    with pytest.raises(ValueError, match=r"0\.8 is none"):
        score_image(labels, labels, [0.5]).ap(0.8)
    with pytest.raises(ValueError, match="pool 0"):
        score_images([]).ap()


def test_average_precision():
    assert Counts(3, 1, 2).average_precision == 0.5
    assert Counts(0, 0, 0).average_precision == 0.0


@given(scattered, scattered)
def test_an_object_is_split_when_two_objects_lie_mostly_in_it_and_are_a_tenth_of_it(whole, cut):
    expected = []
    for one in set(np.unique(whole)) - {0}:
        pieces = 0
        for other in set(np.unique(cut)) - {0}:
            inside = ((whole == one) & (cut == other)).sum()
            pieces += inside > (cut == other).sum() / 2 and inside >= (whole == one).sum() / 10
        if pieces >= 2:
            expected.append(one)
    assert split_ids(Overlaps.of(whole, cut)).tolist() == sorted(expected)
    assert split_ids(Overlaps.of(cut, whole).swapped).tolist() == sorted(expected)


def test_a_crumb_is_no_piece_and_a_neighbour_that_leans_over_is_none():
    whole = np.repeat([1, 2], [20, 20])[np.newaxis]
    crumb = np.repeat([1, 3, 2], [19, 1, 20])[np.newaxis]
    leaning = np.repeat([1, 2], [15, 25])[np.newaxis]
    halves = np.repeat([1, 3, 2], [18, 2, 20])[np.newaxis]
    assert split_ids(Overlaps.of(whole, crumb)).tolist() == []
    assert split_ids(Overlaps.of(whole, leaning)).tolist() == []
    assert split_ids(Overlaps.of(whole, halves)).tolist() == [1]
