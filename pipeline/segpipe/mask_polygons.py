"""Polygons of GeoJSON, and the pixels whose centres lie inside them.

A pixel's centre is inside a polygon when a ray from it crosses the rings an odd number of times (so
holes are outside), and inside several polygons when it is inside one. An edge counts for the rows
y0 <= y < y1 and for what lies at its right or on it. Whether a pixel is inside follows from its own
place alone, so the box that is asked for does not show.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Polygons:
    """Polygons by their edges.

    edges
        Per polygon (E, 4) float64: y0, x0, y1, x1 with y0 < y1; level ones are left out.
    bounds
        (P, 4) float64: least and largest y, least and largest x of each polygon.
    """

    edges: tuple[NDArray[np.float64], ...]
    bounds: NDArray[np.float64]

    def inside(self, rows: Array, columns: Array) -> NDArray[np.bool_]:
        """(h, w): which points of a lattice are inside.

        Parameters
        ----------
        rows, columns
            (h,) and (w,) ascending float64: y and x of the points.
        """
        result = np.zeros((len(rows), len(columns)), bool)
        if not len(rows) or not len(columns) or not self.edges:
            return result
        low_y, high_y, low_x, high_x = self.bounds.T
        near = (low_y <= rows[-1]) & (high_y >= rows[0])
        near &= (low_x <= columns[-1]) & (high_x >= columns[0])
        for number in np.flatnonzero(near):
            low_y, high_y, low_x, high_x = self.bounds[number]
            y = slice(*np.searchsorted(rows, [low_y, high_y]))
            x = slice(*np.searchsorted(columns, [low_x, np.nextafter(high_x, np.inf)]))
            part = np.zeros((y.stop - y.start, x.stop - x.start), bool)
            if part.size:
                _toggle(self.edges[number], rows[y], columns[x], part)
                result[y, x] |= np.logical_xor.accumulate(part, axis=1)
        return result


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _toggle(edges: Array, rows: Array, columns: Array, part: Array) -> None:
    """Mark in each row where an edge is crossed: the first column at its right, or on it."""
    for edge in range(edges.shape[0]):
        y0, x0, y1, x1 = edges[edge, 0], edges[edge, 1], edges[edge, 2], edges[edge, 3]
        for row in range(np.searchsorted(rows, y0), np.searchsorted(rows, y1)):
            x = x0 + (rows[row] - y0) * ((x1 - x0) / (y1 - y0))
            column = np.searchsorted(columns, x)
            if column < columns.size:
                part[row, column] = not part[row, column]


def parse_geojson(text: str | bytes) -> Polygons:
    """All polygons of a GeoJSON document: features, collections, or bare geometries; x, y in a point.

    Raises
    ------
    ValueError
        When it is no GeoJSON, holds no polygon, or a point is not two finite numbers.
    """
    try:
        document = json.loads(text)
        polygons = [_edges(rings) for rings in _polygons(document)]
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"is not GeoJSON ({type(error).__name__}: {error})") from None
    kept = [edges for edges in polygons if len(edges)]
    if not kept:
        raise ValueError("holds no polygon with an area")
    bounds = [
        (
            edges[:, 0].min(),
            edges[:, 2].max(),
            edges[:, [1, 3]].min(),
            edges[:, [1, 3]].max(),
        )
        for edges in kept
    ]
    return Polygons(tuple(kept), np.array(bounds))


def _polygons(node: Any) -> Iterator[Sequence[Any]]:
    """The rings of each polygon."""
    if isinstance(node, list):  # QuPath writes a bare list of features too
        for one in node:
            yield from _polygons(one)
        return
    kind = node["type"]
    if kind == "FeatureCollection":
        yield from _polygons(node["features"])
    elif kind == "Feature":
        if node["geometry"] is not None:
            yield from _polygons(node["geometry"])
    elif kind == "GeometryCollection":
        yield from _polygons(node["geometries"])
    elif kind == "MultiPolygon":
        yield from node["coordinates"]
    elif kind == "Polygon":
        yield node["coordinates"]


def _edges(rings: Sequence[Any]) -> NDArray[np.float64]:
    parts = [np.zeros((0, 4))]
    for ring in rings:
        points = [(float(point[1]), float(point[0])) for point in ring]
        if not all(math.isfinite(value) for point in points for value in point):
            raise ValueError("has a coordinate that is not finite")
        if len(points) < 3:
            continue
        start = np.array(points)
        end = np.roll(start, -1, axis=0)  # closed, whether the last point repeats the first or not
        edges = np.concatenate([start, end], axis=1)
        falling = edges[:, 0] > edges[:, 2]
        edges[falling] = edges[falling][:, [2, 3, 0, 1]]
        parts.append(edges[edges[:, 0] < edges[:, 2]])
    return np.concatenate(parts)
