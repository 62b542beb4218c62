"""Many small files: rate, peak memory, and what is spent besides network, stitching and pixels.

    python tests/benchmarks/small_files.py --count 1000 --size 256
    python tests/benchmarks/small_files.py --count 1000 --workers 2

With workers, each of which does whole files, the rate is told and what the process that hands them out
spends. Without, the files are done by one process with one image in flight, so that the time between
two events is that of what happens between them. Start and end of the process count separately: they
do not grow with the number of files.

    network    windows: cut, normalised, through the network, cropped, quantised
    stitching  the stage of that name, and sums over objects
    pixels     opening the file to read it, shards read and written (fsync included), statistics over
               all pixels, the picture written as PNG and as JPEG
    metadata   of arrays and groups, written and read; this and what follows count as outside
    picture    colours, outlines, letters
    table      the table of objects
    records    completion records and what they hand on
    the rest   all else: manifests, what is to be done, opening the file to see what is in it
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

KINDS = {
    "network": ["segpipe.inference:predict_region"],
    "stitching": [
        "segpipe.stages.stitch:stitch",
        "segpipe.components:label_region",
        "segpipe.seams:merge_seams",
        "segpipe.growth:grow",
        "segpipe.runs:Runs.paint",
        "segpipe.runs:Runs.pack",
        "segpipe.runs:Runs.unpack",
        "segpipe.properties:measure_region",
        "segpipe.stages.seeds:write_tables",
        "segpipe.stages.seeds:write_places",
    ],
    "pixels": [
        "segpipe.store:read_box",
        "segpipe.store:write_shard",
        "segpipe.store:clear_shard",
        "segpipe.slide:Slide.read",
        "segpipe.percentiles:is_occupied",
        "segpipe.percentiles:keys_of",
        "segpipe.percentiles:Histogram.of",
        "segpipe.percentiles:Histogram.sum",
        "segpipe.occupancy:cell_extremes",
        "segpipe.occupancy:tile_occupancy",
        "segpipe.stages.reading:Reader.slide",
        "segpipe.export.png:write_png",
        "segpipe.export.png:write_jpeg",
    ],
    "metadata": [
        "segpipe.store:create_array",
        "segpipe.store:create_image",
        "segpipe.store:create_labels",
        "segpipe.store:set_contrast",
        "segpipe.store:open_array",
    ],
    "picture": [
        "segpipe.export.drawing:contrast",
        "segpipe.export.preview:compose",
        "segpipe.export.preview:thumbnail_of",
    ],
    "table": [
        "segpipe.export.parquet:TableWriter.write",
        "segpipe.export.parquet:TableWriter.__exit__",
        "segpipe.columns:instance_columns",
        "segpipe.bands:Bands.__iter__",
    ],
    "records": [
        "segpipe.records:write_json",
        "segpipe.records:read_json",
        "segpipe.records:Records.add",
        "segpipe.records:read_records",
        "segpipe.records:read_arrays",
        "segpipe.records:drop_records",
    ],
}
REST = "the rest"
OUTSIDE = ("metadata", "picture", "table", "records", REST)


class Meter:
    """Seconds by kind, of CPU and on the wall; what is inside of another kind counts for the inner
    one alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.passed: dict[str, float] = defaultdict(float)
        self.last = time.process_time(), time.perf_counter()
        self.stack = [REST]

    def switch(self) -> None:
        """Give the time since the last event to what was under way."""
        now = time.process_time(), time.perf_counter()
        self.spent[self.stack[-1]] += now[0] - self.last[0]
        self.passed[self.stack[-1]] += now[1] - self.last[1]
        self.last = now

    def clear(self) -> None:
        """Forget what was measured."""
        self.switch()
        self.spent.clear()
        self.passed.clear()

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time given to `kind`; of a generator, that of each step."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.stack.append(kind)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.stack.pop()

        @functools.wraps(function)
        def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
            made = function(*args, **kwargs)
            step = self.timed(kind, functools.partial(next, made, made))
            while (value := step()) is not made:
                yield value

        return steps if inspect.isgeneratorfunction(function) else run


