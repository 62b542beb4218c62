"""How long a job will take: parts of its images, cut out and segmented by real runs of `predict`.

Two runs, of a small and of a larger part, tell what starting takes and what each pixel takes; both
pass through the processes, files and settings that the job will have.
"""

from __future__ import annotations

import functools
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from segpipe.errors import InputError, SegpipeError
from segpipe.footprint import DECODED_WHOLE, Processes
from segpipe.geometry import Box, Lattice
from segpipe.models.modelfile import read_card
from segpipe.report import read_entries
from segpipe.results import counted
from segpipe.settings import Settings
from segpipe.slide import open_slide
from segpipe.stages.image import Image
from segpipe.stages.reading import read_working
from segpipe.store import Grid, create_image, write_shard
from segpipe.usage import Usage, watch, why_it_ended

OPERATIONS = 4e12
"""Floating-point operations of the network for each process in the larger run: seconds to a minute."""
MOST_TILES = 64
MOST_IMAGES = 40
SMALLEST = 1 / 8
"""The smaller run's share of the larger one."""


@dataclass(frozen=True)
class Sample:
    """What two runs took.

    pixels, seconds
        Of the smaller and of the larger run.
    reading_seconds_per_pixel
        Of the images themselves, by one process: the runs read copies.
    usage
        Of the larger one.
    disk_bytes, results_bytes
        What the larger one left on disk, with its work files and without.
    regions
        Of the larger one.
    objects
        That it found; of a model of classes, none are counted.
    """

    pixels: tuple[int, int]
    seconds: tuple[float, float]
    reading_seconds_per_pixel: float
    usage: Usage
    disk_bytes: int
    results_bytes: int
    regions: int
    objects: int = 0

    @property
    def start_seconds(self) -> float:
        """What a job takes without any pixels."""
        return max(0.0, self.seconds[0] - self.pixels[0] * self.seconds_per_pixel)

    @property
    def seconds_per_pixel(self) -> float:
        """Of the larger run beyond the smaller one."""
        pixels = self.pixels[1] - self.pixels[0]
        if pixels <= 0:  # nothing but one part: all of it counts
            return self.seconds[1] / self.pixels[1]
        return max(0.0, self.seconds[1] - self.seconds[0]) / pixels

    def job_seconds(self, pixels: int, regions: int, workers: int) -> float:
        """An estimate for a whole job, which may keep more workers busy than the sample did."""
        busy = min(workers, regions)
        each = self.seconds_per_pixel * min(workers, self.regions)
        return self.start_seconds + (each + self.reading_seconds_per_pixel) * pixels / busy


def take_sample(
    images: Sequence[Image],
    settings: Settings,
    processes: Processes,
    folder: Path,
    told: Callable[[str], None],
) -> Sample | None:
    """Cut parts out of the images and run `predict` over them; None when none can be read.

    Parameters
    ----------
    folder
        Where to work; the caller removes it.
    told
        Called with what is under way.

    Raises
    ------
    SegpipeError
        When a run over them fails.
    """
    (folder / "in").mkdir()
    parts: list[tuple[Image, Box]] = []
    paths: list[Path] = []
    reading: list[float] = []
    for image, box in choose_parts(images, processes):
        path = folder / "in" / f"{len(parts):03d}.ome.zarr"
        try:
            reading.append(_cut(image, box, path))
        except InputError as error:
            told(f"sample: {image.name} is left out: {error}")
            shutil.rmtree(path)
            continue
        parts.append((image, box))
        paths.append(path)
    if not parts:
        return None
    areas = [box.area for _, box in parts]
    told(f"sample: {sum(areas) / 1e6:.1f} Mpx of {counted(len(parts), 'image')}")
    few = max(1, int(SMALLEST * len(parts)))
    first, pixels = paths[:few], sum(areas[:few])
    if len(parts) == 1:
        image, box = parts[0][0], _inner(*parts[0])
        first, pixels = [folder / "small.ome.zarr"], box.area
        _cut(image, box, first[0])
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(_settings_of_parts(parts[0][0], settings, processes)))
    usages = []
    for name, inputs in (("first", first), ("second", paths)):
        told(f"sample: {name} of two runs")
        usages.append(_run(inputs, folder / name, config, folder / f"{name}.log"))
    disk = _size(folder / "second")
    return Sample(
        pixels=(pixels, sum(areas)),
        seconds=(usages[0].seconds, usages[1].seconds),
        reading_seconds_per_pixel=float(np.average(reading, weights=areas)),
        usage=usages[1],
        disk_bytes=disk,
        results_bytes=disk - _size(folder / "second" / ".segpipe"),
        regions=sum(region_count(image, box.shape) for image, box in parts),
        objects=_objects(folder / "second"),
    )


