"""What needs a GPU to be known: throughput, and how far its results are from the CPU's.

    python tests/benchmarks/gpu.py --size 8192

Prints, for each precision and batch: Mpx/s of the bare network on windows in memory (the floor),
Mpx/s of `segpipe stage infer` from file to file, and the largest difference of probabilities to the
CPU in float32 on part of the field. Then two runs on the GPU with different regions, whose bytes
must be the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zarr

from segpipe import load_settings, predict
from segpipe.demo import write_field
from segpipe.models.modelfile import find_model
from segpipe.segmenter import Segmenter, load_segmenter
from segpipe.synthetic import NucleiField

MODEL = "nuclei-fluorescence"
WINDOW = 1216


def main() -> None:
    """Run all of it, or say that there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=8192, help="pixels a side")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: nothing was measured")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        field, part = folder / "field.tif", folder / "part.tif"
        write_field(NucleiField((given.size, given.size), seed=5), field)
        write_field(NucleiField((2048, 2048), seed=6), part)
        cpu = probabilities(part, folder / "cpu", "infer.device=cpu", "infer.batch=1")
        for precision in ("float32", "bfloat16", "float16"):
            for batch in (1, 4, 8, 16):
                options = (
                    "infer.device=cuda",
                    f"infer.precision={precision}",
                    f"infer.batch={batch}",
                )
                segmenter = load_segmenter(
                    find_model(MODEL), "cuda", batch=batch, precision=precision
                )
                bare = bare_rate(segmenter, batch)
                out = folder / f"{precision}-{batch}"
                started = time.perf_counter()
                probabilities(field, out / "field", *options)
                whole = given.size**2 / 1e6 / (time.perf_counter() - started)
                gpu = probabilities(part, out / "part", *options)
                apart = np.abs(gpu.astype(int) - cpu).max()
                print(
                    f"{precision:<9} batch {batch:>2}: network {bare:7.1f} Mpx/s, end to end "
                    f"{whole:7.1f} Mpx/s, at most {apart} of 255 from the CPU",
                    flush=True,
                )
        for region in (1024, 4096):
            again = probabilities(
                part, folder / f"region-{region}", "infer.device=cuda", f"tile.region={region}"
            )
            print(f"region {region}: bytes {hash(again.tobytes()):x}")


def bare_rate(segmenter: Segmenter, batch: int) -> float:
    """Useful Mpx/s of the network alone: cores of 1024 in windows of 1216."""
    windows = np.random.default_rng(0).standard_normal((batch, 1, WINDOW, WINDOW), np.float32)
    for _ in range(3):
        segmenter(windows)
    torch.cuda.synchronize()
    started = time.perf_counter()
    times = 10
    for _ in range(times):
        segmenter(windows)
    torch.cuda.synchronize()
    return times * batch * 1024**2 / 1e6 / (time.perf_counter() - started)


def probabilities(image: Path, out: Path, *options: str) -> np.ndarray:
    """(K, Y, X) uint8 of an image that was inferred with these settings."""
    settings = load_settings(None, [f"infer.model={MODEL}", "engine.kind=serial", *options])
    predict([image], out, settings, stages=("tile", "infer"))
    work = out / ".segpipe" / f"{image.stem}.work"
    return zarr.open_array(work / "probabilities.zarr", mode="r")[:]


if __name__ == "__main__":
    main()
