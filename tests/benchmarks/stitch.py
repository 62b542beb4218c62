"""stitch with all its reading and writing against connected components of the same array in memory.

    python tests/benchmarks/stitch.py

Both on one core, in CPU seconds of one run; wanted: 40 Mpx/s or more. cc3d labels one threshold of
one plane and nothing else: it is a floor, not a peer. The field has the foreground of a slide (9 %) or
of a dense mosaic (18 %).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cc3d
import numpy as np
from scale import Silent, image_of, make

from segpipe.compute import SerialEngine
from segpipe.geometry import Box
from segpipe.stages.image import STAGES, Image
from segpipe.stages.manifest import forget
from segpipe.stages.measure import measure
from segpipe.stages.stitch import stitch
from segpipe.store import read_box


def cpu_seconds(function: Callable[[], object], times: int = 3) -> float:
    """The least of several runs."""
    spent = []
    for _ in range(times):
        started = time.process_time()
        function()
        spent.append(time.process_time() - started)
    return min(spent)


def run_anew(image: Image, stage: str, run: Callable[..., object]) -> None:
    """Run the stage as if it had not been run."""
    forget(image.out, image.name, STAGES[STAGES.index(stage) :])
    run(image, SerialEngine(1), Silent())


def main() -> None:
    """Print rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigapixels", type=float, default=0.067)
    given = parser.parse_args()
    print(f"{'foreground':>10}{'what':>9}{'CPU s':>8}{'Mpx/s':>8}{'of cc3d':>9}")
    for empty in (0.62, 0.1):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            make(folder, given.gigapixels, empty=empty)
            image = image_of(folder, given.gigapixels)
            height, width = image.layout.plane
            foreground = read_box(image.probabilities, Box(0, 0, height, width), [0])[0]
            mask = foreground >= image.decode.foreground
            share = mask.mean()
            label = cpu_seconds(
                lambda mask=mask: cc3d.connected_components(
                    mask, connectivity=4, out_dtype=np.uint32
                )
            )
            lines = [("cc3d", label)]
            for stage, run in (("stitch", stitch), ("measure", measure)):
                lines.append((stage, cpu_seconds(partial(run_anew, image, stage, run))))
            for what, seconds in lines:
                rate = height * width / 1e6 / seconds
                print(f"{share:>10.1%}{what:>9}{seconds:>8.2f}{rate:>8.1f}{label / seconds:>9.2f}")


if __name__ == "__main__":
    main()
