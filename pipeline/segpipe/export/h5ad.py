"""The table as AnnData (.h5ad), for scanpy and squidpy; written some rows at a time.

    X                 what was measured, (n, measurements) float64; NaN where it is not known
    var               the measurements' names
    obs               which object it is and where: id, centroid, box, flags; its index is the id
    obsm["spatial"]   (n, 2) centroids, (x, y) in pixels
    uns["segpipe"]    image, model, pixel size, what coordinates mean

The file follows anndata's description of its format on disk, version 0.1.0, by h5py alone: `anndata`
itself would hold all objects in memory at once. Tests read it with `anndata`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from segpipe.errors import SettingsError
from segpipe.export.parquet import TableReader
from segpipe.export.partial import written_whole

Array = np.ndarray[Any, np.dtype[Any]]
OBS_PREFIXES = ("id", "centroid_", "bbox_")
"""Columns that say which object it is and where. So do truth values; all else was measured."""
CHUNK_ROWS = 4096


def check_h5ad() -> None:
    """Say what is lacking for this format.

    Raises
    ------
    SettingsError
        When h5py is not installed.
    """
    if find_spec("h5py") is None:
        raise SettingsError(
            "export anndata needs packages that are not installed; "
            "run `pip install 'segpipe[anndata]'`, or leave anndata out of export.formats"
        )


def write_h5ad(path: Path, table: Path) -> None:
    """Write a Parquet table as AnnData.

    Raises
    ------
    SettingsError
        As `check_h5ad`.
    """
    check_h5ad()
    import h5py

    with (
        written_whole(path) as partial,
        TableReader(table) as source,
        h5py.File(partial, "w") as file,
    ):
        schema, rows = source.schema, source.rows
        measured = [field.name for field in schema if _is_measured(field)]
        described = [field.name for field in schema if not _is_measured(field)]
        _encode(file, "anndata", "0.1.0")
        matrix = _dataset(file, "X", (rows, len(measured)), np.float64)
        obs = _frame(file, "obs", described, rows)
        columns = {name: _column(obs, schema.field(name), rows) for name in described}
        var = _frame(file, "var", [], len(measured))
        var["_index"][:] = measured
        spatial = _dataset(_group(file, "obsm"), "spatial", (rows, 2), np.float64)
        for name in ("layers", "obsp", "varm", "varp"):
            _group(file, name)
        _write_texts(_group(_group(file, "uns"), "segpipe"), schema.metadata or {})
        start = 0
        for group in source.batches(8 * CHUNK_ROWS):  # whole chunks, each written once
            end = start + len(group)
            for place, name in enumerate(measured):
                matrix[start:end, place] = _floats(group[name])
            for name, column in columns.items():
                column[start:end] = _values(group[name])
            obs["_index"][start:end] = [str(one) for one in group["id"].to_pylist()]
            for place, axis in enumerate("xy"):
                spatial[start:end, place] = _floats(group[f"centroid_{axis}_px"])
            start = end


def _is_measured(field: pa.Field) -> bool:
    number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
    return number and not field.name.startswith(OBS_PREFIXES)


def _floats(column: pa.ChunkedArray) -> Array:
    """Numbers, NaN where there is none."""
    values: Array = column.cast(pa.float64()).to_numpy()
    return values


def _values(column: pa.ChunkedArray) -> Array:
    values: Array = column.to_numpy()
    return values


def _encode(item: Any, kind: str, version: str) -> None:
    item.attrs["encoding-type"], item.attrs["encoding-version"] = kind, version


def _group(parent: Any, name: str) -> Any:
    group = parent.create_group(name)
    _encode(group, "dict", "0.1.0")
    return group


def _dataset(parent: Any, name: str, shape: tuple[int, ...], dtype: Any) -> Any:
    chunks = (min(shape[0], CHUNK_ROWS), *shape[1:])
    packed = {"chunks": chunks, "compression": "gzip", "compression_opts": 4, "shuffle": True}
    made = parent.create_dataset(name, shape, dtype, **(packed if min(chunks) > 0 else {}))
    _encode(made, "array", "0.2.0")
    return made


def _texts(parent: Any, name: str, rows: int) -> Any:
    import h5py

    made = _dataset(parent, name, (rows,), h5py.string_dtype())
    _encode(made, "string-array", "0.2.0")
    return made


def _frame(file: Any, name: str, columns: list[str], rows: int) -> Any:
    import h5py

    frame = file.create_group(name)
    _encode(frame, "dataframe", "0.2.0")
    frame.attrs["_index"] = "_index"
    frame.attrs.create("column-order", columns, (len(columns),), h5py.string_dtype())
    _texts(frame, "_index", rows)
    return frame


def _column(frame: Any, field: pa.Field, rows: int) -> Any:
    if pa.types.is_integer(field.type) or pa.types.is_floating(field.type):
        return _dataset(frame, field.name, (rows,), field.type.to_pandas_dtype())
    if pa.types.is_boolean(field.type):
        return _dataset(frame, field.name, (rows,), np.bool_)
    return _texts(frame, field.name, rows)


def _write_texts(group: Any, metadata: Mapping[bytes, bytes]) -> None:
    import h5py

    for key, value in metadata.items():
        if not key.startswith(b"ARROW:"):
            one = group.create_dataset(key.decode(), data=value.decode(), dtype=h5py.string_dtype())
            _encode(one, "string", "0.2.0")
