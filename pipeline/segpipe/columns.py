"""The InstanceTable: its columns, what they say, and how they follow from sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from segpipe.perimeters import perimeters
from segpipe.properties import wide
from segpipe.resampling import full_start, full_stop, to_full

Array = np.ndarray[Any, np.dtype[Any]]
CHANNEL = "<channel>"
"""In names of columns of which there is one per channel."""
ALWAYS, SHAPE, INTENSITY, NEIGHBOURS = "always", "shape", "intensity", "neighbours"
_ELLIPSE = "of the ellipse with the object's second moments"
_TABLE = (
    (ALWAYS, "id", "value of the object in the label image"),
    (ALWAYS, "centroid_y_px", "row of the mean of its pixels' centres"),
    (ALWAYS, "centroid_x_px", "column of the mean of its pixels' centres"),
    (ALWAYS, "centroid_y_um", "`centroid_y_px` in micrometres"),
    (ALWAYS, "centroid_x_um", "`centroid_x_px` in micrometres"),
    (ALWAYS, "area_px", "area in pixels, rounded where the image was resampled"),
    (ALWAYS, "area_um2", "area in square micrometres"),
    (ALWAYS, "equivalent_diameter_px", "diameter of the disk of the same area"),
    (ALWAYS, "equivalent_diameter_um", "the same in micrometres"),
    (ALWAYS, "bbox_y0_px", "first row of the box around it"),
    (ALWAYS, "bbox_x0_px", "first column of the box"),
    (ALWAYS, "bbox_y1_px", "one past the last row of the box"),
    (ALWAYS, "bbox_x1_px", "one past the last column of the box"),
    (ALWAYS, "mean_probability", "mean of the foreground's probability, 0 to 1"),
    (ALWAYS, "touches_border", "whether it reaches the border of the image"),
    (SHAPE, "perimeter_px", "length of its border, as scikit-image's `perimeter`"),
    (SHAPE, "perimeter_um", "the same in micrometres"),
    (SHAPE, "major_axis_px", f"length of the major axis {_ELLIPSE}"),
    (SHAPE, "major_axis_um", "the same in micrometres"),
    (SHAPE, "minor_axis_px", f"length of the minor axis {_ELLIPSE}"),
    (SHAPE, "minor_axis_um", "the same in micrometres"),
    (SHAPE, "eccentricity", f"eccentricity {_ELLIPSE}: 0 for a circle, towards 1 for a line"),
    (
        SHAPE,
        "orientation_rad",
        "angle from the direction of rows (down) to the major axis, counter-clockwise, -pi/2 to pi/2",
    ),
    (SHAPE, "solidity", "share of the pixels of its convex hull that it covers"),
    (INTENSITY, f"mean_intensity_{CHANNEL}", "mean intensity, in the image's units"),
    (INTENSITY, f"min_intensity_{CHANNEL}", "least intensity"),
    (INTENSITY, f"max_intensity_{CHANNEL}", "greatest intensity"),
    (INTENSITY, f"sd_intensity_{CHANNEL}", "standard deviation of the intensity, over n pixels"),
    (NEIGHBOURS, "nearest_neighbour_px", "distance of its centroid to the nearest other centroid"),
    (NEIGHBOURS, "nearest_neighbour_um", "the same in micrometres"),
)


@dataclass(frozen=True)
class Column:
    """A column of the table, or one per channel.

    feature
        Which of `measure.features` it belongs to, or `always`.
    """

    feature: str
    name: str
    text: str


COLUMNS = tuple(Column(*one) for one in _TABLE)
"""All columns, in their order."""


@dataclass(frozen=True)
class Frame:
    """What turns sums over pixels into measures.

    shape
        (Y, X) of the plane that was segmented, in its own pixels.
    full_shape
        (Y, X) of the full resolution.
    pixel_size_um
        Of the full-resolution image; None where it is not known.
    scale
        Full-resolution pixels per pixel of that plane.
    channels
        Names of those whose intensities were summed up, all different.
    units
        Of each, of the fixed point of its intensities.
    """

    shape: tuple[int, int]
    full_shape: tuple[int, int]
    pixel_size_um: float | None
    scale: float = 1.0
    channels: Sequence[str] = ()
    units: Sequence[float] = ()


def descriptions(channels: Sequence[str]) -> dict[str, str]:
    """What each column that there may be says, by name."""
    found = {}
    for column in COLUMNS:
        for channel in channels if CHANNEL in column.name else ("",):
            found[column.name.replace(CHANNEL, channel)] = column.text
    return found


def columns_markdown() -> str:
    """The page of the documentation about the columns."""
    lines = [
        "# The table",
        "",
        "<!-- Written by `python -m segpipe.settings_docs` from segpipe/columns.py. -->",
        "",
        "`<name>.parquet` has one row per object. `_px`: pixels of the full-resolution image, pixel",
        "centres at integers; `_um`, `_um2`: micrometres, empty where the pixel size is not known.",
        "Each column has its description in the file too, as metadata of its field. `measure.features`",
        f"says which are measured; `{CHANNEL}` is the name of a channel. Intensities and shapes are",
        "those of the image that was segmented, and equal to what scikit-image's `regionprops` gives.",
        "",
        "| column | what | feature |",
        "|---|---|---|",
        *(f"| `{one.name}` | {one.text} | {one.feature} |" for one in COLUMNS),
    ]
    return "\n".join(lines) + "\n"


def different_names(channels: Sequence[str]) -> list[str]:
    """The names of channels, with their number behind those that occur before.

    >>> different_names(["DAPI", "", "DAPI"])
    ['DAPI', '1', 'DAPI_2']
    """
    names: list[str] = []
    for number, channel in enumerate(channels):
        name = channel or str(number)
        while name in names:
            name += f"_{number}"
        names.append(name)
    return names


def instance_columns(rows: Array, frame: Frame) -> dict[str, Array]:
    """Columns from merged rows, but for the distances to neighbours.

    Coordinates and lengths are those of the full-resolution image with pixel centres at integers; the
    box is half-open and holds every full-resolution pixel of which the object has a part. Columns in
    um are NaN where the pixel size is not known.
    """
    scale, size = frame.scale, np.nan if frame.pixel_size_um is None else frame.pixel_size_um
    own_area = rows["area"].astype(np.float64)
    area = own_area * scale**2
    y, x = centroids(rows, frame)
    height, width = frame.shape
    names = rows.dtype.names or ()
    return {
        "id": rows["id"].astype(np.uint32),
        "centroid_y_px": y,
        "centroid_x_px": x,
        "centroid_y_um": y * size,
        "centroid_x_um": x * size,
        "area_px": np.rint(area).astype(np.int64),
        "area_um2": area * size**2,
        "equivalent_diameter_px": np.sqrt(4 * area / np.pi),
        "equivalent_diameter_um": np.sqrt(4 * area / np.pi) * size,
        "bbox_y0_px": full_start(rows["y0"], scale),
        "bbox_x0_px": full_start(rows["x0"], scale),
        "bbox_y1_px": np.minimum(full_stop(rows["y1"], scale), frame.full_shape[0]),
        "bbox_x1_px": np.minimum(full_stop(rows["x1"], scale), frame.full_shape[1]),
        "mean_probability": rows["sum_foreground"] / own_area / 255,
        "touches_border": (rows["y0"] == 0)
        | (rows["x0"] == 0)
        | (rows["y1"] == height)
        | (rows["x1"] == width),
        **(_shape_columns(rows, scale, size) if "hull" in names else {}),
        **(_intensity_columns(rows, frame) if "total" in names else {}),
    }


def centroids(rows: Array, frame: Frame) -> tuple[Array, Array]:
    """y and x of the objects' centres, in full-resolution pixels: (n,) float64 each."""
    y, x = (to_full(rows[f"sum_{axis}"] / rows["area"], frame.scale) for axis in ("y", "x"))
    return y, x


