"""Each stage over a made field: seconds, Mpx/s, and the peak memory of every process.

    python tests/benchmarks/stages.py --size 20000 --workers 2 --folder FOLDER

Stages are commands of their own, so that one's peak does not hide another's. Memory is the resident
set, sampled every fifth of a second, without the pages of files that the kernel keeps.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from segpipe.demo import write_field
from segpipe.synthetic import NucleiField

STAGES = ("tile", "infer", "stitch", "measure")


def main() -> None:
    """Make the field, run the stages, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096, help="pixels a side")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one if not given")
    parser.add_argument("--model", default="nuclei-fluorescence")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        field = folder / "in" / f"field-{given.size}.tif"
        if not field.exists():
            write_field(NucleiField((given.size, given.size), seed=5), field)
        print(f"{'stage':<9}{'seconds':>9}{'Mpx/s':>9}  peak MB of each process (all at once)")
        for stage in STAGES:
            command = [
                *(sys.executable, "-m", "segpipe.cli", "stage", stage, str(field)),
                *("-o", str(folder / "out"), "-m", given.model),
                *("--engine", "local", "--workers", str(given.workers)),
            ]
            seconds, peaks, together = watch(command)
            rate = given.size**2 / 1e6 / seconds
            each = ", ".join(f"{peak / 1e6:.0f}" for peak in peaks)
            print(
                f"{stage:<9}{seconds:>9.1f}{rate:>9.2f}  {each} ({together / 1e6:.0f})", flush=True
            )


def watch(command: list[str]) -> tuple[float, list[int], int]:
    """Seconds, the peak of each process in bytes, and the peak of their sum."""
    started = time.perf_counter()
    process = psutil.Popen(command)
    peaks: dict[int, int] = {}
    together = 0
    while process.poll() is None:
        now = 0
        try:
            family = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        for one in family:
            try:
                memory = one.memory_info()
            except psutil.Error:
                continue
            used = memory.rss - memory.shared
            peaks[one.pid] = max(peaks.get(one.pid, 0), used)
            now += used
        together = max(together, now)
        time.sleep(0.2)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - started, sorted(peaks.values(), reverse=True), together


if __name__ == "__main__":
    main()
