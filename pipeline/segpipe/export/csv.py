"""The table as CSV: the same columns and rows; what is not known is empty."""

from __future__ import annotations

from pathlib import Path

import pyarrow.csv as pa_csv

from segpipe.export.parquet import TableReader
from segpipe.export.partial import written_whole

ROWS = 2**15


def write_csv(path: Path, table: Path) -> None:
    """Write a Parquet table as CSV, some rows at a time."""
    with written_whole(path) as partial, TableReader(table) as source:
        options = pa_csv.WriteOptions(quoting_style="needed")
        with pa_csv.CSVWriter(partial, source.schema, write_options=options) as writer:
            for rows in source.batches(ROWS):
                writer.write_table(rows)