def neighbour_columns(distance_px: Array, frame: Frame) -> dict[str, Array]:
    """The last columns, from distances between the centroids."""
    size = np.nan if frame.pixel_size_um is None else frame.pixel_size_um
    return {"nearest_neighbour_px": distance_px, "nearest_neighbour_um": distance_px * size}


def _shape_columns(rows: Array, scale: float, size: float) -> dict[str, Array]:
    area = rows["area"]
    y, x = (rows[f"sum_{axis}"] - area * rows[f"{axis}0"] for axis in ("y", "x"))
    pairs = (("yy", y, y), ("yx", y, x), ("xx", x, x))
    variances = [
        _covariance(area, (rows[f"{name}_high"], rows[f"{name}_low"]), first, second)
        for name, first, second in pairs
    ]
    ellipse = np.zeros((4, len(rows)))
    _find_ellipses(*variances, ellipse)
    major, minor = ellipse[0] * scale, ellipse[1] * scale
    length = perimeters(rows["straight"], rows["diagonal"], rows["turning"]) * scale
    return {
        "perimeter_px": length,
        "perimeter_um": length * size,
        "major_axis_px": major,
        "major_axis_um": major * size,
        "minor_axis_px": minor,
        "minor_axis_um": minor * size,
        "eccentricity": ellipse[2],
        "orientation_rad": ellipse[3],
        "solidity": area / rows["hull"],
    }


