"""tile: a file becomes an OME-Zarr with a pyramid; what becomes 0 and 1, and what windows hold."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segpipe import percentiles
from segpipe.compute import Engine
from segpipe.errors import InputError
from segpipe.geometry import Box, Lattice
from segpipe.percentiles import Histogram
from segpipe.records import Record, Records
from segpipe.stages.emptiness import cell_payload, window_occupancy
from segpipe.stages.image import Image, Progress, intensity_range
from segpipe.stages.manifest import Manifest
from segpipe.stages.places import remove
from segpipe.stages.reading import pixels_in, read_coarse, read_working, reader
from segpipe.stages.stage_run import Pass, StageRun
from segpipe.store import create_image, halve_mean, open_array, read_box, set_contrast, write_shard

log = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]
Range = tuple[float, float]


def tile(image: Image, engine: Engine, progress: Progress) -> Manifest:
    """Copy the image region by region, at the working resolution, and make its pyramid; find
    normalisation and occupancy.

    Raises
    ------
    InputError
        When no region can be read.
    """
    run = StageRun(image, "tile", engine, progress)
    lattice = Lattice(image.layout.plane, image.grid.shard)
    finest = image.finest
    arrays = [image.zarr / str(level) for level in range(finest, len(image.grid.levels))]
    run.begin([image.zarr, *arrays], lambda: _create(image))
    array = image.zarr / "0" if image.layout.copied else None
    copied = run.over("tile", copy_region, lattice, array=array, counts=True)
    if array is None:
        coarse = Lattice(image.grid.levels[finest], image.grid.level(finest).shard)
        run.over(f"tile-level{finest}", copy_coarse, coarse, array=image.zarr / str(finest))
    reader().close_slide()
    statistics = _statistics(run, lattice, copied)
    for level in range(finest + 1, len(image.grid.levels)):
        pyramid_level(run, image.zarr, level, halve_mean)
    set_contrast(image.zarr, image.layout.channels, statistics["ranges"])
    return run.finish(
        {
            "shape": image.layout.shape,
            "dtype": image.layout.dtype,
            "pixel_size_um": image.layout.pixel_size_um,
            "full_shape": image.layout.full_shape,
            "scale": image.scale,
            "levels": len(image.grid.levels),
            "copied": image.layout.copied,
            "finest": finest,
            **statistics,
            **window_occupancy(run, lattice, copied, statistics["ranges"]),
        }
    )


def _create(image: Image) -> None:
    remove(image.zarr)
    create_image(
        image.zarr,
        image.layout.channel_names,
        image.grid,
        np.dtype(image.layout.dtype),
        pixel_size_um=image.layout.pixel_size_um,
        scale=image.scale,
        finest=image.finest,
        name=Path(image.name).name,
        rgb=image.layout.rgb,
    )


def copy_region(work: Pass, name: str) -> Record:
    """Read one region of the file, write its shard if it is copied, count its intensities."""
    image, region = work.image, work.lattice.named(name)
    pixels = read_working(reader().slide(image), image.layout.resolution, region.box)
    seen = pixels[list(image.layout.channels)]
    shard = write_shard(image.zarr / "0", region.box, pixels) if image.layout.copied else None
    not_finite = int(np.count_nonzero(~np.isfinite(seen))) if seen.dtype.kind == "f" else 0
    counted = _counted(image)
    payload = _count(image, region.box, seen, percentiles.upper) if counted else {}
    return work.records.add(name, shard, payload | cell_payload(image, seen), not_finite=not_finite)


def copy_coarse(work: Pass, name: str) -> dict[str, Any]:
    """Write one shard of the finest level that OUT holds of an image that is not copied."""
    image, box = work.image, work.lattice.named(name).box
    pixels = read_coarse(image, image.finest, box)
    work.records.add(name, write_shard(image.zarr / str(image.finest), box, pixels))
    return {}


# --- normalisation --------------------------------------------------------------------------------


def _counted(image: Image) -> bool:
    """Whether the model's rule asks for percentiles."""
    chosen = image.settings.infer.normalise
    return chosen is None and image.model.card.normalisation.kind == "percentile"


def _occupied_tiles(image: Image, box: Box, seen: Array) -> Iterator[Array]:
    """The squares (C, h, w) of a core's size in a region that are not constant."""
    for one in Lattice(image.layout.plane, (image.plan.core, image.plan.core)).meeting(box):
        pixels = seen[(slice(None), *one.box.within(box).slices)]
        if percentiles.is_occupied(pixels):
            yield pixels


def _count(image: Image, box: Box, seen: Array, part: Callable[[Array], Array]) -> dict[str, Array]:
    """Histogram of each channel over the occupied tiles of a region, as arrays for a record."""
    parts: list[list[Histogram]] = [[] for _ in seen]
    for pixels in _occupied_tiles(image, box, seen):
        for channel, plane in enumerate(pixels):
            parts[channel].append(Histogram.of(part(percentiles.keys_of(plane))))
    return _pack({str(channel): Histogram.sum(found) for channel, found in enumerate(parts)})


def _pack(histograms: Mapping[str, Histogram]) -> dict[str, Array]:
    packed = {}
    for key, histogram in histograms.items():
        packed[f"{key}.keys"] = histogram.keys.astype(np.uint16)
        packed[f"{key}.counts"] = histogram.counts
    return packed


