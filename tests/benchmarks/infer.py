"""The stage `infer` from file to file, against the bare forwards on the same windows in memory.

    python tests/benchmarks/infer.py --size 4096

Both in one process with one thread, in turns; seconds of CPU, the median of the repeats. What is
paid once per process stands by itself.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from segpipe import load_settings, predict
from segpipe.demo import write_field
from segpipe.geometry import Box, TileGrid
from segpipe.inference import cut_window, normalise
from segpipe.models.modelfile import find_model
from segpipe.segmenter import load_segmenter
from segpipe.settings import Settings
from segpipe.synthetic import NucleiField

IMPORTED_S = time.process_time()


def main() -> None:
    """Make a field, run both in turns, print the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096, help="pixels a side")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("-s", "--set", action="append", default=[], help="a setting")
    given = parser.parse_args()
    fixed = ["engine.kind=serial", "infer.device=cpu", "infer.skip_empty=false"]
    settings = load_settings(None, [*fixed, "infer.model=nuclei-fluorescence", *given.set])
    field = NucleiField((given.size, given.size), seed=5, empty=0.0)
    with tempfile.TemporaryDirectory() as temporary:
        image, out = Path(temporary) / "field.tif", Path(temporary) / "out"
        write_field(field, image)
        predict([image], out, settings, stages=("tile",))
        first = seconds(lambda: predict([image], out, settings, stages=("infer",)))
        forwards, load_s = bare(image, settings)
        bare_s, stage_s = [], []
        for _ in range(given.repeats):
            bare_s.append(seconds(forwards))
            stage_s.append(
                seconds(lambda: predict([image], out, settings, stages=("infer",), restart=True))
            )
            print(f"forwards {bare_s[-1]:.2f} s, infer {stage_s[-1]:.2f} s of CPU", flush=True)
    ratio = statistics.median(whole / floor for whole, floor in zip(stage_s, bare_s, strict=True))
    rate = given.size**2 / 1e6 / statistics.median(stage_s)
    print(f"infer / bare forwards: {ratio:.3f} (to reach: 1.05), {rate:.2f} Mpx per second of CPU")
    once = first - statistics.median(stage_s)
    print(
        f"once per process: import {IMPORTED_S:.1f} s, load {load_s:.1f} s, first run {once:.1f} s"
    )


def seconds(function: Callable[[], object]) -> float:
    """Seconds of CPU that a call takes."""
    started = time.process_time()
    function()
    return time.process_time() - started


def bare(image: Path, settings: Settings) -> tuple[Callable[[], None], float]:
    """A call that runs the network over all windows of the image in memory; seconds to load it."""
    import tifffile

    infer = settings.infer
    started = time.process_time()
    segmenter = load_segmenter(
        find_model(infer.model),
        "cpu",
        threads=infer.threads,
        batch=infer.batch or 1,
        precision=infer.precision,
        backend=infer.backend,
        core_only=True,
    )
    load_s = time.process_time() - started
    pixels = tifffile.imread(image)[np.newaxis]
    shape = pixels.shape[-2:]
    grid = TileGrid(shape, settings.tile.core, segmenter.halo, segmenter.stride)
    whole = Box(0, 0, *shape)
    windows = [normalise(cut_window(pixels, whole, tile)[None], [(0.0, 4000.0)]) for tile in grid]

    def forwards() -> None:
        for window in windows:
            segmenter(window)

    return forwards, load_s


if __name__ == "__main__":
    main()
