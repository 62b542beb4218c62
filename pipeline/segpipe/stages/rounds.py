"""Growth on disk: rounds over regions until nothing moves, and the label image that they leave.

The first round reads the seeds' ids and writes the label image (or, when a filter follows, an array of
its own). Later rounds, which only objects larger than a halo need, write the regions that a moving
front has reached into `front/1`, `front/2`, ...: a region's state is read from the round that wrote it
last, and nothing is changed in place. At the end the last states are published.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.bands import Bands
from segpipe.errors import InputError
from segpipe.geometry import Box, Lattice, Region
from segpipe.growth import grow, reach
from segpipe.properties import ObjectSums, keeps, renumber, sum_region
from segpipe.records import PUBLISH, Record
from segpipe.stages.image import Image
from segpipe.stages.manifest import Manifest, is_whole
from segpipe.stages.places import remove
from segpipe.stages.seeds import foreground_in, place_of, seeded_field
from segpipe.stages.stage_run import Pass, StageRun
from segpipe.store import create_array, read_box, write_shard

Array = np.ndarray[Any, np.dtype[Any]]
PUBLISHING = "publishing"
"""A file beside the records: publishing has begun."""
FINAL = -1
"""In place of a round's number: after all of them."""
LATER_STEPS = 128
"""Steps of the rounds after the first; any number gives the same labels."""


@dataclass(frozen=True)
class GrowArgs:
    """One round of growth."""

    steps: tuple[int, ...]
    halo: int
    target: Path
    round: int
    components: Path
    """Records of the pass that found the runs."""


def grow_regions(run: StageRun, lattice: Lattice) -> Array:
    """Grow until nothing moves; for each region the round that wrote its labels last."""
    image = run.image
    told = image.manifest_path("stitch")
    if told.exists() and not is_whole(image, "stitch", Manifest.read(told)):
        # A finished label image lost a shard: which state it held is not known, so grow again.
        _forget(run, lambda name: name == PUBLISH or name.startswith("grow-"))
    steps, halo = reach(image.decode, image.decode.growth_steps)
    state = np.full(len(lattice), 0, np.int64)  # the round that wrote each region last
    number = 0
    regions: list[Region] = list(lattice)
    while True:
        target = _state_array(image, number)
        args = GrowArgs(steps, halo, target, number, run.records("components").folder)
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
            check=target != image.labels or not (run.folder / PUBLISHING).exists(),
        )
        for region in regions:
            state[place_of(region, lattice)] = number
        moving = [
            Box(*record.facts["moving"]) for record in found.values() if record.facts["moving"]
        ]
        if not moving or run.failed:  # what failed is tried again by the next run
            break
        regions = _reached(moving, lattice, LATER_STEPS)
        steps, halo = (0,) * (len(steps) - 1) + (LATER_STEPS,), LATER_STEPS + 1
        number += 1
    return state


def drop_objects(run: StageRun, lattice: Lattice, states: Array, first_ids: list[int]) -> list[int]:
    """Number the finished objects that stay, in kept.npy by old id; the new first ids of the bands."""
    image, stitch = run.image, run.image.settings.stitch
    _save_states(image, FINAL, states)
    found = run.over("objects", sum_objects, lattice)
    if len(found) < len(lattice):
        raise InputError(f"{image.name}: stitch: {run.failed[-1]['error']}")
    records = run.records("objects")

    def regions_of(row: int) -> Iterator[ObjectSums]:
        regions = (lattice[row, column] for column in range(lattice.count[1]))
        return (ObjectSums.of_rows(records.payload(found[one.name])["rows"]) for one in regions)

    new_ids = np.zeros(first_ids[-1], np.uint32)
    last_ids = [0] * lattice.count[0]
    last_id = 0
    bands = [functools.partial(regions_of, row) for row in range(lattice.count[0])]
    for band, sums in Bands(first_ids, bands):
        rows = sums.rows
        kept = keeps(rows, stitch.max_area, stitch.min_probability)
        new_ids[rows["id"]] = renumber(kept, last_id)
        last_ids[band] = last_id = last_id + int(kept.sum())
    np.save(image.work / "kept.npy", new_ids)
    return [1, *(last + 1 for last in last_ids)]


