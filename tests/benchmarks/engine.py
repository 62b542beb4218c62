"""What Dask costs: regions that only sleep, through the engine that all stages use.

    python tests/benchmarks/engine.py

First, efficiency: the time that sleeping alone would take over what it took, for 1, 2, 4 and 8 workers
and regions of several lengths. Beside it the same for plain processes that sleep as often, with no
scheduler: what the machine itself allows just then. Then a plan of 25,000 regions of no work at all:
milliseconds of a region, memory of the process with client and scheduler as it goes on.

(Not named after Dask: a script's folder is on the path of what it imports.)
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from segpipe import load_settings
from segpipe.compute import LocalEngine
from segpipe.demo import write_field
from segpipe.geometry import Lattice
from segpipe.inputs import find_inputs
from segpipe.prepare import prepare
from segpipe.records import Records
from segpipe.stages.stage_run import Pass
from segpipe.synthetic import NucleiField


def nap(job: tuple[Pass, float], region: str) -> dict[str, Any]:
    """A region of no work: it takes its time, and hands back what a region does."""
    time.sleep(job[1])
    return {}


def naps(seconds: float, times: int) -> None:
    """As many naps in a process of its own."""
    for _ in range(times):
        time.sleep(seconds)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--naps", type=float, nargs="+", default=[1.0, 0.2, 0.05], metavar="SECONDS"
    )
    parser.add_argument("--seconds", type=float, default=10, help="of each line of the first table")
    parser.add_argument("--regions", type=int, default=25_000, help="of the second table")
    given = parser.parse_args()
    job = real_job()
    print(f"a task carries {len(pickle.dumps(job)):,} bytes of job")
    print(
        f"\n{'workers':>7}{'region s':>10}{'regions':>9}{'of ideal':>10}{'of plain processes':>20}"
    )
    for workers in given.workers:
        engine = LocalEngine(workers)
        try:
            list(engine.run(nap, (job, 0.1), names(4 * workers)))  # all have imported it
            for seconds in given.naps:
                each = max(2, round(given.seconds / seconds))
                started = time.perf_counter()
                done = list(engine.run(nap, (job, seconds), names(workers * each)))
                took = time.perf_counter() - started
                assert len(done) == workers * each
                plain = plain_seconds(workers, seconds, each)
                print(
                    f"{workers:>7}{seconds:>10.2f}{workers * each:>9}"
                    f"{100 * each * seconds / took:>9.1f}%{100 * plain / took:>19.1f}%",
                    flush=True,
                )
        finally:
            engine.close()
    long_plan(job, given.regions)


def names(count: int) -> list[str]:
    """Names of so many regions."""
    return [f"0_{number}" for number in range(count)]


def real_job() -> Pass:
    """What a stage hands to its tasks: an image with settings, model and records."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_field(NucleiField((64, 64)), folder / "in" / "field.tif")
        settings = load_settings(None, [], {"infer.model": "nuclei-fluorescence"})
        image = prepare(find_inputs([folder / "in"], folder / "out"), folder / "out", settings)
        return Pass(
            image.images[0],
            Records(folder, "pass", "fingerprint"),
            Lattice((64, 64), (64, 64)),
            None,
        )


def plain_seconds(workers: int, seconds: float, times: int) -> float:
    """How long the naps take without a scheduler."""
    pool = [
        multiprocessing.get_context("fork").Process(target=naps, args=(seconds, times))
        for _ in range(workers)
    ]
    started = time.perf_counter()
    for one in pool:
        one.start()
    for one in pool:
        one.join()
    return time.perf_counter() - started


def long_plan(job: Pass, regions: int) -> None:
    """Many regions of no work: time of each, and what client and scheduler hold."""
    engine = LocalEngine(2)
    here = psutil.Process()
    workers = [one for one in here.children(recursive=True) if "spawn" in " ".join(one.cmdline())]
    try:
        list(engine.run(nap, (job, 0.0), names(100)))
        print(
            f"\n{regions:,} regions of no work on 2 workers\n{'regions':>9}{'ms each':>9}"
            f"{'CPU ms each':>13}{'client and scheduler MB':>25}{'largest worker MB':>19}"
        )
        started = last = time.perf_counter()
        cpu = cpu_seconds(here)
        for done, _ in enumerate(engine.run(nap, (job, 0.0), names(regions)), start=1):
            if done % max(1, regions // 10) == 0:
                now, spent = time.perf_counter(), cpu_seconds(here)
                of_workers = max(one.memory_info().rss for one in workers)
                step = max(1, regions // 10) / 1000
                print(
                    f"{done:>9,}{(now - last) / step:>9.2f}{(spent - cpu) / step:>13.2f}"
                    f"{here.memory_info().rss / 1e6:>25.1f}{of_workers / 1e6:>19.1f}",
                    flush=True,
                )
                last, cpu = now, spent
        print(f"{(time.perf_counter() - started) / regions * 1000:.2f} ms a region in the mean")
    finally:
        engine.close()


def cpu_seconds(process: psutil.Process) -> float:
    """User and system, of the process alone."""
    times = process.cpu_times()
    return times.user + times.system


if __name__ == "__main__":
    main()
