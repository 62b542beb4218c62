"""Matches: against every pair of objects compared by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segpipe.evaluate import Counts, count_matches

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
