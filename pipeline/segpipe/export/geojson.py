"""Outlines and measurements as GeoJSON for QuPath: gzip, detections with a class, (x, y).

QuPath puts the corners of pixels at whole numbers: the first pixel is the square from (0, 0) to (1, 1)
(its ROIs are java.awt shapes over the image, and a rectangle of x, y, width, height in it covers the
pixels from x to x + width). So outlines have whole numbers here, and cover exactly the pixels of their
objects when they are drawn over the image. Tables and GeoParquet have pixel *centres* at whole numbers;
there the same outline is less by half a pixel. A centroid among the measurements is the table's.

What QuPath reads (0.4 and later, `PathIO` and its type adapters): `id` as a UUID, `objectType`, `name`,
`classification` with a name and a colour, `measurements` as numbers by name. It takes `.geojson.gz` from
File > Import objects from file, and by drag and drop. A truth value or null among the measurements would
stop it, so the first are 0 and 1, and what is not known is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit

from segpipe.export.partial import written_whole
from segpipe.polygons import Polygons

Array = np.ndarray[Any, np.dtype[Any]]
LEVEL = 5
"""Of gzip: 6 takes half as long again for 2 % less."""
GZIP = 31
"""zlib's window bits for a gzip stream, whose header then holds no name and no time."""
COLOUR = (0, 200, 120)
DECIMALS = 4
"""Of coordinates that are no whole numbers."""


class GeojsonWriter:
    """Writes features as they come.

    Parameters
    ----------
    metadata
        Of the table; it goes into the file, and with the id of an object makes its UUID, which is the
        same whenever the same model sees the same image.
    classification
        Of all objects; where ids are classes, these have their own names.
    scale
        Pixels of the full-resolution image per pixel of the labels.
    shape
        (Y, X) of that image, beyond which the last pixels of the labels may reach.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        classification: str,
        scale: float = 1.0,
        shape: tuple[int, int] | None = None,
    ) -> None:
        self.scale, self.shape = scale, shape
        self._whole = written_whole(path)
        self._gzip = zlib.compressobj(LEVEL, zlib.DEFLATED, GZIP)
        named = [metadata.get(key, "") for key in ("image", "plane", "model_hash")]
        digest = hashlib.sha256(json.dumps(named).encode()).hexdigest()
        # Of the form of version 8 (RFC 9562): its bits are what we make them.
        self._uuid = f"{digest[:8]}-{digest[8:12]}-8{digest[12:15]}-8{digest[15:18]}-"
        told = {
            "image": metadata.get("image", ""),
            "model": metadata.get("model", ""),
            "coordinates": "x, y in pixels of the full-resolution image; pixel corners are whole "
            "numbers, the first pixel spans [0, 1]",
        }
        self._head = f'{{"type":"FeatureCollection","segpipe":{json.dumps(told)},"features":['
        named_class = {"name": classification, "color": list(COLOUR)}
        self._class = json.dumps(named_class, ensure_ascii=False)
        # Where ids are classes, each has its name, and QuPath its own colour for it.
        self._classes = _class_texts(metadata.get("classes", ""))
        self._between = "\n"

    def __enter__(self) -> Self:
        self._file = self._whole.__enter__().open("wb")
        self._add(self._head.encode())
        return self

    def write(self, polygons: Polygons, table: pa.Table) -> None:
        """Append objects: their polygons, and the rows of the table, in one order."""
        if len(polygons) == 0:
            return
        text, ends = coordinates_text(polygons, self.scale, self.shape)
        geometry = pa.LargeStringArray.from_buffers(
            len(polygons), pa.py_buffer(ends), pa.py_buffer(text)
        )
        ids = polygons.ids.tolist()
        several = np.diff(polygons.parts) > 1
        uuids = pa.array([f"{self._uuid}{one:012x}" for one in ids], pa.large_string())
        names = pa.array([str(one) for one in ids], pa.large_string())
        kinds = pa.array(np.where(several, "MultiPolygon", "Polygon").tolist(), pa.large_string())
        found = [self._classes.get(one, self._class) for one in ids]
        classes = pa.array(found, pa.large_string())
        features = _joined(
            '{"type":"Feature","id":"', uuids, '","geometry":{"type":"', kinds, '","coordinates":',
            geometry, '},"properties":{"objectType":"detection","name":"', names,
            '","classification":', classes, ',"measurements":{', measurements_text(table), "}}}",
        )  # fmt: skip
        joined = pc.binary_join(_one_list(features), pa.scalar(",\n", pa.large_string()))
        self._add(self._between.encode())
        self._add(joined[0].as_buffer())
        self._between = ",\n"

    def _add(self, data: Any) -> None:
        self._file.write(self._gzip.compress(data))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                self._add(b"\n]}\n")
                self._file.write(self._gzip.flush())
        self._whole.__exit__(kind, error, trace)


def _class_texts(told: str) -> dict[int, str]:
    """Classification of each id, from `0 background, 1 tumour` in the table's metadata."""
    found = re.findall(r"(?:^|, )(\d+) (.*?)(?=, \d+ |$)", told)
    return {int(one): json.dumps({"name": name}, ensure_ascii=False) for one, name in found}


