"""Many small files: rate, peak memory, and what is spent besides network, stitching and pixels.

    python tests/benchmarks/small_files.py --count 1000 --size 256

The files are done by one process with one image in flight, so that the CPU time between two events is
that of what happens between them. Start and end of the process count separately: they do not grow
with the number of files.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = {
    "network": ["segpipe.segmenter:Segmenter.__call__"],
    "stitching": [
        "segpipe.components:label_region",
        "segpipe.seams:merge_seams",
        "segpipe.growth:grow",
        "segpipe.runs:Runs.paint",
        "segpipe.properties:sum_region",
    ],
    "pixels": [
        "segpipe.slide:open_slide",
        "segpipe.store:create_array",
        "segpipe.store:create_image",
        "segpipe.store:create_labels",
        "segpipe.store:read_box",
        "segpipe.store:write_shard",
        "segpipe.inference:normalise",
        "segpipe.percentiles:keys_of",
        "segpipe.export.preview:compose",
        "segpipe.export.preview:write_png",
    ],
}


class Meter:
    """CPU seconds by kind; what is inside of another kind counts for the inner one alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.last = time.process_time()
        self.stack = ["the rest"]

    def switch(self) -> None:
        """Give the time since the last event to what was under way."""
        now = time.process_time()
        self.spent[self.stack[-1]] += now - self.last
        self.last = now

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time given to `kind`."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.stack.append(kind)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch()
                self.stack.pop()

        return run


def wrap(meter: Meter) -> None:
    """Have the functions of KINDS timed, before other modules import them by name."""
    for kind, names in KINDS.items():
        for name in names:
            module, _, path = name.partition(":")
            owner: Any = importlib.import_module(module)
            *outer, last = path.split(".")
            for part in outer:
                owner = getattr(owner, part)
            setattr(owner, last, meter.timed(kind, getattr(owner, last)))


def main() -> None:
    """Make the files, segment them, print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--model", default="nuclei-fluorescence")
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
        meter = Meter()
        wrap(meter)
        from segpipe.run import predict
        from segpipe.settings import load_settings

        settings = load_settings(
            options={"infer.model": given.model, "engine.kind": "serial", "infer.device": "cpu"}
        )
        predict([Path(temporary) / "warm.tif"], Path(temporary) / "out-warm", settings)
        meter.switch()
        start = meter.last
        meter.spent.clear()
        began = time.perf_counter()
        result = predict([folder], Path(temporary) / "out", settings)
        seconds = time.perf_counter() - began
        meter.switch()
    total = sum(meter.spent.values())
    print(f"{given.count} files of {given.size} x {given.size}: {len(result.failed)} failed")
    print(f"start of the process, one file included: {start:.1f} CPU s")
    print(f"{given.count / seconds:.2f} files/s by one process, {seconds:.1f} s")
    for kind in (*KINDS, "the rest"):
        spent = meter.spent[kind]
        print(
            f"{kind:<12}{1e3 * spent / given.count:8.1f} CPU ms a file {100 * spent / total:6.1f} %"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak resident memory {peak / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
