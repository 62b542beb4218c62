"""What `segpipe plan` says of memory and time, against what jobs take.

    python tests/benchmarks/plan.py --size 6144 [--times]

Each line is a job of one worker with other settings: the peak of the worker's memory and of the leading
process's (resident, without pages of files), and how far they are from what was said. Wanted: within
20 %. `--times` compares the estimate by a sample with a whole job of two workers; the sample takes parts
of `--large` images.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile

from segpipe.demo import write_field
from segpipe.plan import JobPlan, plan_job
from segpipe.settings import load_settings
from segpipe.synthetic import NucleiField
from segpipe.usage import Usage, watch

CASES = (
    ("local", ()),
    ("local", ("tile.core=512",)),
    ("local", ("tile.core=2048", "tile.region=4096")),
    ("local", ("tile.region=4096",)),
    ("local", ("infer.batch=4", "tile.core=512")),
    ("local", ("infer.backend=eager",)),
    ("local", ("infer.backend=eager", "tile.core=512")),
    ("serial", ()),
    ("serial", ("tile.core=512",)),
)


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=6144, help="pixels a side")
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--large", type=int, default=16384, help="pixels a side, for --times")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        field = folder / "field.tif"
        write_field(NucleiField((given.size, given.size), seed=5), field)
        print(f"{'job':<44}{'said MB':>9}{'took MB':>9}{'ratio':>7}   (worker; then the leader)")
        for number, (kind, sets) in enumerate(CASES):
            compare(field, folder / f"out{number}", kind, sets)
        stack = folder / "channels.tif"
        write_channels(field, stack, 8)
        compare(stack, folder / "out-channels", "local", ("tile.channel=0", "tile.region=4096"))
        if given.times:
            large = folder / "large.tif"
            write_field(NucleiField((given.large, given.large), seed=6), large)
            compare_times(large, folder / "out-large")


def write_channels(field: Path, path: Path, count: int) -> None:
    """The same plane as several channels of one file."""
    plane = tifffile.imread(field)
    pixels = np.broadcast_to(plane, (count, *plane.shape))
    tifffile.imwrite(path, pixels, metadata={"axes": "CYX"}, tile=(512, 512), ome=True)


def compare(image: Path, out: Path, kind: str, sets: tuple[str, ...]) -> None:
    """A line of what one job was said to take, and what it took."""
    plan = planned(image, kind, 1, sets, sampled=False)
    usage = run(image, out, kind, 1, sets)
    name = " ".join((kind, *sets))
    if kind == "serial":
        pairs = [(plan.client_bytes, usage.peaks_bytes[0])]
    else:
        worker, client = usage.peaks_bytes[:2]
        pairs = [(plan.images[0].worker_bytes, worker), (plan.client_bytes, client)]
    told = "  ".join(
        f"{said / 1e6:>9.0f}{took / 1e6:>9.0f}{took / said:>7.2f}" for said, took in pairs
    )
    print(f"{name:<44}{told}", flush=True)


def compare_times(image: Path, out: Path) -> None:
    """A line of the estimate and of the whole job."""
    plan = planned(image, "local", 2, (), sampled=True)
    usage = run(image, out, "local", 2, ())
    assert plan.seconds is not None and plan.sample is not None
    print(
        f"{'local, 2 workers':<44}{plan.seconds:>7.0f} s{usage.seconds:>7.0f} s"
        f"{usage.seconds / plan.seconds:>7.2f}   (sample: {plan.sample.seconds[1]:.0f} s)"
    )


def planned(
    image: Path, kind: str, workers: int, sets: tuple[str, ...], *, sampled: bool
) -> JobPlan:
    """What `segpipe plan` says."""
    options = {"engine.kind": kind, "engine.workers": workers}
    return plan_job([image], None, load_settings(None, sets, options), sampled=sampled)


def run(image: Path, out: Path, kind: str, workers: int, sets: tuple[str, ...]) -> Usage:
    """The whole job."""
    command = [sys.executable, "-m", "segpipe.cli", "predict", str(image), "-o", str(out)]
    more = [argument for one in sets for argument in ("-s", one)]
    return watch([*command, "--engine", kind, "--workers", str(workers), *more])


if __name__ == "__main__":
    main()
