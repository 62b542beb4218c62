"""Measurements that add up: sums over the pixels of an object, region by region.

A region knows sums over its own pixels; the rows of one object from several regions add (areas,
sums), or take the minimum or maximum (boxes, extremes). All are integers, or floats that are only
compared, so neither the cuts nor the order can change a digit of the table.

Second moments are about the upper left corner of the row's own box, so that those of small objects stay
small; where rows unite they are moved in Python integers. Sums that may pass 2^63 are two numbers,
high * 2^32 + low.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numba import njit

from segpipe.geometry import Box
from segpipe.hulls import hulls_of
from segpipe.intensities import PlaneSums, add_up, sum_plane
from segpipe.object_runs import ObjectRuns
from segpipe.perimeters import MARGIN, border_counts

Array = np.ndarray[Any, np.dtype[Any]]

_BASE = ("id", "area", "sum_y", "sum_x", "sum_foreground", "y0", "x0", "y1", "x1")
_MOMENTS = ("yy", "yx", "xx")
_SHAPE = (
    *(f"{moment}_{part}" for moment in _MOMENTS for part in ("high", "low")),
    *("straight", "diagonal", "turning", "hull"),
)
_INTENSITY = ("total", "squares_high", "squares_low", "missing")
_COMBINED = {
    **dict.fromkeys(("y0", "x0", "least"), np.minimum),
    **dict.fromkeys(("y1", "x1", "most", "hull"), np.maximum),
}
"""How fields of one object unite; the others add."""
_WIDE = (*_MOMENTS, "squares")


def row_dtype(*, shape: bool = False, channels: int = 0) -> np.dtype[Any]:
    """Sums over an object's pixels; coordinates are the image's, boxes half-open.

    Parameters
    ----------
    shape
        Second moments about the corner of the row's box; pixels of the border by kind; pixels in the
        convex hull, 0 where it is still to be found from points.
    channels
        How many have intensities, as `PlaneSums` tells them: (channels,) each.
    """
    names = _BASE + (_SHAPE if shape else ())
    fields: list[Any] = [(name, np.int64) for name in names]
    if channels:
        fields += [(name, np.int64, (channels,)) for name in _INTENSITY]
        fields += [(name, np.float64, (channels,)) for name in ("least", "most")]
    return np.dtype(fields)


ROW = row_dtype()
"""Without shape and intensities; `sum_foreground` is of 0..255."""


@dataclass(frozen=True)
class Features:
    """What is measured besides place, area and foreground.

    shape, channels
        As for `row_dtype`.
    connected
        Whether the pixels of an id hang together: one that does not touch another region has then all
        of them in this one. Those of a class do not.
    """

    shape: bool
    channels: int
    connected: bool = True


@dataclass(frozen=True)
class ObjectSums:
    """What regions know of objects, by ascending id.

    rows
        (n,) of a `row_dtype`.
    points
        (P, 3) uint32: id, y, x of pixels that decide the hulls of objects that are cut.
    """

    rows: Array
    points: Array

    @classmethod
    def of_rows(cls, rows: Array) -> Self:
        """Of rows without shape."""
        return cls(rows, np.zeros((0, 3), np.uint32))

    @classmethod
    def united(cls, parts: Sequence[ObjectSums]) -> Self:
        """One row per id, from one part or more."""
        some = [part for part in parts if len(part.rows) or len(part.points)]
        if len(some) == 1:  # of a small image that is all
            return cls(some[0].rows, some[0].points)
        points = np.concatenate([part.points for part in parts])
        points = points[np.argsort(points[:, 0], kind="stable")]
        return cls(merge_rows(np.concatenate([part.rows for part in parts])), points)

    def between(self, first: int, end: int) -> ObjectSums:
        """Those of ids [first, end)."""
        return ObjectSums(
            self.rows[slice(*np.searchsorted(self.rows["id"], (first, end)))],
            self.points[slice(*np.searchsorted(self.points[:, 0], (first, end)))],
        )

    def outside(self, first: int, end: int) -> ObjectSums:
        """Those of all other ids."""
        return ObjectSums.united([self.between(0, first), self.between(end, 2**32)])

    def closed(self) -> Array:
        """The rows, when no part is missing: the hulls of objects that were cut are found."""
        if len(self.points) == 0:
            return self.rows
        objects = ObjectRuns.of_points(self.points)
        area, _ = hulls_of(objects, np.zeros(len(objects.ids), bool))
        rows = self.rows.copy()
        rows["hull"][np.searchsorted(rows["id"], objects.ids)] = area
        return rows


def sum_region(labels: Array, foreground: Array, box: Box) -> Array:
    """Rows of the objects in one region, by id: (n,) ROW.

    Parameters
    ----------
    labels
        (h, w) uint32.
    foreground
        (h, w) uint8.
    box
        Where these pixels lie in the image.
    """
    objects = ObjectRuns.of(np.ascontiguousarray(labels))
    rows = np.zeros(len(objects.ids), ROW)
    _fill_base(rows, objects, foreground, box)
    return rows


def measure_region(
    window: Array,
    box: Box,
    image_shape: tuple[int, int],
    foreground: Array,
    planes: Iterable[tuple[Array, float]],
    features: Features,
) -> ObjectSums:
    """All sums of the objects in one region.

    Parameters
    ----------
    window
        (h + 2 MARGIN, w + 2 MARGIN) uint32: labels of the box and around it, 0 outside the image.
    box
        The region.
    foreground
        (h, w) uint8.
    planes
        One (h, w) per channel, with the unit of `sum_plane`; taken one after the other.
    """
    shape, channels = features.shape, features.channels
    inner = window[MARGIN : MARGIN + box.shape[0], MARGIN : MARGIN + box.shape[1]]
    objects = ObjectRuns.of(inner)
    rows = np.zeros(len(objects.ids), row_dtype(shape=shape, channels=channels))
    _fill_base(rows, objects, foreground, box)
    points = np.zeros((0, 3), np.uint32)
    if shape:
        corners = rows["y0"] - box.y0, rows["x0"] - box.x0
        moments = np.zeros((len(rows), 6), np.int64)
        _sum_moments(objects.starts, objects.runs, *corners, moments)
        borders = border_counts(window, objects)
        cut = _touches_others(rows, box, image_shape) | (not features.connected)
        rows["hull"], found = hulls_of(objects, cut)
        for name, column in zip(_SHAPE, (*moments.T, *borders.T), strict=False):
            rows[name] = column
        points = (found + np.array([0, box.y0, box.x0])).astype(np.uint32)
    if len(rows):
        for channel, (plane, unit) in enumerate(planes):
            for name, column in vars(sum_plane(plane, objects, unit)).items():
                rows[name][:, channel] = column
    return ObjectSums(rows, points)


def plane_sums(labels: Array, planes: Iterable[Array]) -> list[PlaneSums]:
    """Sums of intensities of the objects in one region, per channel."""
    objects = ObjectRuns.of(labels)
    return [sum_plane(plane, objects) for plane in planes]


def _fill_base(rows: Array, objects: ObjectRuns, foreground: Array, box: Box) -> None:
    """Write the fields that all rows have."""
    sums = np.zeros((len(rows), 7), np.int64)
    _sum_extents(objects.starts, objects.runs, sums)
    rows["id"] = objects.ids
    for name, column in zip(("area", "sum_y", "sum_x", *_BASE[5:]), sums.T, strict=True):
        rows[name] = column
    for axis, start in (("y", box.y0), ("x", box.x0)):
        rows[f"sum_{axis}"] += start * rows["area"]
        rows[f"{axis}0"] += start
        rows[f"{axis}1"] += start
    rows["sum_foreground"] = add_up(foreground, objects)


def _touches_others(rows: Array, box: Box, image_shape: tuple[int, int]) -> Array:
    """Which objects reach a side of the box that is not the image's: (n,) bool."""
    touches: Array = ((rows["y0"] == box.y0) & (box.y0 > 0)) | (
        (rows["x0"] == box.x0) & (box.x0 > 0)
    )
    touches |= (rows["y1"] == box.y1) & (box.y1 < image_shape[0])
    touches |= (rows["x1"] == box.x1) & (box.x1 < image_shape[1])
    return touches


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sum_extents(starts: Array, runs: Array, sums: Array) -> None:
    """Area, sums of y and x, and box of each object: (n, 7)."""
    for number in range(sums.shape[0]):
        first, end = starts[number], starts[number + 1]
        row = sums[number]
        row[3], row[4], row[5] = runs[first, 0], runs[first, 1], runs[end - 1, 0] + 1
        for place in range(first, end):
            y, x0, x1 = runs[place]
            length = x1 - x0
            row[0] += length
            row[1] += y * length
            row[2] += (x0 + x1 - 1) * length // 2
            row[4] = min(row[4], x0)
            row[6] = max(row[6], x1)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sum_moments(starts: Array, runs: Array, y0: Array, x0: Array, sums: Array) -> None:
    """Sums of y y, y x and x x about each object's corner, high and low: (n, 6)."""
    for number in range(sums.shape[0]):
        row = sums[number]
        for place in range(starts[number], starts[number + 1]):
            y = runs[place, 0] - y0[number]
            begin, end = runs[place, 1] - x0[number], runs[place, 2] - x0[number]
            length = end - begin
            row[1] += y * y * length
            row[3] += y * ((begin + end - 1) * length // 2)
            row[5] += ((end - 1) * end * (2 * end - 1) - (begin - 1) * begin * (2 * begin - 1)) // 6
            for low in (1, 3, 5):
                row[low - 1] += row[low] >> 32
                row[low] &= 0xFFFFFFFF


# --- uniting --------------------------------------------------------------------------------------


def merge_rows(rows: Array) -> Array:
    """One row per id, ascending."""
    order = np.argsort(rows["id"], kind="stable")
    ids = rows["id"][order]
    first = np.r_[True, ids[1:] != ids[:-1]][: len(ids)]
    merged: Array = rows[order[first]]
    starts = np.r_[np.flatnonzero(first), len(ids)]
    several = np.flatnonzero(np.diff(starts) > 1)  # few: those that are cut
    if len(several):
        shared = np.repeat(np.diff(starts) > 1, np.diff(starts))
        merged[several] = _united(rows[order[shared]])
    return merged


def _united(rows: Array) -> Array:
    """One row for each stretch of rows with one id; `rows` is changed."""
    starts = np.flatnonzero(np.r_[True, rows["id"][1:] != rows["id"][:-1]])
    counts = np.diff(np.r_[starts, len(rows)])
    merged = rows[starts]
    names = rows.dtype.names or ()
    for name in names[1:]:
        if name == "yy_high":  # boxes are united by now
            _move_corners(rows, np.repeat(merged["y0"], counts), np.repeat(merged["x0"], counts))
        merged[name] = _COMBINED.get(name, np.add).reduceat(rows[name], starts)
    for name in _WIDE:
        if f"{name}_high" in names:
            merged[f"{name}_high"] += merged[f"{name}_low"] >> 32
            merged[f"{name}_low"] &= 0xFFFFFFFF
    return merged


def _move_corners(rows: Array, y0: Array, x0: Array) -> None:
    """Have the second moments of rows about other corners; `rows` is changed."""
    moved = np.flatnonzero((rows["y0"] != y0) | (rows["x0"] != x0))
    some = rows[moved]
    area, sum_y, sum_x, top, left = (
        some[name].astype(object) for name in ("area", "sum_y", "sum_x", "y0", "x0")
    )
    y, x = sum_y - area * top, sum_x - area * left
    down, right = top - y0[moved], left - x0[moved]
    more = (
        2 * down * y + down * down * area,
        down * x + right * y + down * right * area,
        2 * right * x + right * right * area,
    )
    for name, add in zip(_MOMENTS, more, strict=True):
        value = wide(some[f"{name}_high"], some[f"{name}_low"], object) + add
        rows[f"{name}_high"][moved] = value >> 32
        rows[f"{name}_low"][moved] = value & 0xFFFFFFFF


def wide(high: Array, low: Array, dtype: Any) -> Array:
    """high * 2^32 + low: exact for `object`, rounded for float64."""
    value: Array = high.astype(dtype) * 2**32 + low.astype(dtype)
    return value


# --- which objects stay ---------------------------------------------------------------------------


def keeps(rows: Array, max_area: int | None, min_probability: float) -> Array:
    """Which finished objects stay: (n,) bool.

    Parameters
    ----------
    rows
        Merged rows.
    max_area
        Pixels; None keeps all.
    min_probability
        Of the mean foreground, in [0, 1]; compared in integers, so that no rounding decides.
    """
    kept = np.ones(len(rows), bool)
    if max_area is not None:
        kept &= rows["area"] <= max_area
    least = round(min_probability * 255 * 2**20)
    kept &= rows["sum_foreground"] * 2**20 >= least * rows["area"]
    return kept


def renumber(kept: Array, before: int) -> Array:
    """New ids in the old order, 0 for what goes: (n,) uint32; `before` objects stay before these."""
    return np.where(kept, before + np.cumsum(kept), 0).astype(np.uint32)
