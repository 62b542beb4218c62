"""The table as CSV: the same columns and rows; what is not known is empty."""

from __future__ import annotations

from pathlib import Path

import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from segpipe.export.partial import written_whole


def write_csv(path: Path, table: Path) -> None:
    """Write a Parquet table as CSV, row group by row group."""
    with written_whole(path) as partial, pq.ParquetFile(table) as source:
        options = pa_csv.WriteOptions(quoting_style="needed")
        with pa_csv.CSVWriter(partial, source.schema_arrow, write_options=options) as writer:
            for group in range(source.num_row_groups):
                writer.write_table(source.read_row_group(group))
