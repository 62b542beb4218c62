"""Which of the overlapping objects belong together, for indices that pair them below one half too."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching

from segpipe.overlaps import Overlaps

Array = np.ndarray[Any, np.dtype[Any]]

_BATCH = 2000  # pairs that are assigned at once: the time grows with the square of the objects


def best_pairs(pairs: Overlaps) -> Array:
    """For each first object that has any, the place of the pair of the largest IoU."""
    order = np.lexsort((pairs.second, -pairs.iou, pairs.first))
    chosen: Array = order[np.unique(pairs.first[order], return_index=True)[1]]
    return chosen


def assigned_pairs(pairs: Overlaps) -> Array:
    """Places of pairs, no object in two of them, of the largest sum of IoU."""
    count = (len(pairs.first_ids), len(pairs.second_ids))
    if not len(pairs.common):
        return np.zeros(0, np.int64)
    graph = csr_array(
        (np.ones(len(pairs.first), np.int8), (pairs.first, pairs.second + count[0])),
        shape=(sum(count), sum(count)),
    )
    group = connected_components(graph, directed=False)[1][pairs.first]
    order = np.argsort(group, kind="stable")
    chosen, start = [], 0
    while start < len(order):  # whole groups, about as many as make a batch
        end = min(start + _BATCH, len(order))
        end = int(np.searchsorted(group[order], group[order[end - 1]], side="right"))
        chosen.append(_assign(pairs, order[start:end]))
        start = end
    return np.concatenate(chosen)


def _assign(pairs: Overlaps, places: Array) -> Array:
    """`assigned_pairs` among some pairs.

    The solver wants a partner for every first object and weights above 0: each gets one of its own
    at the weight of no overlap.
    """
    _, first = np.unique(pairs.first[places], return_inverse=True)
    seconds, second = np.unique(pairs.second[places], return_inverse=True)
    rows, columns = int(first.max()) + 1, len(seconds)
    weights = csr_array(
        (
            np.concatenate([2 - pairs.iou[places], np.full(rows, 2.0)]),
            (
                np.concatenate([first, np.arange(rows)]),
                np.concatenate([second, columns + np.arange(rows)]),
            ),
        ),
        shape=(rows, columns + rows),
    )
    row, column = min_weight_full_bipartite_matching(weights)
    taken = np.full(rows, -1)
    taken[row] = column
    chosen: Array = places[taken[first] == second]
    return chosen