def choose_parts(images: Sequence[Image], processes: Processes) -> list[tuple[Image, Box]]:
    """Images spread over the job, and the middle of each, a whole number of cores as far as it goes.

    Bounded by arithmetic: a large network gets fewer tiles.
    """
    operations = window_operations(images[0])
    workers = max(processes.workers, processes.gpus)
    tiles = int(min(MOST_TILES, max(1, OPERATIONS * workers / operations)))
    count = min(len(images), MOST_IMAGES, tiles)
    chosen = [images[number * len(images) // count] for number in range(count)]
    each = max(1, tiles // count)
    return [(image, _middle(image, each)) for image in chosen]


def _middle(image: Image, tiles: int) -> Box:
    """So many tiles, or fewer, around the middle of an image."""
    rows, columns = image.tiles.lattice.count
    height = max(1, min(rows, math.isqrt(tiles)))
    width = max(1, min(columns, tiles // height))
    height = max(1, min(rows, tiles // width))
    y, x = (rows - height) // 2, (columns - width) // 2
    first = image.tiles[y, x].core
    last = image.tiles[y + height - 1, x + width - 1].keep
    return Box(first.y0, first.x0, last.y1, last.x1)


def _inner(image: Image, box: Box) -> Box:
    """The smaller part of a part: some of its rows of tiles, or columns where there is one row."""
    height, width = box.shape
    core = image.tiles.core_shape
    if height > core[0]:
        return Box(
            box.y0, box.x0, box.y0 + max(1, int(SMALLEST * height / core[0])) * core[0], box.x1
        )
    if width > core[1]:
        return Box(
            box.y0, box.x0, box.y1, box.x0 + max(1, int(SMALLEST * width / core[1])) * core[1]
        )
    return Box(box.y0, box.x0, box.y0 + math.ceil(SMALLEST * height), box.x1)


def window_operations(image: Image) -> int:
    """Floating-point operations of the network for one window of this image."""
    model = image.model
    return image.plan.calls * _operations(
        model.path, model.hash, image.tiles.window_shape, model.halo
    )


@functools.lru_cache(maxsize=256)
def _operations(path: Path, _hash: str, window: tuple[int, int], halo: int) -> int:
    from segpipe.models.cost import count_operations  # torch: seconds

    return count_operations(read_card(path), window, halo)


def region_count(image: Image, shape: tuple[int, int]) -> int:
    """Regions of an image of this shape, in the stages that take longest."""
    return math.prod(-(-size // image.region) for size in shape)


def _cut(image: Image, box: Box, path: Path) -> float:
    """Write part of an image as an OME-Zarr of its own; the seconds that reading a pixel took."""
    layout = image.layout
    grid = Grid.fitting(box.shape, image.region, image.settings.tile.chunk)
    dtype = np.dtype(layout.dtype)
    create_image(
        path,
        layout.channel_names,
        grid,
        dtype,
        pixel_size_um=layout.pixel_size_um,
        name=path.name,
        rgb=layout.rgb,
        scale=image.scale,
    )
    seconds = 0.0
    with open_slide(image.source, image.plane) as slide:
        for region in Lattice(box.shape, grid.shard):
            started = time.perf_counter()
            place = region.box.shift(box.y0, box.x0)
            pixels = read_working(slide, layout.resolution, place)
            seconds += time.perf_counter() - started
            write_shard(path / "0", region.box, pixels)
    whole = image.source.suffix.lower() in DECODED_WHOLE
    return seconds / (math.prod(layout.plane) if whole else box.area)


def _settings_of_parts(image: Image, settings: Settings, processes: Processes) -> dict[str, Any]:
    """The job's settings for parts that are files of one plane."""
    tree = settings.model_dump(mode="json")
    tree["tile"] |= dict.fromkeys(("z", "t", "scene", "pages"))
    tree["tile"] |= {
        "region": image.region,
        "scale": 1.0,
        "diameter": None,
        "mask": None,
        "copy": "always" if image.layout.copied else "never",
    }  # they are at scale
    tree["infer"] |= {"batch": image.plan.batch, "backend": image.plan.backend}
    tree["engine"] |= {"kind": processes.kind, "workers": processes.workers}
    return tree


def _run(inputs: Sequence[Path], out: Path, config: Path, log: Path) -> Usage:
    command = [sys.executable, "-m", "segpipe.cli", "predict", *map(str, inputs)]
    try:
        return watch([*command, "-o", str(out), "-c", str(config)], log=log)
    except subprocess.CalledProcessError as error:
        raise SegpipeError(
            f"the sample failed with exit code {error.returncode}; it said: {why_it_ended(log)}"
        ) from error


def _objects(out: Path) -> int:
    entries = read_entries(out).values()
    return sum(one["objects"] or 0 for one in entries if not one.get("classes"))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
