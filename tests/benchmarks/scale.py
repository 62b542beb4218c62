"""stitch and measure over made probabilities of any size: memory of each process, CPU time per pixel.

    python tests/benchmarks/scale.py --gigapixels 0.25 1 4 16 --folder FOLDER

Wanted: memory that does not grow with the image, at most 3 GB a process, and a constant cost per pixel.
Image and probabilities repeat one field of 4096 x 4096 pixels, whose shards are linked and not copied,
so that 16 gigapixels fit a small disk; all that is written (runs, labels, tables) is real. Memory is
the resident set without the pages of files, sampled every fifth of a second, each stage in processes
of its own. CPU seconds are those of all processes of the stage, start included.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from math import sqrt
from pathlib import Path

import numpy as np
from scipy import ndimage

from segpipe.usage import watch

PERIOD = 4096
STAGES = ("stitch", "measure")


class Silent:
    """Told of progress, and says nothing."""

    def advance(self, image: str, stage: str, pixels: int) -> None:
        """So many pixels more are done."""


def made_probabilities(seed: int, empty: float) -> np.ndarray:
    """Foreground and interior of a made field, as a good network would give them: (2, h, w) uint8."""
    from segpipe.synthetic import NucleiField

    field = NucleiField((PERIOD, PERIOD), seed=seed, empty=empty)
    labels = field.labels(field.box)
    apart = labels > 0
    for axis in (0, 1):
        for shift in (-1, 1):
            apart &= labels == np.roll(labels, shift, axis)
    depth = ndimage.distance_transform_edt(apart)
    deepest = ndimage.maximum(depth, labels, np.arange(labels.max() + 1))
    interior = depth / np.maximum(deepest, 1)[labels]
    foreground = ndimage.gaussian_filter((labels > 0).astype(np.float32), 0.7)
    return np.stack([foreground * 255, interior * 255]).astype(np.uint8)


def make(folder: Path, gigapixels: float, empty: float = 0.1) -> None:
    """An OUT in which tile and infer of one image are done, at no cost."""
    from segpipe.records import write_json
    from segpipe.stages.manifest import Manifest, stage_fingerprint
    from segpipe.store import create_array, create_image, disk_usage, shard_path, write_shard

    image = image_of(folder, gigapixels)
    shutil.rmtree(folder / "out", ignore_errors=True)
    image.out.mkdir()
    create_image(
        image.zarr, ["nuclei"], image.grid, np.dtype(np.uint16), pixel_size_um=None, name="x", rgb=False
    )  # fmt: skip
    create_array(image.probabilities, (2,), image.grid, np.dtype(np.uint8))
    probabilities = made_probabilities(7, empty)
    noise = np.random.default_rng(7).normal(0, 60, (1, PERIOD, PERIOD))
    pixels = (400 + 8.0 * probabilities[:1] + noise).astype(np.uint16)
    sources = {}
    before = None
    for region in image.label_lattice:
        y, x = region.box.y0 % PERIOD, region.box.x0 % PERIOD
        height, width = region.box.shape
        for array, planes in ((image.probabilities, probabilities), (image.zarr / "0", pixels)):
            path = shard_path(array, region.box)
            key = array, y, x, height, width
            if key in sources:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(sources[key], path)
            else:
                write_shard(array, region.box, planes[:, y : y + height, x : x + width])
                sources[key] = path
    for stage, facts in (("tile", {"ranges": [[0.0, 1.0]]}), ("infer", {})):
        array = image.array(stage)
        assert array is not None
        known = facts | {"disk": list(disk_usage(array) or ())}
        mark = stage_fingerprint(image, stage, before)
        told = None if before is None else before.token
        before = Manifest(stage, mark, mark, (), known, told)
        before.write(image.manifest_path(stage))
    write_json(folder / "size.json", gigapixels)


def image_of(folder: Path, gigapixels: float):
    """The image, without its pixels."""
    from segpipe.demo import write_field
    from segpipe.inputs import find_inputs
    from segpipe.prepare import prepare
    from segpipe.settings import load_settings
    from segpipe.synthetic import NucleiField

    small = folder / "small.tif"
    if not small.exists():
        write_field(NucleiField((64, 64), seed=1), small)
    options = {"infer.model": "nuclei-fluorescence", "infer.device": "cpu", "tile.region": 2048}
    (folder / "plan").mkdir(exist_ok=True)
    found = find_inputs([small], folder / "plan")
    image = prepare(found, folder / "plan", load_settings(options=options)).images[0]
    side = round(sqrt(gigapixels * 1e9))
    plane = side, side
    layout = replace(
        image.layout,
        shape=(1, *plane),
        full_shape=plane,
        resolution=replace(image.layout.resolution, shape=plane),
    )
    return replace(image, out=folder / "out", layout=layout)


def run_stage(folder: Path, gigapixels: float, stage: str, workers: int) -> None:
    """One stage on a cluster of its own; prints the CPU seconds of all its processes."""
    from importlib import import_module

    from segpipe.compute import open_engine

    image = image_of(folder, gigapixels)
    started = time.perf_counter()
    with open_engine("local", workers, 1) as engine:
        getattr(import_module(f"segpipe.stages.{stage}"), stage)(image, engine, Silent())
    seconds = time.perf_counter() - started
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in spent)
    (folder / f"{stage}.txt").write_text(f"{seconds} {cpu}")


def main() -> None:
    """Make each size, run the stages, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigapixels", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one if not given")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        run_stage(given.folder, given.gigapixels[0], given.stage, given.workers)
        return
    print(f"{'Gpx':>6} {'stage':<8}{'s':>8}{'Mpx/s':>8}{'CPU ns/px':>11}  peak MB of each process")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for gigapixels in given.gigapixels:
            make(folder, gigapixels)
            for stage in STAGES:
                command = [
                    *(sys.executable, __file__, "--gigapixels", str(gigapixels)),
                    *("--workers", str(given.workers), "--folder", str(folder), "--stage", stage),
                ]
                peaks = watch(command).peaks_bytes
                seconds, cpu = map(float, (folder / f"{stage}.txt").read_text().split())
                each = ", ".join(f"{peak / 1e6:.0f}" for peak in peaks if peak > 100e6)
                print(
                    f"{gigapixels:>6g} {stage:<8}{seconds:>8.1f}{gigapixels * 1e3 / seconds:>8.1f}"
                    f"{cpu / gigapixels:>11.1f}  {each}",
                    flush=True,
                )
            used = subprocess.run(["du", "-sm", folder / "out"], capture_output=True, text=True)
            files = sum(len(names) for _, _, names in os.walk(folder / "out"))
            print(f"{gigapixels:>6g} {used.stdout.split()[0]} MB in {files} files, links included")
            shutil.rmtree(folder / "out")


if __name__ == "__main__":
    main()