def sum_objects(work: Pass, name: str) -> Record:
    """Sums over the grown objects in one region."""
    image, box = work.image, work.lattice.named(name).box
    rows = sum_region(_state_in(work, box, FINAL), foreground_in(image, box), box)
    return work.records.add(name, None, {"rows": rows})


def publish(run: StageRun, lattice: Lattice, states: Array) -> None:
    """Copy the last state of the regions that do not hold it yet into the label image."""
    image = run.image
    late = [
        region
        for region in lattice
        if image.settings.stitch.filters or states[place_of(region, lattice)] > 0
    ]
    if late and not run.failed:  # what failed is tried again by the next run
        _save_states(image, FINAL, states)
        (run.folder / PUBLISHING).touch()
        run.over(PUBLISH, publish_one, lattice, regions=late, array=image.labels)


def _save_states(image: Image, number: int, state: Array) -> None:
    """Where round `number`, or FINAL, finds each region's labels: the round that wrote them last."""
    folder = image.work / "front"
    folder.mkdir(exist_ok=True)
    np.save(folder / f"states-{number}.npy", state)


def _create_front(run: StageRun, target: Path) -> None:
    """Make the array of a round anew; the label image is there already."""
    _forget(run, lambda name: name == PUBLISH)
    if target == run.image.labels:
        return
    remove(target)
    create_array(target, (), run.image.label_grid, np.dtype(np.uint32))


def _forget(run: StageRun, goes: Callable[[str], bool]) -> None:
    """Forget what passes have done, publishing among them."""
    run.drop(lambda one: goes(one.pass_name))
    (run.folder / PUBLISHING).unlink(missing_ok=True)


def _reached(moving: Iterable[Box], lattice: Lattice, steps: int) -> list[Region]:
    """Regions that a front moving through these boxes may reach within `steps`."""
    names = {}
    for box in moving:
        for near in lattice.meeting(box.grow(steps)):
            names[near.index] = near
    return [names[index] for index in sorted(names)]


def grow_one(work: Pass, name: str) -> Record:
    """One round of growth in one region."""
    image, region, args = work.image, work.lattice.named(name), work.args
    window = region.box.grow(args.halo).intersect(Box(0, 0, *work.lattice.shape))
    field = seeded_field(image, args.components, window)
    if args.round:
        field.inner[0][...] = _state_in(work, window, args.round)
    core = region.box.within(window)
    moving = grow(field, args.steps, core)
    shard = write_shard(args.target, region.box, field.inner[0][core.slices])
    box = moving.shift(window.y0, window.x0)
    where = [box.y0, box.x0, box.y1, box.x1] if box.area else None
    return work.records.add(name, shard, moving=where)


def _state_in(work: Pass, window: Box, number: int) -> Array:
    """Labels in a window as they were before round `number`."""
    image = work.image
    states = np.load(image.work / "front" / f"states-{number}.npy")
    labels = np.empty(window.shape, np.uint32)
    for region in work.lattice.meeting(window):
        part = region.box.intersect(window)
        labels[part.within(window).slices] = read_box(
            _state_array(image, int(states[place_of(region, work.lattice)])), part
        )
    return labels


def _state_array(image: Image, written_in: int) -> Path:
    """Where a round writes: the first one into the label image itself, unless a filter follows."""
    if written_in == 0:
        return image.work / "grown.zarr" if image.settings.stitch.filters else image.labels
    return image.work / "front" / str(written_in)


def publish_one(work: Pass, name: str) -> Record:
    """Copy the last state of a region into the label image, with new ids if some objects go."""
    image, region = work.image, work.lattice.named(name)
    labels = _state_in(work, region.box, FINAL)
    if image.settings.stitch.filters:
        labels = np.load(image.work / "kept.npy", mmap_mode="r")[labels]
    return work.records.add(name, write_shard(image.labels, region.box, labels))
