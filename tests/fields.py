"""Small made inputs, a small made model, and `predict` with sizes at which they are many regions."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zarr

from segpipe.demo import write_field
from segpipe.models.card import parse_card
from segpipe.models.modelfile import write_model
from segpipe.models.network import build_network
from segpipe.run import RunResult, predict
from segpipe.settings import load_settings
from segpipe.stages.image import STAGES
from segpipe.synthetic import NucleiField

CORE = 64
SMALL = 32


def nuclei(path: Path, shape: tuple[int, int], seed: int = 1) -> Path:
    """A field of nuclei as TIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_field(NucleiField(shape, seed=seed, empty=0.0), path, tile=64)
    return path


@cache
def threshold_model(pixel_size_um: float | None = None, diameter_px: float | None = None) -> Path:
    """A U-Net of depth 1 whose weights are set by hand: foreground is what is bright, interior what
    is bright after a blur. Fast, and its objects are many, of all sizes, touching, across seams."""
    parameters = {"width": 2, "depth": 1, "padding": "same", "norm": "none"}
    fields = {
        "name": "threshold",
        "architecture": {"name": "unet", "parameters": parameters},
        "channels": ["nuclei"],
        "outputs": ["foreground", "interior"],
        "normalisation": {"kind": "percentile", "low": 1, "high": 99.8},
        "licence": "CC0-1.0",
        "training_data": "none: its weights are set by hand",
        "pixel_size_um": pixel_size_um,
        "object_diameter_px": diameter_px,
    }
    card = parse_card(fields, "fields")
    network = build_network(*card.network_arguments)
    state = {key: torch.zeros_like(value) for key, value in network.state_dict().items()}
    for block in ("encoder.0.0", "encoder.0.1", "decoder.0.0", "decoder.0.1"):
        weight = state[f"{block}.conv.weight"]
        weight[0, 0, 1, 1] = 1  # the pixel itself
        weight[1, 1 if weight.shape[1] > 1 else 0] = 1 / 9  # a mean of 3 x 3, again and again
    state["head.weight"][0, 0] = 30.0
    state["head.weight"][1, 1] = 12.0
    state["head.bias"][:] = torch.tensor([-7.0, -5.0])
    network.load_state_dict(state)
    folder = Path(tempfile.mkdtemp(prefix="segpipe-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write_model(folder / "threshold.safetensors", network, card)
    return folder / "threshold.safetensors"


SIZES = (
    f"tile.chunk={SMALL}",
    f"tile.core={CORE}",
    f"tile.region={CORE * 2}",
    "measure.preview=false",
    f"infer.model={threshold_model()}",
)


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


RESULTS = (".parquet", ".png", ".gz", ".geoparquet", ".csv", ".h5ad", ".tif")


def same_results(ours: Path, theirs: Path) -> None:
    """All that a run leaves as results is the same, byte for byte, and so are the manifests' tokens."""
    found = []
    for out in (ours, theirs):
        files = [path for path in out.rglob("*") if path.is_file()]
        inside = {path.relative_to(out): path for path in files if ".segpipe" not in path.parts}
        results = {
            name: path.read_bytes()
            for name, path in inside.items()
            if ".ome.zarr" in str(name) or path.suffix in RESULTS
        }
        tokens = {
            name: json.loads(path.read_text(errors="surrogateescape"))["token"]
            for name, path in inside.items()
            if name.parts[0] == "manifests" and name.name.split(".")[-2] in STAGES
        }
        assert results and tokens
        found.append(results | tokens)
    assert found[0].keys() == found[1].keys()
    different = [str(name) for name in found[0] if found[0][name] != found[1][name]]
    assert not different
