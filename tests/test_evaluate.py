"""Matches: against every pair of objects compared by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segpipe.evaluate import Counts, Overlaps, count_matches, split_ids

labels = hnp.arrays(np.uint32, (6, 7), elements=st.integers(0, 4))


@given(labels, labels)
def test_counts_equal_all_pairs_compared(truth, predicted):
    true_ids = set(np.unique(truth)) - {0}
    found_ids = set(np.unique(predicted)) - {0}
    tp = 0
    for one in true_ids:
        for other in found_ids:
            both = ((truth == one) & (predicted == other)).sum()
            either = ((truth == one) | (predicted == other)).sum()
            tp += both / either > 0.5
    assert count_matches(truth, predicted) == Counts(tp, len(found_ids) - tp, len(true_ids) - tp)


def test_average_precision():
    assert Counts(3, 1, 2).average_precision == 0.5
    assert Counts(0, 0, 0).average_precision == 0.0


@given(labels, labels)
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