def _joined(*parts: Any) -> pa.Array:
    """Texts, row by row, of arrays and constants."""
    typed = [pa.scalar(one, pa.large_string()) if isinstance(one, str) else one for one in parts]
    return pc.binary_join_element_wise(*typed, pa.scalar("", pa.large_string()))


def _one_list(values: pa.Array) -> pa.Array:
    """All values as the one element of a list."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values)


def measurements_text(table: pa.Table) -> pa.Array:
    """`"name":number,...` of each row; what is null or not finite is left out."""
    fields = []
    for name in table.column_names:
        values = table[name].combine_chunks()
        if pa.types.is_boolean(values.type):
            values = values.cast(pa.int8())
        if pa.types.is_floating(values.type):
            values = pc.if_else(pc.is_finite(values), values, None)
        elif not pa.types.is_integer(values.type):
            continue
        key = pa.scalar(f"{json.dumps(name, ensure_ascii=False)}:", pa.large_string())
        nothing = pa.scalar("", pa.large_string())
        text = pc.binary_join_element_wise(key, values.cast(pa.large_string()), nothing)
        fields.append(text)
    comma = pa.scalar(",", pa.large_string())
    return pc.binary_join_element_wise(*fields, comma, null_handling="skip")


def coordinates_text(
    polygons: Polygons, scale: float, shape: tuple[int, int] | None = None
) -> tuple[Array, Array]:
    """The `coordinates` of each object, and where each ends: (B,) uint8, (n + 1,) int64.

    Parameters
    ----------
    shape
        (Y, X) of the full resolution, beyond which the last pixels of the labels may reach.
    """
    power = 1 if float(scale).is_integer() else 10**DECIMALS
    corners = polygons.corners_at(scale, shape)
    numbers = np.rint(corners * power).astype(np.int64)
    longest = len(str(int(numbers.max(initial=1)))) + 1  # with the point
    rings = len(polygons.ends) - 1
    room = (len(numbers) + rings) * (2 * longest + 4) + 8 * rings + 4 * len(polygons)
    text = np.empty(room, np.uint8)
    ends = _write_text(
        *(polygons.parts, polygons.rings, polygons.ends, numbers),
        *(power, np.array([10**k for k in range(18)]), text),
    )
    return text[: ends[-1]], ends


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _write_text(
    parts: Array, rings: Array, ends: Array, numbers: Array, power: int, powers: Array, text: Array
) -> Array:
    """Fill `text`; coordinates are `numbers` / power."""
    found = np.zeros(parts.size, np.int64)
    at = 0
    for one in range(parts.size - 1):
        several = parts[one + 1] - parts[one] > 1
        if several:
            text[at] = 91  # [
            at += 1
        for part in range(parts[one], parts[one + 1]):
            if part > parts[one]:
                text[at] = 44  # ,
                at += 1
            text[at] = 91
            at += 1
            for ring in range(rings[part], rings[part + 1]):
                if ring > rings[part]:
                    text[at] = 44
                    at += 1
                text[at] = 91
                at += 1
                first, end = ends[ring], ends[ring + 1]
                for place in range(first, end + 1):  # the first once more at the end
                    corner = place if place < end else first
                    if place > first:
                        text[at] = 44
                        at += 1
                    text[at] = 91
                    at = _write_number(numbers[corner, 1], power, powers, text, at + 1)
                    text[at] = 44
                    at = _write_number(numbers[corner, 0], power, powers, text, at + 1)
                    text[at] = 93  # ]
                    at += 1
                text[at] = 93
                at += 1
            text[at] = 93
            at += 1
        if several:
            text[at] = 93
            at += 1
        found[one + 1] = at
    return found


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _write_number(number: int, power: int, powers: Array, text: Array, at: int) -> int:
    """Write number / power, which is not below 0, without zeros at its end; where to go on."""
    whole, rest = number // power, number % power
    digits = 1
    while digits < powers.size and whole >= powers[digits]:
        digits += 1
    for digit in range(digits - 1, -1, -1):
        text[at] = 48 + (whole // powers[digit]) % 10
        at += 1
    if rest:
        text[at] = 46  # .
        at += 1
        step = power // 10
        while rest:
            text[at] = 48 + rest // step
            at += 1
            rest %= step
            step //= 10
    return at
