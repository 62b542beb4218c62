"""Measurements that add up: sums over the pixels of an object, region by region.

A region knows sums over its own pixels; the rows of one object from several regions add (areas,
sums), take the minimum or maximum (boxes) or an or (border). All are integers, so neither the cuts
nor the order can change a digit of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numba import njit

from segpipe.geometry import Box
from segpipe.resampling import full_start, full_stop, to_full

Array = np.ndarray[Any, np.dtype[Any]]

ROW = np.dtype(
    [
        ("id", np.int64),
        ("area", np.int64),
        ("sum_y", np.int64),
        ("sum_x", np.int64),
        ("sum_foreground", np.int64),
        ("y0", np.int64),
        ("x0", np.int64),
        ("y1", np.int64),
        ("x1", np.int64),
    ]
)
"""Sums over an object's pixels: coordinates are the image's, the foreground is 0..255, the box is
half-open."""
MOST_ROWS = 2**15
"""Rows that become columns of the table at once."""
_ADDED = ("area", "sum_y", "sum_x", "sum_foreground")
_LEAST = ("y0", "x0")
_MOST = ("y1", "x1")


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
    label, run = _runs(np.ascontiguousarray(labels), np.ascontiguousarray(foreground))
    order = np.argsort(label, kind="stable")
    rows = np.zeros(len(label), ROW)
    count = _sum_runs(
        label, run, order, rows.view(np.int64).reshape(len(rows), len(ROW.fields or ()))
    )
    rows = rows[:count].copy()
    for axis, start in (("y", box.y0), ("x", box.x0)):
        rows[f"sum_{axis}"] += start * rows["area"]
        rows[f"{axis}0"] += start
        rows[f"{axis}1"] += start
    return rows


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _runs(labels: Array, foreground: Array) -> tuple[Array, Array]:
    """Horizontal runs of one label: label (R,); and y, x0, x1, sum of foreground (R, 4); all int64."""
    height, width = labels.shape
    capacity = width + labels.size // 32 + 1
    label, run = np.empty(capacity, np.int64), np.empty((capacity, 4), np.int64)
    count = 0
    for y in range(height):
        if count + width > capacity:
            capacity = 2 * (count + width)
            label = np.concatenate((label[:count], np.empty(capacity - count, np.int64)))
            run = np.concatenate((run[:count], np.empty((capacity - count, 4), np.int64)))
        x = 0
        while x < width:
            here = labels[y, x]
            if here == 0:
                x += 1
                continue
            begin = x
            total = np.int64(0)
            while x < width and labels[y, x] == here:
                total += foreground[y, x]
                x += 1
            label[count] = here
            run[count, 0], run[count, 1], run[count, 2], run[count, 3] = y, begin, x, total
            count += 1
    return label[:count].copy(), run[:count].copy()


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sum_runs(label: Array, run: Array, order: Array, rows: Array) -> int:
    """Add runs up, in an order that puts those of one label together; columns of `rows` as ROW."""
    count = 0
    for place in order:
        y, x0, x1, total = run[place]
        if count == 0 or rows[count - 1, 0] != label[place]:
            count += 1
            row = rows[count - 1]
            row[0] = label[place]
            row[5], row[6], row[7], row[8] = y, x0, y + 1, x1
        row = rows[count - 1]
        length = x1 - x0
        row[1] += length
        row[2] += y * length
        row[3] += (x0 + x1 - 1) * length // 2
        row[4] += total
        row[6] = min(row[6], x0)
        row[7] = y + 1  # runs come in raster order
        row[8] = max(row[8], x1)
    return count


def merge_rows(rows: Array) -> Array:
    """One row per id, ascending: sums add, boxes unite."""
    if len(rows) == 0:
        return rows
    rows = rows[np.argsort(rows["id"], kind="stable")]
    starts = np.flatnonzero(np.r_[True, rows["id"][1:] != rows["id"][:-1]])
    merged = rows[starts].copy()
    for names, combine in ((_ADDED, np.add), (_LEAST, np.minimum), (_MOST, np.maximum)):
        for name in names:
            merged[name] = combine.reduceat(rows[name], starts)
    return merged


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


def instance_columns(
    rows: Array,
    shape: tuple[int, int],
    pixel_size_um: float | None,
    scale: float = 1.0,
    full_shape: tuple[int, int] | None = None,
) -> dict[str, Array]:
    """Columns of the InstanceTable from merged rows.

    Coordinates are those of the full-resolution image with pixel centres at integers; the box is
    half-open, and holds every full-resolution pixel of which the object has a part. Columns in um are
    NaN where the pixel size is not known.

    Parameters
    ----------
    shape
        (Y, X) of the image in which `rows` were measured.
    pixel_size_um
        Of the full resolution.
    scale
        Full-resolution pixels a pixel of that image; see `segpipe.resampling`.
    full_shape
        (Y, X) of the full resolution; None: `shape`.
    """
    own_area = rows["area"].astype(np.float64)
    area = own_area * scale**2
    size = np.nan if pixel_size_um is None else pixel_size_um
    centroid_y, centroid_x = (to_full(rows[f"sum_{axis}"] / own_area, scale) for axis in ("y", "x"))
    height, width = shape
    full_height, full_width = full_shape or shape
    return {
        "id": rows["id"].astype(np.uint32),
        "centroid_y_px": centroid_y,
        "centroid_x_px": centroid_x,
        "centroid_y_um": centroid_y * size,
        "centroid_x_um": centroid_x * size,
        "area_px": np.rint(area).astype(np.int64),
        "area_um2": area * size**2,
        "equivalent_diameter_px": np.sqrt(4 * area / np.pi),
        "equivalent_diameter_um": np.sqrt(4 * area / np.pi) * size,
        "bbox_y0_px": full_start(rows["y0"], scale),
        "bbox_x0_px": full_start(rows["x0"], scale),
        "bbox_y1_px": np.minimum(full_stop(rows["y1"], scale), full_height),
        "bbox_x1_px": np.minimum(full_stop(rows["x1"], scale), full_width),
        "mean_probability": rows["sum_foreground"] / own_area / 255,
        "touches_border": (rows["y0"] == 0)
        | (rows["x0"] == 0)
        | (rows["y1"] == height)
        | (rows["x1"] == width),
    }


def bands_of_rows(
    first_ids: Sequence[int],
    rows_of_band: Sequence[Callable[[], Iterable[Array]]],
    most: int = MOST_ROWS,
) -> Iterator[tuple[int, Array]]:
    """The number of a band of regions, and merged rows of its objects; ids ascending over all.

    Parameters
    ----------
    first_ids
        The first id that is anchored in each band, and one more than the last id of all.
    rows_of_band
        Callables, one per band, that give the rows of each of its regions, ascending; each is called
        twice.
    most
        Rows at once; a band of more comes in parts, one of none as an empty part.

    Notes
    -----
    Ids rank the anchors of seeds in raster order, so the objects that a band anchors are one range
    of ids. What a band holds of other ranges are objects that crossed a seam, downwards, or upwards
    when a seed grew: memory grows with the rows of one band and with those.
    """
    strays = [np.zeros(0, ROW)]
    for first, end, rows_of in zip(first_ids[:-1], first_ids[1:], rows_of_band, strict=True):
        strays += [rows[(rows["id"] < first) | (rows["id"] >= end)] for rows in rows_of()]
    crossing = merge_rows(np.concatenate(strays))
    for band, rows_of in enumerate(rows_of_band):
        first, end = first_ids[band : band + 2]
        regions = [*rows_of(), crossing]
        for start in range(first, max(end, first + 1), most):
            wanted = [start, min(start + most, end)]
            parts = [rows[slice(*np.searchsorted(rows["id"], wanted))] for rows in regions]
            yield band, merge_rows(np.concatenate(parts))
