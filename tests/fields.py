"""Small made inputs, and `predict` with sizes so small that they are many tiles and regions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr

from segpipe.demo import write_field
from segpipe.run import RunResult, predict
from segpipe.settings import load_settings
from segpipe.synthetic import NucleiField

CORE = 128
SMALL = 32
SIZES = (
    f"tile.chunk={SMALL}",
    f"tile.core={CORE}",
    f"tile.region={CORE}",
    "measure.preview=false",
)


def nuclei(path: Path, shape: tuple[int, int], seed: int = 1) -> Path:
    """A field of nuclei as TIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_field(NucleiField(shape, seed=seed, empty=0.0), path, tile=64)
    return path


def run(image: Path, out: Path, *settings: str, **more: object) -> RunResult:
    """`predict` with small sizes; later settings win."""
    return predict(
        [image], out, load_settings(None, [*SIZES, "engine.kind=serial", *settings]), **more
    )


def labels_of(out: Path, name: str) -> np.ndarray:
    """The label image."""
    return zarr.open_array(out / f"{name}.ome.zarr" / "labels" / "instances" / "0", mode="r")[:]


def table_of(out: Path, name: str) -> pa.Table:
    """The table."""
    return pq.read_table(out / f"{name}.parquet")