def wrap(meter: Meter) -> None:
    """Have the functions of KINDS timed, before other modules import them by name."""
    named = [(name, kind) for kind, names in KINDS.items() for name in names]
    for name, kind in sorted(named, key=lambda one: one[0].startswith("segpipe.stages")):
        module, _, path = name.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, last = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        found = inspect.getattr_static(owner, last)
        if isinstance(found, classmethod):
            setattr(owner, last, classmethod(meter.timed(kind, found.__func__)))
        else:
            setattr(owner, last, meter.timed(kind, found))


def by_workers(folder: Path, count: int, workers: int, model: str, device: str) -> None:
    """Print the rate of so many processes, their start apart: that of one file."""
    from segpipe.run import predict
    from segpipe.settings import load_settings

    settings = load_settings(
        options={
            "infer.model": model,
            "engine.kind": "local",
            "engine.workers": workers,
            "infer.device": device,
        }
    )
    seconds, spent = [], []
    first = min(folder.iterdir())
    for number, inputs in enumerate(([first], [first], [folder])):  # the first run imports
        start = time.perf_counter(), time.process_time()
        result = predict(inputs, folder.parent / f"out{number}", settings)
        assert not result.failed
        seconds.append(time.perf_counter() - start[0])
        spent.append(time.process_time() - start[1])
    lasted, own = (both[2] - both[1] for both in (seconds, spent))
    print(f"{count} files by {workers} workers: {(count - 1) / lasted:.2f} files/s")
    print(f"start of the processes, one file included: {seconds[1]:.1f} s")
    print(f"the process that hands them out: {1e3 * own / (count - 1):.1f} ms of CPU a file")


def main() -> None:
    """Make the files, segment them, print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--model", default="nuclei-fluorescence")
    parser.add_argument("--device", default="cpu", help="that infers, with workers")
    parser.add_argument(
        "--workers", type=int, help="processes; without, one that is measured inside"
    )
    given = parser.parse_args()
    from segpipe.demo import write_field
    from segpipe.synthetic import NucleiField

    shape = (given.size, given.size)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "in"
        folder.mkdir()
        for number in range(given.count + 1):
            where = Path(temporary) / "warm.tif" if number == 0 else folder / f"{number:06d}.tif"
            write_field(NucleiField(shape, seed=number), where, tile=256, compression=None)
        if given.workers:
            by_workers(folder, given.count, given.workers, given.model, given.device)
            return
        meter = Meter()
        wrap(meter)
        from segpipe.run import predict
        from segpipe.settings import load_settings

        settings = load_settings(
            options={"infer.model": given.model, "engine.kind": "serial", "infer.device": "cpu"}
        )
        predict([Path(temporary) / "warm.tif"], Path(temporary) / "out-warm", settings)
        start = time.process_time()
        meter.clear()
        result = predict([folder], Path(temporary) / "out", settings)
        meter.switch()
    cpu, wall = sum(meter.spent.values()), sum(meter.passed.values())
    print(f"{given.count} files of {given.size} x {given.size}: {len(result.failed)} failed")
    print(f"start of the process, one file included: {start:.1f} CPU s")
    print(f"{given.count / wall:.2f} files/s by one process, {wall:.1f} s")
    print(f"{'':<12}{'CPU ms a file':>16}{'share':>9}{'wall ms':>10}{'share':>9}")

    def line(name: str, kinds: Sequence[str]) -> None:
        spent, passed = (sum(by[kind] for kind in kinds) for by in (meter.spent, meter.passed))
        print(
            f"{name:<12}{1e3 * spent / given.count:>16.1f}{spent / cpu:>9.1%}"
            f"{1e3 * passed / given.count:>10.1f}{passed / wall:>9.1%}"
        )

    for kind in (*KINDS, REST):
        line(kind, [kind])
    line("outside", OUTSIDE)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak resident memory {peak / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
