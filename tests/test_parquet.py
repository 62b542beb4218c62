"""The table on disk: what it holds is what was written, NaN is null, and pandas is not needed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from segpipe.export.parquet import TableWriter


def columns(count: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    some = random.random(count)
    return {
        "id": np.arange(count, dtype=np.uint32),
        "area": random.integers(-(2**40), 2**40, count),
        "whole": random.random(2 * count)[::2],
        "some": np.where(some < 0.3, np.nan, some),
        "none": np.full(count, np.nan),
        "flag": some < 0.5,
    }


@pytest.mark.parametrize("counts", [(0,), (1,), (9, 0, 17), (1000, 3)])
def test_what_is_read_is_what_was_written(counts, tmp_path):
    batches = [columns(count, seed) for seed, count in enumerate(counts)]
    with TableWriter(tmp_path / "t.parquet", {"unit": "px"}, {"id": "what it is"}) as writer:
        for batch in batches:
            writer.write(batch)
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.schema.metadata[b"unit"] == b"px"
    for name in batches[0]:
        expected = pa.array(np.concatenate([one[name] for one in batches]), from_pandas=True)
        assert table[name].combine_chunks().equals(expected), name
        assert table[name].null_count == expected.null_count


def test_a_write_that_fails_leaves_the_old_table(tmp_path):
    path = tmp_path / "t.parquet"
    with TableWriter(path, {}, {}) as writer:
        writer.write(columns(5, 0))
    before = path.read_bytes()
    with pytest.raises(KeyError), TableWriter(path, {}, {}) as writer:
        writer.write(columns(9, 1))
        raise KeyError
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_pandas_is_not_imported(tmp_path):
    program = f"""
import sys
from pathlib import Path
import numpy as np
from segpipe.export.parquet import TableWriter
with TableWriter(Path({str(tmp_path)!r}) / "t.parquet", {{}}, {{}}) as writer:
    writer.write({{"a": np.array([1, np.nan]), "b": np.array([True, False])}})
sys.exit("pandas" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
