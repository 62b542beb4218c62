"""stitch: probabilities become labels with ids 1..N; components.py and growth.py say why it is exact.

components   per region: seeds of the region, or what waits for its neighbours   seeds.zarr
reduce       this process: ids                                                   ids.bin
grow-0       per region and halo: ids of seeds, then growth                      labels
grow-1, ...  the same for regions that a moving front has reached                front/1, ...
publish      their last state                                                    labels
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.components import SeamRecord, label_region, merge_seams
from segpipe.compute import Engine
from segpipe.errors import InputError
from segpipe.geometry import Box, Lattice, Region
from segpipe.growth import grow, is_moving, reach
from segpipe.holes import HoleRecord, fill_holes, label_holes
from segpipe.properties import bands_of_rows, keeps, renumber, sum_region
from segpipe.records import Record, read_json, write_json
from segpipe.stages.image import Image, Manifest, Progress, is_whole, manifest_before, remove
from segpipe.stages.stage_run import Pass, StageRun
from segpipe.store import LABEL_GROUP, create_array, create_labels, read_box, write_shard

Array = np.ndarray[Any, np.dtype[Any]]
FINAL = -1
"""In place of a round's number: after all of them."""
LATER_STEPS = 128
"""Steps of the rounds after the first; any number gives the same labels."""


def stitch(image: Image, engine: Engine, progress: Progress) -> Manifest:
    """Write the label image (Y, X) uint32, ids 1..N in raster order of first pixels."""
    run = StageRun(image, "stitch", engine, progress, manifest_before(image, "stitch"))
    lattice = image.label_lattice
    levels = range(len(image.label_grid.levels))
    labels = [image.zarr / LABEL_GROUP / str(level) for level in levels]
    run.begin([*labels, image.work / "seeds.zarr"], lambda: _create(image))
    if image.settings.stitch.max_hole:
        _find_holes(run, lattice)
    found = run.over(
        "components",
        label_one,
        lattice,
        array=image.work / "seeds.zarr",
        counts=True,
    )
    index = _reduce(run, lattice, found)
    states = _grow(run, lattice)
    first_ids = index["first_ids"]
    if image.settings.stitch.filters and not run.failed:
        first_ids = _filter(run, lattice, states, first_ids)
    _publish(run, lattice, states)
    rounds = int(states.max()) + 1
    objects = first_ids[-1] - 1
    return run.finish({"objects": objects, "first_ids": first_ids, "growth_rounds": rounds})


def _create(image: Image) -> None:
    for path in (image.zarr / "labels", image.work / "seeds.zarr", image.work / "front"):
        remove(path)
    create_labels(image.zarr, image.label_grid, pixel_size_um=image.layout.pixel_size_um)
    create_array(image.work / "seeds.zarr", (), image.label_grid, np.dtype(np.uint32))


def probabilities_in(image: Image, box: Box) -> tuple[Array, Array]:
    """Foreground and interior of a box, (h, w) uint8 each; a model without interior repeats itself."""
    outputs = image.model.card.outputs
    names = ("foreground", "interior" if "interior" in outputs else "foreground")
    planes = [outputs.index(name) for name in names]
    foreground, interior = read_box(image.probabilities, box, planes)
    return foreground, interior


def label_one(work: Pass, name: str) -> dict[str, Any]:
    """Pass 1 of one region."""
    image, region = work.image, work.lattice.named(name)
    levels = image.decode.seed_levels(*_filled_probabilities(image, region.box))
    found = label_region(levels, region, work.lattice, image.decode)
    shard = write_shard(image.work / "seeds.zarr", region.box, found.slots)
    work.records.add(name, shard, {"anchors": found.anchors} | vars(found.seams))
    return {}


# --- reduce ---------------------------------------------------------------------------------------


def _reduce(run: StageRun, lattice: Lattice, found: dict[str, Record]) -> dict[str, Any]:
    """Join the seams and number the objects: the tables of the slots in seeds.zarr, and ids.json.

    A region that failed has no components: its neighbours' objects end at it.
    """
    image = run.image
    path = image.work / "ids.json"
    records = run.records("components")
    key = [records.fingerprint, run.lineage]
    index = read_json(path)
    if isinstance(index, dict) and index.get("key") == key:
        return index

    def arrays_of(region: Region) -> dict[str, Array]:
        if region.name not in found:
            return _nothing(region, lattice)
        return records.payload(found[region.name])

    def seams_of(region: Region) -> SeamRecord:
        arrays = arrays_of(region)
        return SeamRecord(**{field: arrays[field] for field in SeamRecord.__dataclass_fields__})

    first_ids = [1]
    bands = merge_seams(
        lattice, seams_of, lambda region: arrays_of(region)["anchors"], image.decode
    )

    def tables() -> Iterator[Array]:
        for band in bands:
            yield from band.ids
            first_ids.append(band.last_id + 1)

    _write_tables(image.work / "seeds", tables())
    index = {"key": key, "objects": first_ids[-1] - 1, "first_ids": first_ids}
    write_json(path, index)
    return index


