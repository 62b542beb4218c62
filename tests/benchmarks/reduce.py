"""The reduction of stitch over records of many objects: time, and memory of its one process.

    python tests/benchmarks/reduce.py --objects 1e8 --folder FOLDER

The records are made: regions of 2048 x 2048 pixels with 4,000 objects each, of which as many cross
each seam as in a field of nuclei of 20 pixels; both sides of a seam agree. They are read through
records and written as tables as `segpipe stage stitch` does. Wanted: 4 GB at most, minutes.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from math import ceil, sqrt
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from segpipe.components import Decode, SeamRecord
from segpipe.geometry import Lattice, Region
from segpipe.records import Records
from segpipe.runs import Runs
from segpipe.stages import stitch

CELL = 2048
OBJECTS = 4000
CROSSING = 60
"""Objects on each side of a region that cross its seam."""


def seam(lattice: Lattice, across: str, index: tuple[int, int]) -> np.ndarray:
    """The objects on one seam, the same seen from either side: (CELL,) int32, -1 outside."""
    line = np.full(CELL, -1, np.int32)
    rng = np.random.default_rng([across == "x", *index])
    starts = np.sort(rng.choice(CELL // 30, CROSSING, replace=False)) * 30
    for number, start in enumerate(starts):
        line[start : start + 20] = number
    return line


def record_of(region: Region, lattice: Lattice) -> dict[str, np.ndarray]:
    """What a region hands on. An object on a seam is one node of level 1 with one of level 0 in it,
    which is on the seam's line too."""
    row, column = region.index
    rows, columns = lattice.count
    seams = {
        "top": ("y", (row, column), row > 0),
        "left": ("x", (row, column), column > 0),
        "bottom": ("y", (row + 1, column), row + 1 < rows),
        "right": ("x", (row, column + 1), column + 1 < columns),
    }
    edges, nodes = {}, 0
    for name, (across, index, there) in seams.items():
        line = seam(lattice, across, index) if there else np.empty(0, np.int32)
        edges[name] = np.where(line >= 0, line + nodes, -1).astype(np.int32)
        nodes += CROSSING if there else 0
    rng = np.random.default_rng([7, row, column])
    first = region.box.y0 * lattice.shape[1] + region.box.x0
    places = rng.choice(CELL * CELL, OBJECTS + nodes, replace=False)
    anchors = first + places // CELL * lattice.shape[1] + places % CELL
    # Nodes 0..n of level 0, each in node n + itself of level 1.
    level = np.repeat(np.array([0, 1], np.uint8), nodes)
    seams_of = SeamRecord(
        level,
        np.concatenate([anchors[OBJECTS:], anchors[OBJECTS:] - 1]),
        np.repeat(np.array([60, 200], np.int64), nodes),
        np.concatenate([np.arange(nodes, 2 * nodes), np.full(nodes, -1)]).astype(np.int32),
        np.repeat(np.array([False, True]), nodes),
        **edges,
    )
    none = np.empty(0, np.uint8)
    runs = Runs(np.zeros(CELL + 1, np.int64), none, none, none, np.empty(0, np.uint32))
    return {"anchors": np.sort(anchors[:OBJECTS]), "runs": runs.pack()} | vars(seams_of)


def main() -> None:
    """Write the records, reduce them, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=float, default=1e7)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one if not given")
    given = parser.parse_args()
    side = ceil(sqrt(given.objects / OBJECTS))
    lattice = Lattice((side * CELL, side * CELL), (CELL, CELL))
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)) / "reduce"
        shutil.rmtree(folder, ignore_errors=True)
        records = Records(folder / "records", "components", "made")
        records.folder.mkdir(parents=True)
        found = {
            region.name: records.add(region.name, None, record_of(region, lattice))
            for region in lattice
        }
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        image = SimpleNamespace(work=folder, decode=Decode(128, (128,), 10, (0,), 16))
        run = SimpleNamespace(image=image, records=lambda _: records, lineage="")
        started = time.perf_counter()
        cpu = time.process_time()
        index = stitch._reduce(run, lattice, found)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        shutil.rmtree(folder)
    print(
        f"{index['objects']:,} objects of {side}^2 regions: {seconds:.0f} s, {cpu:.0f} CPU s, peak "
        f"{peak / 1e6:.2f} GB (before the reduction {before / 1e6:.2f} GB)"
    )


if __name__ == "__main__":
    main()
