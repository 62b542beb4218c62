"""What a stage cannot do without, measured in memory: the floor that its seconds are compared with.

    tile     read the TIFF by tifffile, write the same pixels as one array of the same shards, chunks
             and compression; no pyramid, no statistics, no waiting for the disk
    infer    the network over the same windows, cut and normalised before; loaded, and called once,
             before
    stitch   scipy.ndimage.label of the foreground, in memory: 4-connected components of one
             threshold, no seeds, no growth, nothing read or written
    measure  numpy.bincount of the labels, weighted by the foreground, in memory: one sum per object

Each is done by as many processes at once as the stage has, each over the same sample of the image, so
that cores that share caches, memory and clock are as busy as in the stage.
"""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np

from segpipe.geometry import Box, Tile
from segpipe.inference import cut_window, normalise, read_box_of
from segpipe.stages.emptiness import skipped_tiles
from segpipe.stages.image import Image
from segpipe.stages.manifest import current_manifests
from segpipe.stages.reading import pixels_in
from segpipe.stages.seeds import probabilities_in
from segpipe.stages.tile import ranges_of
from segpipe.store import Grid, create_array, open_array, read_box

SAMPLE = 4096
"""Pixels a side of the upper left part of the image, over which floors are measured."""
REPEATS = 3
"""Of which the quickest counts; the network runs once."""
WAIT_S = 600

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Floor:
    """Seconds that the whole image would take, on the wall and of all processes' CPU."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class _Work:
    """Something to time, and which part of the image's work it is."""

    run: Callable[[], object]
    part: float
    repeats: int = REPEATS


def measure_floor(stage: str, image: Image, sample: Path, folder: Path, processes: int) -> Floor:
    """The floor of a stage that is done.

    Parameters
    ----------
    sample
        A TIFF of (at most) `SAMPLE` pixels a side, coded as the image is.
    folder
        Where to write what is then thrown away.
    """
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(processes, spawn) as pool:
        barrier = manager.Barrier(processes)
        flying = [
            pool.submit(_timed, stage, image, sample, folder / f"floor-{stage}-{number}", barrier)
            for number in range(processes)
        ]
        timed = [one.result(WAIT_S) for one in flying]
    for target in folder.glob(f"floor-{stage}-*"):
        shutil.rmtree(target)
    wall = statistics.mean(seconds for seconds, _ in timed) / processes
    return Floor(wall, statistics.mean(cpu for _, cpu in timed))


def _timed(
    stage: str, image: Image, sample: Path, target: Path, barrier: Barrier
) -> tuple[float, float]:
    """Seconds, on the wall and of CPU, that one process would need for the whole image."""
    try:
        work = _WORK[stage](image, sample, target)
        barrier.wait(WAIT_S)
    except BaseException:
        barrier.abort()  # else the others would wait
        raise
    walls, cpus = [], []
    for _ in range(work.repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work.run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls) / work.part, min(cpus) / work.part


def _sample_box(image: Image) -> Box:
    return Box(0, 0, *image.layout.plane).intersect(Box(0, 0, SAMPLE, SAMPLE))


def _part(image: Image) -> float:
    height, width = image.layout.plane
    return _sample_box(image).area / (height * width)


def _copy(image: Image, sample: Path, target: Path) -> _Work:
    import tifffile

    grid = Grid.fitting(_sample_box(image).shape, image.region, image.settings.tile.chunk)
    targets = [target / str(number) for number in range(REPEATS)]  # over an old array it is slower
    for one in targets:
        create_array(one, image.layout.shape[:1], grid, np.dtype(image.layout.dtype))

    def run() -> None:
        array = open_array(targets.pop())
        array[...] = tifffile.imread(sample, maxworkers=1).reshape(array.shape)

    return _Work(run, _part(image))


def _forwards(image: Image, _sample: Path, _target: Path) -> _Work:
    from segpipe.stages.infer import segmenter_of

    manifest = current_manifests(image)["tile"]
    empty, ranges = skipped_tiles(image, manifest).either, ranges_of(manifest)
    segmenter = segmenter_of(image)
    tiles = [tile for tile in image.tiles.meeting(_sample_box(image)) if not empty[tile.index]]
    box = read_box_of(image.tiles, _sample_box(image))
    pixels = pixels_in(image, box, image.layout.channels)

    def batch_of(some: list[Tile]) -> Array:
        return normalise(np.stack([cut_window(pixels, box, tile) for tile in some]), ranges)

    size = segmenter.batch
    batches = [batch_of(tiles[start : start + size]) for start in range(0, len(tiles), size)]
    for windows in batches[:1]:  # the first call for a size of windows prepares for it
        segmenter(windows)

    def run() -> None:
        for windows in batches:
            segmenter(windows)

    return _Work(run, len(tiles) / max(1, int((~empty).sum())), repeats=1)


def _label(image: Image, _sample: Path, _target: Path) -> _Work:
    from scipy import ndimage

    foreground, _ = probabilities_in(image, _sample_box(image))
    return _Work(lambda: ndimage.label(foreground >= image.decode.foreground), _part(image))


def _sum(image: Image, _sample: Path, _target: Path) -> _Work:
    foreground, _ = probabilities_in(image, _sample_box(image))
    labels = read_box(image.labels, _sample_box(image))
    return _Work(lambda: np.bincount(labels.ravel(), weights=foreground.ravel()), _part(image))


_WORK: dict[str, Callable[[Image, Path, Path], _Work]] = {
    "tile": _copy,
    "infer": _forwards,
    "stitch": _label,
    "measure": _sum,
}