def _intensity_columns(rows: Array, frame: Frame) -> dict[str, Array]:
    columns = {}
    for channel, (name, unit) in enumerate(zip(frame.channels, frame.units, strict=True)):
        total, missing = rows["total"][:, channel], rows["missing"][:, channel]
        squares = rows["squares_high"][:, channel], rows["squares_low"][:, channel]
        count = rows["area"] - missing
        known = count > 0
        counted = np.where(known, count, 1)
        variance = _covariance(counted, squares, total, total)
        found = {
            "mean": total / counted * unit,
            "min": rows["least"][:, channel],
            "max": rows["most"][:, channel],
            "sd": np.sqrt(variance) * unit,
        }
        for key, column in found.items():
            columns[f"{key}_intensity_{name}"] = np.where(known, column, np.nan)
    return columns


def _covariance(count: Array, product: tuple[Array, Array], first: Array, second: Array) -> Array:
    """(n sum(ab) - sum(a) sum(b)) / n^2, whose numerator is exact: (n,) float64.

    Parameters
    ----------
    product
        Sums of a b, high and low.
    """
    bound = count * wide(*product, np.float64)
    small = np.maximum(bound, np.abs(first * 1.0) * np.abs(second)) < 2.0**62
    numerator = np.empty(len(count))
    for some, dtype in ((small, np.int64), (~small, object)):  # the latter: Python integers
        if some.any():
            n, a, b = (one[some].astype(dtype) for one in (count, first, second))
            high, low = (one[some] for one in product)
            numerator[some] = (n * wide(high, low, dtype) - a * b).astype(np.float64)
    found: Array = numerator / count.astype(np.float64) ** 2
    return found


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _find_ellipses(yy: Array, yx: Array, xx: Array, ellipse: Array) -> None:
    """Major and minor axis, eccentricity and orientation, from variances; scikit-image's formulae.

    One object after the other: numpy's arctan2 may round differently by place in the array.
    """
    for number in range(yy.size):
        a, b, c = yy[number], yx[number], xx[number]
        middle, apart = (a + c) / 2, math.sqrt(((a - c) / 2) ** 2 + b**2)
        major, minor = middle + apart, max(middle - apart, 0.0)
        ellipse[0, number], ellipse[1, number] = 4 * math.sqrt(major), 4 * math.sqrt(minor)
        ellipse[2, number] = math.sqrt(1 - minor / major) if major > 0 else 0.0
        if a == c:
            ellipse[3, number] = math.pi / 4 if b > 0 else -math.pi / 4
        else:
            ellipse[3, number] = 0.5 * math.atan2(2 * b, a - c)
