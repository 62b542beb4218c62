"""Runs: the foreground of a region as horizontal stretches of pixels that are alike.

Nothing between probabilities and labels needs more than this, and a slide has some hundred times fewer
runs than pixels: components are joined by run, and the pass after the reduction paints runs instead of
reading probabilities again.

    foreground   . . . # # # # # . .         runs   x0 3  x1 4   level 1
    interior           2 9 9 2 2                    x0 4  x1 6   level 0
                                                    x0 6  x1 8   level 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from segpipe.geometry import Box

OUTSIDE = 255
"""Level of a pixel outside the foreground."""

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Runs:
    """The foreground of a region, in raster order.

    starts
        (h + 1,) int64: the runs of row y are starts[y] to starts[y + 1].
    x0, x1
        (R,) unsigned: half-open columns of each run, 0 at the region's left edge.
    level
        (R,) uint8: first growth level that may take its pixels (`Decode.growth`).
    slot
        (R,) uint32: 0 no seed; 1..n a seed decided in the region; n + 1 + t the seam node t.
    """

    starts: Array
    x0: Array
    x1: Array
    level: Array
    slot: Array

    def pack(self) -> Array:
        """All of it as bytes: (B,) uint8."""
        sizes = np.array([len(self.starts), len(self.x0), self.x0.dtype.itemsize], "<i8")
        arrays = (sizes, self.starts, self.slot, self.x0, self.x1, self.level)
        return np.frombuffer(b"".join(array.tobytes() for array in arrays), np.uint8)

    @classmethod
    def unpack(cls, packed: Array) -> Runs:
        """The runs that `pack` made these bytes of; views, not copies."""
        rows, runs, width = (int(size) for size in packed[:24].view("<i8"))
        place = 24

        def take(dtype: str, length: int) -> Array:
            nonlocal place
            end = place + length * np.dtype(dtype).itemsize
            array = packed[place:end].view(dtype)
            place = end
            return array

        starts, slot = take("<i8", rows), take("<u4", runs)
        x0, x1 = take(f"<u{width}", runs), take(f"<u{width}", runs)
        return cls(starts, x0, x1, take("<u1", runs), slot)

    def paint(self, ids: Array, at: Box, labels: Array, levels: Array) -> None:
        """Write ids and levels of the runs into a window; modifies `labels` and `levels`.

        Parameters
        ----------
        ids
            (n + 1 + T,) uint32: what each slot means.
        at
            Where the region lies in the window's pixels; what overhangs is left out.
        labels, levels
            (h, w) uint32 and uint8.
        """
        seen = at.intersect(Box(0, 0, *labels.shape))
        inner = seen.shift(-at.y0, -at.x0)
        _paint(
            *(self.starts, self.x0, self.x1, self.level, self.slot, ids),
            *(inner.y0, inner.y1, inner.x0, inner.x1, at.y0, at.x0, labels, levels),
        )


def find_runs(
    foreground: Array, interior: Array, threshold: int, classes: Array
) -> tuple[Array, Array, Array, Array]:
    """Stretches of foreground pixels of one class: starts, x0, x1 as in `Runs`, and class (R,) uint8.

    Parameters
    ----------
    foreground, interior
        (h, w) uint8.
    threshold
        A pixel is foreground when it has at least this.
    classes
        (256,) uint8: class of each value of the interior, below OUTSIDE.
    """
    width = foreground.shape[1]
    starts, x0, x1, found = _find(
        np.ascontiguousarray(foreground), np.ascontiguousarray(interior), threshold, classes
    )
    narrow = np.uint16 if width <= np.iinfo(np.uint16).max else np.uint32
    return starts, x0.astype(narrow), x1.astype(narrow), found


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _find(
    foreground: Array, interior: Array, threshold: int, classes: Array
) -> tuple[Array, Array, Array, Array]:
    height, width = foreground.shape
    starts = np.zeros(height + 1, np.int64)
    capacity = width + foreground.size // 32 + 1
    x0, x1 = np.empty(capacity, np.uint32), np.empty(capacity, np.uint32)
    found = np.empty(capacity, np.uint8)
    count = 0
    for y in range(height):
        if count + width > capacity:
            capacity = 2 * (count + width)
            x0, x1, found = (
                np.concatenate((x0[:count], np.empty(capacity - count, np.uint32))),
                np.concatenate((x1[:count], np.empty(capacity - count, np.uint32))),
                np.concatenate((found[:count], np.empty(capacity - count, np.uint8))),
            )
        last = OUTSIDE
        for x in range(width):
            here = OUTSIDE
            if foreground[y, x] >= threshold:
                here = classes[interior[y, x]]
            if here != last:
                if last != OUTSIDE:
                    x1[count - 1] = x
                if here != OUTSIDE:
                    x0[count] = x
                    found[count] = here
                    count += 1
                last = here
        if last != OUTSIDE:
            x1[count - 1] = width
        starts[y + 1] = count
    return starts, x0[:count].copy(), x1[:count].copy(), found[:count].copy()


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def join_runs(
    starts: Array, x0: Array, x1: Array, level: Array, highest: int, width: int
) -> tuple[Array, Array, Array, Array]:
    """4-connected components of the runs whose level is at most `highest`.

    Returns
    -------
    node, area, first, first_run
        Per run its component (R,) int32, -1 where its level is higher. Per component, in raster order
        of first pixels: pixels (n,) int64; first pixel y * width + x (n,) int64; run of that pixel.

    Notes
    -----
    Union-find over the spans of each row, with the smaller one as root (after L. He, Y. Chao and
    K. Suzuki, "A run-based two-scan labeling algorithm", IEEE Trans. Image Process. 17, 2008).
    """
    runs = x0.size
    span_of = np.full(runs, -1, np.int32)
    span_x0, span_x1 = np.empty(runs, np.int64), np.empty(runs, np.int64)
    span_first, span_run = np.empty(runs, np.int64), np.empty(runs, np.int64)
    root = np.empty(runs, np.int32)
    spans = above = above_end = 0
    for y in range(starts.size - 1):
        begin = spans
        for run in range(starts[y], starts[y + 1]):
            if level[run] > highest:
                continue
            if spans > begin and span_x1[spans - 1] == x0[run]:
                span_x1[spans - 1] = x1[run]
            else:
                span_x0[spans], span_x1[spans] = x0[run], x1[run]
                span_first[spans], span_run[spans] = y * width + x0[run], run
                root[spans] = spans
                spans += 1
            span_of[run] = spans - 1
        for span in range(begin, spans):
            while above < above_end and span_x1[above] <= span_x0[span]:
                above += 1
            other = above
            while other < above_end and span_x0[other] < span_x1[span]:
                one, two = other, span
                while root[one] != one:
                    root[one] = root[root[one]]
                    one = root[one]
                while root[two] != two:
                    root[two] = root[root[two]]
                    two = root[two]
                root[max(one, two)] = min(one, two)
                other += 1
        above, above_end = begin, spans
    node = np.empty(spans, np.int32)
    count = 0
    for span in range(spans):  # a root comes before what hangs on it
        if root[span] == span:
            node[span] = count
            span_first[count], span_run[count] = span_first[span], span_run[span]
            count += 1
        else:
            node[span] = node[root[span]]
    area = np.zeros(count, np.int64)
    for run in range(runs):
        if span_of[run] >= 0:
            span_of[run] = node[span_of[run]]
            area[span_of[run]] += np.int64(x1[run]) - np.int64(x0[run])
    return span_of, area, span_first[:count].copy(), span_run[:count].copy()


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _paint(
    starts: Array,
    x0: Array,
    x1: Array,
    level: Array,
    slot: Array,
    ids: Array,
    from_y: int,
    to_y: int,
    from_x: int,
    to_x: int,
    shift_y: int,
    shift_x: int,
    labels: Array,
    levels: Array,
) -> None:
    for y in range(from_y, to_y):
        for run in range(starts[y], starts[y + 1]):
            begin, end = max(int(x0[run]), from_x), min(int(x1[run]), to_x)
            for x in range(begin + shift_x, end + shift_x):
                labels[y + shift_y, x] = ids[slot[run]]
                levels[y + shift_y, x] = level[run]