def _nothing(region: Region, lattice: Lattice) -> dict[str, Array]:
    none = np.empty(0, np.int64)
    arrays = dict.fromkeys(["anchors", *SeamRecord.__dataclass_fields__], none)
    height, width = region.box.shape
    box, shape = region.box, lattice.shape
    edges = {
        "top": width if box.y0 > 0 else 0,
        "left": height if box.x0 > 0 else 0,
        "bottom": width if box.y1 < shape[0] else 0,
        "right": height if box.x1 < shape[1] else 0,
    }
    return (
        arrays
        | {"level": none.astype(np.uint8), "large_child": none.astype(bool)}
        | {edge: np.full(length, -1, np.int32) for edge, length in edges.items()}
    )


def _write_tables(path: Path, tables: Iterable[Array]) -> None:
    """Write what each slot of an array of slots means, one table per region in raster order."""
    offsets = [0]
    with path.with_suffix(".bin").open("wb") as file:
        for table in tables:
            file.write(table.astype("<u4").tobytes())
            offsets.append(offsets[-1] + len(table))
        file.flush()
        os.fsync(file.fileno())
    np.save(path.with_suffix(".npy"), np.asarray(offsets, np.int64))


def _looked_up(image: Image, name: str, window: Box) -> Array:
    """What the slots of `<name>.zarr` mean in a window: (h, w) uint32."""
    folder, lattice = image.work, image.label_lattice
    offsets = np.load(folder / f"{name}.npy")
    values = np.empty(window.shape, np.uint32)
    for region in lattice.meeting(window):
        part = region.box.intersect(window)
        place = _place(region, lattice)
        start, end = offsets[place], offsets[place + 1]
        table = np.fromfile(folder / f"{name}.bin", "<u4", count=end - start, offset=4 * start)
        values[part.within(window).slices] = table[read_box(folder / f"{name}.zarr", part)]
    return values


# --- holes ----------------------------------------------------------------------------------------


def _find_holes(run: StageRun, lattice: Lattice) -> None:
    """Which pixels are in holes of the foreground that are to be filled: holes.zarr and its tables."""
    image = run.image
    path = image.work / "holes.zarr"

    def prepare() -> None:
        remove(path)
        create_array(path, (), image.label_grid, np.dtype(np.uint32))

    found = run.over("holes", find_holes_in, lattice, array=path, prepare=prepare)
    if len(found) < len(lattice):  # a hole there could not be told from the outside
        raise InputError(f"{image.name}: stitch: {run.failed[-1]['error']}")
    records = run.records("holes")

    def record_of(region: Region) -> HoleRecord:
        return HoleRecord(**records.payload(found[region.name]))

    tables = fill_holes(lattice, record_of, image.settings.stitch.max_hole)
    _write_tables(image.work / "holes", tables)


def find_holes_in(work: Pass, name: str) -> dict[str, Any]:
    """Holes of one region."""
    image, region = work.image, work.lattice.named(name)
    foreground, _ = probabilities_in(image, region.box)
    mask = foreground >= image.decode.foreground
    slots, record = label_holes(mask, region, work.lattice, image.settings.stitch.max_hole)
    shard = write_shard(image.work / "holes.zarr", region.box, slots)
    work.records.add(name, shard, vars(record))
    return {}


def _filled_probabilities(image: Image, box: Box) -> tuple[Array, Array]:
    """As `probabilities_in`; the foreground is certain in holes that are to be filled."""
    foreground, interior = probabilities_in(image, box)
    if image.settings.stitch.max_hole:
        foreground = np.where(_looked_up(image, "holes", box) > 0, np.uint8(255), foreground)
    return foreground, interior


# --- growth ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GrowArgs:
    """One round of growth."""

    steps: tuple[int, ...]
    halo: int
    target: Path
    round: int


def _grow(run: StageRun, lattice: Lattice) -> Array:
    """Grow until nothing moves; for each region the round that wrote its labels last."""
    image = run.image
    published = run.folder / "publish"
    if image.manifest_path("stitch").exists() and not is_whole(image, "stitch"):
        # A finished label image lost a shard: which state it held is not known, so grow again.
        for old in (published, *run.folder.glob("grow-*")):
            remove(old)
    steps, halo = reach(image.decode, image.decode.growth_steps)
    state = np.full(len(lattice), 0, np.int64)  # the round that wrote each region last
    number = 0
    regions: list[Region] = list(lattice)
    while True:
        target = _state_array(image, number)
        args = GrowArgs(steps, halo, target, number)
        if number:
            _save_states(image, number, state)
        found = run.over(
            f"grow-{number}",
            grow_one,
            lattice,
            args,
            regions=regions,
            prepare=lambda target=target: _create_front(run, target),  # type: ignore[misc]
            array=target,
            # Once publishing has begun, labels hold later states than those of round 0.
            check=number > 0 or not published.exists(),
        )
        for region in regions:
            state[_place(region, lattice)] = number
        moving = [lattice.named(name) for name, record in found.items() if record.facts["moving"]]
        if not moving or run.failed:  # what failed is tried again by the next run
            break
        regions = _reached(moving, lattice, LATER_STEPS)
        steps, halo = (0,) * (len(steps) - 1) + (LATER_STEPS,), LATER_STEPS + 1
        number += 1
    return state


