"""Outlines and measurements as GeoParquet 1.1: the table with a column of WKB, (x, y).

Coordinates are the table's: pixels of the full-resolution image, pixel centres at whole numbers, so
outlines run at halves. There is no place on Earth to them: the coordinate reference system is null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numba import njit

from segpipe.export.partial import written_whole
from segpipe.polygons import Polygons

Array = np.ndarray[Any, np.dtype[Any]]
GEOMETRY = "geometry"
GROUP_ROWS = 2**15


class GeoparquetWriter:
    """Writes objects as they come, in row groups of one size.

    Parameters
    ----------
    schema
        Of the table, with its metadata.
    shape
        (Y, X) of the full-resolution image, which bounds all coordinates.
    scale
        Pixels of the full-resolution image per pixel of the labels.
    """

    def __init__(
        self, path: Path, schema: pa.Schema, shape: tuple[int, int], scale: float = 1.0
    ) -> None:
        self.scale, self.shape = scale, shape
        self._whole = written_whole(path)
        column = {
            "encoding": "WKB",
            "geometry_types": ["MultiPolygon", "Polygon"],
            "crs": None,
            "edges": "planar",
            "orientation": "counterclockwise",
            "bbox": [-0.5, -0.5, shape[1] - 0.5, shape[0] - 0.5],
        }
        geo = {"version": "1.1.0", "primary_column": GEOMETRY, "columns": {GEOMETRY: column}}
        known: Mapping[bytes, bytes] = schema.metadata or {}
        self.schema = schema.append(pa.field(GEOMETRY, pa.binary())).with_metadata(
            {**known, b"geo": json.dumps(geo).encode()}
        )

    def __enter__(self) -> Self:
        partial = self._whole.__enter__()
        self._writer = pq.ParquetWriter(partial, self.schema, compression="zstd")
        self._waiting = self.schema.empty_table()
        return self

    def write(self, polygons: Polygons, table: pa.Table) -> None:
        """Append objects: their polygons, and the rows of the table, in one order."""
        data, ends = well_known_binary(polygons, self.scale, self.shape)
        buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(data)]
        column = pa.Array.from_buffers(pa.binary(), len(polygons), buffers)
        whole = table.append_column(GEOMETRY, column).cast(self.schema)
        self._waiting = pa.concat_tables([self._waiting, whole])
        while len(self._waiting) >= GROUP_ROWS:
            self._writer.write_table(self._waiting.slice(0, GROUP_ROWS).combine_chunks())
            self._waiting = self._waiting.slice(GROUP_ROWS)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._writer.write_table(self._waiting.combine_chunks())
        self._writer.close()
        self._whole.__exit__(kind, error, trace)


def well_known_binary(
    polygons: Polygons, scale: float = 1.0, shape: tuple[int, int] | None = None
) -> tuple[Array, Array]:
    """WKB of each object, and where each ends: (B,) uint8, (n + 1,) int64.

    Coordinates have pixel centres at whole numbers: corner c lies at c * scale - 0.5.

    Parameters
    ----------
    shape
        (Y, X) of the full resolution, beyond which the last pixels of the labels may reach.
    """
    corners = polygons.corners_at(scale, shape)
    points = np.ascontiguousarray((corners - 0.5)[:, ::-1], "<f8")
    rings = len(polygons.ends) - 1
    parts, objects = len(polygons.rings) - 1, len(polygons)
    data = np.empty(16 * (len(points) + rings) + 4 * rings + 9 * (parts + objects), np.uint8)
    ends = _write_wkb(
        *(polygons.parts, polygons.rings, polygons.ends, points.view(np.uint8).reshape(-1, 16)),
        data,
    )
    return data[: ends[-1]], ends


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _write_wkb(parts: Array, rings: Array, ends: Array, points: Array, data: Array) -> Array:
    found = np.zeros(parts.size, np.int64)
    at = 0
    for one in range(parts.size - 1):
        count = parts[one + 1] - parts[one]
        if count > 1:
            at = _write_head(6, count, data, at)
        for part in range(parts[one], parts[one + 1]):
            at = _write_head(3, rings[part + 1] - rings[part], data, at)
            for ring in range(rings[part], rings[part + 1]):
                first, end = ends[ring], ends[ring + 1]
                at = _write_count(end - first + 1, data, at)
                for place in range(first, end + 1):  # the first once more at the end
                    corner = place if place < end else first
                    data[at : at + 16] = points[corner]
                    at += 16
        found[one + 1] = at
    return found


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _write_head(kind: int, count: int, data: Array, at: int) -> int:
    data[at] = 1  # little-endian
    end: int = _write_count(count, data, _write_count(kind, data, at + 1))
    return end


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _write_count(count: int, data: Array, at: int) -> int:
    for byte in range(4):
        data[at + byte] = count >> 8 * byte & 255
    return at + 4
