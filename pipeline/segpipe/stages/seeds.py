"""What growth starts from: probabilities with holes filled, and slots that are looked up in tables.

Slots (in the runs of seeds, in `holes.zarr`) are written before the reduction knows what their numbers
mean; the reduction writes one table per region (`.bin`, with `.offsets`), and readers look up.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.errors import InputError
from segpipe.geometry import Box, Lattice, Region
from segpipe.growth import Field
from segpipe.holes import HoleRecord, fill_holes, label_holes
from segpipe.records import Record, read_arrays
from segpipe.runs import Runs
from segpipe.stages.image import Image
from segpipe.stages.places import remove
from segpipe.stages.stage_run import Pass, StageRun
from segpipe.store import create_array, read_box, write_shard

Array = np.ndarray[Any, np.dtype[Any]]
RUNS = "runs.places"
PLACE = np.dtype([("file", "S128"), ("offset", "<i8")])
"""Where the record of a region's runs lies. A file is named after the machine (64 bytes), process and
chance."""


def probabilities_in(image: Image, box: Box) -> tuple[Array, Array]:
    """Foreground and interior of a box, (h, w) uint8 each; a model without interior repeats itself."""
    outputs = image.model.card.outputs
    names = ("foreground", "interior" if "interior" in outputs else "foreground")
    planes = [outputs.index(name) for name in names]
    foreground, interior = read_box(image.probabilities, box, planes)
    return foreground, interior


def foreground_in(image: Image, box: Box) -> Array:
    """The foreground of a box: (h, w) uint8."""
    plane = image.model.card.outputs.index("foreground")
    foreground: Array = read_box(image.probabilities, box, [plane])[0]
    return foreground


def filled_probabilities(image: Image, box: Box) -> tuple[Array, Array]:
    """As `probabilities_in`; the foreground is certain in holes that are to be filled."""
    foreground, interior = probabilities_in(image, box)
    if image.settings.stitch.max_hole:
        foreground = np.where(looked_up(image, "holes", box) > 0, np.uint8(255), foreground)
    return foreground, interior


def looked_up(image: Image, name: str, window: Box) -> Array:
    """What the slots of `<name>.zarr` mean in a window: (h, w) uint32."""
    folder, lattice = image.work, image.label_lattice
    values = np.empty(window.shape, np.uint32)
    for region in lattice.meeting(window):
        part = region.box.intersect(window)
        table = _table(folder / name, place_of(region, lattice))
        values[part.within(window).slices] = table[read_box(folder / f"{name}.zarr", part)]
    return values


def seeded_field(image: Image, records: Path, window: Box) -> Field:
    """The foreground of a window and the ids of its seeds, from the runs of pass 1.

    Parameters
    ----------
    records
        The folder of that pass.

    Raises
    ------
    SegpipeError
        When they are damaged.
    """
    lattice = image.label_lattice
    field = Field.empty(window.shape)
    for region in lattice.meeting(window):
        place = place_of(region, lattice)
        (found,) = np.fromfile(image.work / RUNS, PLACE, 1, offset=place * PLACE.itemsize)
        file, offset = found.tolist()
        if not file:  # it failed: nothing grows into it
            continue
        runs = Runs.unpack(read_arrays(records, file.decode(), offset, ["runs"])["runs"])
        ids = _table(image.work / "seeds", place)
        runs.paint(ids, region.box.within(window), *field.inner)
    return field


def write_places(path: Path, records: Iterable[Record | None]) -> None:
    """Write where the runs of each region lie, in raster order; no file where a region failed."""
    places = [(b"", 0) if one is None else (one.file.encode(), one.offset) for one in records]
    path.write_bytes(np.array(places, PLACE).tobytes())  # tofile would not tell of a full disk


def _table(path: Path, place: int) -> Array:
    """What each slot of one region means: (n,) uint32."""
    start, end = np.fromfile(path.with_suffix(".offsets"), "<i8", 2, offset=8 * place).tolist()
    return np.fromfile(path.with_suffix(".bin"), "<u4", count=end - start, offset=4 * start)


def write_tables(path: Path, tables: Iterable[Array]) -> None:
    """Write what each slot of an array of slots means, one table per region in raster order."""
    offsets = [0]
    with path.with_suffix(".bin").open("wb") as file:
        for table in tables:
            file.write(table.astype("<u4").tobytes())
            offsets.append(offsets[-1] + len(table))
    path.with_suffix(".offsets").write_bytes(np.array(offsets, "<i8").tobytes())


def checksums(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """crc32 of files: those that are made again when they are not as they were left."""
    found = {}
    for name in names:
        found[name] = 0
        with (folder / name).open("rb") as file:
            while data := file.read(2**20):
                found[name] = zlib.crc32(data, found[name])
    return found


def find_holes(run: StageRun, lattice: Lattice) -> None:
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
    write_tables(image.work / "holes", tables)


def find_holes_in(work: Pass, name: str) -> Record:
    """Holes of one region."""
    image, region = work.image, work.lattice.named(name)
    mask = foreground_in(image, region.box) >= image.decode.foreground
    slots, record = label_holes(mask, region, work.lattice, image.settings.stitch.max_hole)
    shard = write_shard(image.work / "holes.zarr", region.box, slots)
    return work.records.add(name, shard, vars(record))


def place_of(region: Region, lattice: Lattice) -> int:
    """Number of a region in raster order."""
    return region.index[0] * lattice.count[1] + region.index[1]