def _filter(run: StageRun, lattice: Lattice, states: Array, first_ids: list[int]) -> list[int]:
    """Number the finished objects that stay, in kept.npy by old id; the new first ids of the bands."""
    image, stitch = run.image, run.image.settings.stitch
    _save_states(image, FINAL, states)
    found = run.over("objects", sum_objects, lattice)
    if len(found) < len(lattice):
        raise InputError(f"{image.name}: stitch: {run.failed[-1]['error']}")
    records = run.records("objects")

    def rows_of(row: int) -> Array:
        regions = [lattice[row, column] for column in range(lattice.count[1])]
        return np.concatenate([records.payload(found[one.name])["rows"] for one in regions])

    new_ids = np.zeros(first_ids[-1], np.uint32)
    new_firsts = [1]
    rows_of_band = [functools.partial(rows_of, row) for row in range(lattice.count[0])]
    for rows in bands_of_rows(first_ids, rows_of_band):
        kept = keeps(rows, stitch.max_area, stitch.min_probability)
        new_ids[rows["id"]] = renumber(kept, new_firsts[-1] - 1)
        new_firsts.append(new_firsts[-1] + int(kept.sum()))
    np.save(image.work / "kept.npy", new_ids)
    return new_firsts


def sum_objects(work: Pass, name: str) -> dict[str, Any]:
    """Sums over the grown objects in one region."""
    image, box = work.image, work.lattice.named(name).box
    foreground, _ = probabilities_in(image, box)
    rows = sum_region(_state_in(work, box, FINAL), foreground, box)
    work.records.add(name, None, {"rows": rows})
    return {}


def _publish(run: StageRun, lattice: Lattice, states: Array) -> None:
    """Copy the last state of the regions that do not hold it yet into the label image."""
    image = run.image
    late = [
        region
        for region in lattice
        if image.settings.stitch.filters or states[_place(region, lattice)] > 0
    ]
    if late and not run.failed:  # what failed is tried again by the next run
        _save_states(image, FINAL, states)
        run.over("publish", publish_one, lattice, regions=late, array=image.labels)


def _place(region: Region, lattice: Lattice) -> int:
    return region.index[0] * lattice.count[1] + region.index[1]


def _save_states(image: Image, number: int, state: Array) -> None:
    """Where round `number`, or FINAL, finds each region's labels: the round that wrote them last."""
    folder = image.work / "front"
    folder.mkdir(exist_ok=True)
    np.save(folder / f"states-{number}.npy", state)


def _create_front(run: StageRun, target: Path) -> None:
    """Make the array of a round anew; the label image is there already."""
    if target == run.image.labels:
        remove(run.folder / "publish")
        return
    remove(target)
    create_array(target, (), run.image.label_grid, np.dtype(np.uint32))


def _reached(moving: Iterable[Region], lattice: Lattice, steps: int) -> list[Region]:
    """Regions that a front moving through `moving` may reach within `steps`."""
    names = {}
    for region in moving:
        for near in lattice.meeting(region.box.grow(steps)):
            names[near.index] = near
    return [names[index] for index in sorted(names)]


def grow_one(work: Pass, name: str) -> dict[str, Any]:
    """One round of growth in one region."""
    image, region, args = work.image, work.lattice.named(name), work.args
    window = region.box.grow(args.halo).intersect(Box(0, 0, *work.lattice.shape))
    levels = image.decode.growth_levels(*_filled_probabilities(image, window))
    labels = (
        _looked_up(image, "seeds", window)
        if args.round == 0
        else _state_in(work, window, args.round)
    )
    grown = grow(labels, levels, args.steps)
    core = region.box.within(window)
    shard = write_shard(args.target, region.box, grown[core.slices])
    work.records.add(name, shard, moving=is_moving(grown, levels, core))
    return {}


def _state_in(work: Pass, window: Box, number: int) -> Array:
    """Labels in a window as they were before round `number`."""
    image = work.image
    states = np.load(image.work / "front" / f"states-{number}.npy")
    labels = np.empty(window.shape, np.uint32)
    for region in work.lattice.meeting(window):
        part = region.box.intersect(window)
        labels[part.within(window).slices] = read_box(
            _state_array(image, int(states[_place(region, work.lattice)])), part
        )
    return labels


def _state_array(image: Image, written_in: int) -> Path:
    """Where a round writes: the first one into the label image itself, unless a filter follows."""
    if written_in == 0:
        return image.work / "grown.zarr" if image.settings.stitch.filters else image.labels
    return image.work / "front" / str(written_in)


def publish_one(work: Pass, name: str) -> dict[str, Any]:
    """Copy the last state of a region into the label image, with new ids if some objects go."""
    image, region = work.image, work.lattice.named(name)
    labels = _state_in(work, region.box, FINAL)
    if image.settings.stitch.filters:
        labels = np.load(image.work / "kept.npy", mmap_mode="r")[labels]
    work.records.add(name, write_shard(image.labels, region.box, labels))
    return {}
