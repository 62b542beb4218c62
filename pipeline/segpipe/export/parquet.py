"""The InstanceTable as Parquet, written and read batch by batch in flat memory.

However the rows come in batches, the file is the same: row groups are cut by number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.errors import SegpipeError
from segpipe.whole_file import replacing

Array = np.ndarray[Any, np.dtype[Any]]
GROUP_ROWS = 2**16
"""Rows of a row group."""
FEW_ROWS = 2**9
"""A table of at most so many is not compressed: of 30 rows that takes .4 ms, and all else .6."""


class TableWriter:
    """Writes columns in batches; the file appears under its name when all is written.

    Parameters
    ----------
    metadata
        Of the table.
    descriptions
        What columns say, by name: their metadata.

    Raises
    ------
    SegpipeError
        When the file cannot be written.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, str], descriptions: Mapping[str, str]
    ) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self.descriptions = descriptions
        self._schema: pa.Schema | None = None
        self._waiting: list[pa.RecordBatch] = []
        self._partial = path
        self._held = ExitStack()
        self._writer: pq.ParquetWriter | None = None

    def write(self, columns: Mapping[str, Array]) -> None:
        """Append rows, NaN as null; the first batch, which may be empty, decides the schema."""
        arrays = [_arrow(one) for one in columns.values()]
        if self._schema is None:
            self._schema = self._described(list(columns), arrays)
        self._waiting.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        while sum(len(batch) for batch in self._waiting) >= GROUP_ROWS:
            table = pa.Table.from_batches(self._waiting)
            self._write(table.slice(0, GROUP_ROWS))
            self._waiting = table.slice(GROUP_ROWS).to_batches()

    def _described(self, names: Sequence[str], arrays: Sequence[pa.Array]) -> pa.Schema:
        fields = [
            pa.field(name, array.type, metadata={"description": self.descriptions.get(name, "")})
            for name, array in zip(names, arrays, strict=True)
        ]
        return pa.schema(fields, self.metadata)

    def _write(self, table: pa.Table) -> None:
        """Append a row group; the first one, by its size, decides on compression."""
        if self._writer is None:
            # Hardly a number occurs twice: dictionaries take a quarter more space, and three times
            # as long.
            coding: dict[str, Any] = {"compression": "none", "use_dictionary": False}
            if len(table) > FEW_ROWS:
                floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
                coding |= {"compression": "zstd", "compression_level": 1}
                coding |= {"use_byte_stream_split": floats}
            try:
                self._writer = pq.ParquetWriter(self._partial, table.schema, **coding)
            except OSError as error:
                why = error.strerror or error
                raise SegpipeError(f"cannot write {self.path}: {why}") from error
        self._writer.write_table(table, GROUP_ROWS)

    def __enter__(self) -> TableWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self._held.enter_context(replacing(self.path, durable=False))
        self._held.push(self._finish)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.__exit__(kind, error, trace)

    def _finish(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if kind is None and self._waiting:
            self._write(pa.Table.from_batches(self._waiting))
        if self._writer is not None:
            self._writer.close()


class TableReader:
    """Reads rows a few at a time; close it after use.

    How many come at once is the reader's choice: row groups follow the regions in which the table was
    made, and what is written from them must not.
    """

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        self._group = 0
        self._rows = self._file.schema_arrow.empty_table()

    @property
    def schema(self) -> pa.Schema:
        """Columns, and the table's metadata."""
        return self._file.schema_arrow

    @property
    def rows(self) -> int:
        """Of the whole table."""
        return int(self._file.metadata.num_rows)

    def take(self, count: int) -> pa.Table:
        """The next rows, fewer at the end."""
        parts, have = [self._rows], len(self._rows)
        while have < count and self._group < self._file.num_row_groups:
            parts.append(self._file.read_row_group(self._group))
            have += len(parts[-1])
            self._group += 1
        rows = pa.concat_tables(parts)
        self._rows = rows.slice(count)
        return rows.slice(0, count).combine_chunks()

    def batches(self, count: int) -> Iterator[pa.Table]:
        """All rows that are left, so many at once."""
        while len(rows := self.take(count)):
            yield rows

    def __enter__(self) -> TableReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _arrow(values: Array) -> pa.Array:
    """A column; NaN becomes null.

    Not `pa.array`, which imports pandas where it is installed: half a second of CPU per process.
    """
    present, bits = None, values
    if values.dtype.kind == "f" and np.isnan(values).any():
        present = pa.py_buffer(np.packbits(~np.isnan(values), bitorder="little"))
    if values.dtype.kind == "b":
        bits = np.packbits(values, bitorder="little")
    buffers = [present, pa.py_buffer(np.ascontiguousarray(bits))]
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), buffers)