def _total(records: Records, found: Iterable[Record], key: str) -> Histogram:
    def parts() -> Iterator[Histogram]:
        for record in found:
            keys, counts = records.payload(record, [f"{key}.keys", f"{key}.counts"]).values()
            yield Histogram(keys.astype(np.int64), counts)

    return Histogram.sum(parts())


def _statistics(run: StageRun, lattice: Lattice, copied: Mapping[str, Record]) -> dict[str, Any]:
    """The intensities that become 0 and 1 for each channel the model sees, and what to warn of."""
    image = run.image
    warnings = list(image.layout.warnings)
    not_finite = sum(int(record.facts.get("not_finite", 0)) for record in copied.values())
    if not_finite:
        warnings.append(f"{not_finite} pixels are NaN or infinite; they count as the darkest value")
    rule, chosen = image.model.card.normalisation, image.settings.infer.normalise
    if _counted(image):
        ranges = _percentile_ranges(run, lattice, copied, (rule.low, rule.high))
    else:
        ranges = [chosen or (rule.low, rule.high)] * len(image.layout.channels)
    if all(low == high for low, high in ranges):
        warnings.append("the image is constant: it has no objects")
    for warning in warnings:
        log.warning("%s: %s", image.name, warning)
    return {"ranges": ranges, "not_finite": not_finite, "warnings": warnings}


def _percentile_ranges(
    run: StageRun, lattice: Lattice, copied: Mapping[str, Record], percents: Range
) -> list[Range]:
    """Exact percentiles of each channel."""
    image = run.image
    dtype = np.dtype(image.layout.dtype)
    records = run.records("tile")
    channels = range(len(image.layout.channels))
    first = [_total(records, copied.values(), str(channel)) for channel in channels]
    asked = (*percents, 100.0)
    found = [
        [(0, 0)] * 3
        if histogram.total == 0
        else [histogram.order_statistic(percentiles.rank(q, histogram.total)) for q in asked]
        for histogram in first
    ]
    if dtype.kind == "f":
        wanted = tuple(tuple(sorted({half for half, _ in row})) for row in found)
        second = run.over("tile-fine", count_fine, lattice, wanted)
        if len(second) < len(lattice):
            raise InputError(f"{image.name}: tile: {run.failed[-1]['error']}")
        fine_records = run.records("tile-fine")
        fine = []
        for channel, row in enumerate(found):
            total = first[channel].total
            keys = []
            for q, (half, below) in zip(asked, row, strict=True):
                key = f"{channel}.{wanted[channel].index(half)}"
                lower = _total(fine_records, second.values(), key)
                rank = percentiles.rank(q, total) - below if total else 0
                keys.append((half << 16 | (lower.order_statistic(rank)[0] if total else 0), 0))
            fine.append(keys)
        found = fine
    ranges = []
    for histogram, row in zip(first, found, strict=True):
        low, high, top = (percentiles.value_of(key, dtype) for key, _ in row)
        if histogram.total == 0:
            low, high, top = 0.0, 0.0, 0.0
        ranges.append(intensity_range(low, high, top))
    return ranges


def count_fine(work: Pass, name: str) -> Record:
    """Second pass over floats: count the lower halves of the keys that matter."""
    image, region = work.image, work.lattice.named(name)
    seen = pixels_in(image, region.box, image.layout.channels)
    totals: dict[str, list[Histogram]] = {}
    for pixels in _occupied_tiles(image, region.box, seen):
        for channel, plane in enumerate(pixels):
            lower = percentiles.lower(percentiles.keys_of(plane), work.args[channel])
            for place, histogram in enumerate(lower):
                totals.setdefault(f"{channel}.{place}", []).append(histogram)
    for channel, wanted in enumerate(work.args):
        for place in range(len(wanted)):
            totals.setdefault(f"{channel}.{place}", [])
    return work.records.add(
        name, None, _pack({key: Histogram.sum(parts) for key, parts in totals.items()})
    )


# --- pyramids -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LevelArgs:
    """One level of a pyramid: made from the level above it."""

    array: Path
    level: int
    halve: Callable[[Array], Array]


def pyramid_level(
    run: StageRun, array: Path, level: int, halve: Callable[[Array], Array]
) -> dict[str, Record]:
    """Write one level of the pyramid at `array`, a task per shard, so that a shard has one writer."""
    target = array / str(level)
    opened = open_array(target)
    height, width = opened.shape[-2:]
    shards = (opened.shards or opened.chunks)[-2:]
    lattice = Lattice((height, width), (shards[0], shards[1]))
    args = LevelArgs(array, level, halve)
    return run.over(f"{run.stage}-level{level}", halve_region, lattice, args, array=target)


def halve_region(work: Pass, name: str) -> Record:
    """Write one shard of a pyramid level."""
    args, box = work.args, work.lattice.named(name).box
    above = args.array / str(args.level - 1)
    height, width = open_array(above).shape[-2:]
    fine = Box(2 * box.y0, 2 * box.x0, min(2 * box.y1, height), min(2 * box.x1, width))
    shard = write_shard(args.array / str(args.level), box, args.halve(read_box(above, fine)))
    return work.records.add(name, shard)


def ranges_of(manifest: Manifest) -> list[Range]:
    """The normalisation that `tile` found, from its manifest."""
    ranges: Sequence[Sequence[float]] = manifest.facts["ranges"]
    return [(low, high) for low, high in ranges]
