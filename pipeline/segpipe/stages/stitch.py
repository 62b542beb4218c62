"""stitch: probabilities become labels with ids 1..N; components.py and growth.py say why it is exact.

    holes        per region: holes of the foreground, if they are to be filled       holes.zarr
    components   per region: its runs, with seeds or what waits for its neighbours   records
    reduce       this process: what the slots of the runs mean                       seeds.bin
    grow-0       per region and halo: ids of seeds, then growth                      labels
    grow-1, ...  the same for regions that a moving front has reached                front/1, ...
    objects      per region: sums, if finished objects may be dropped                kept.npy
    publish      the last states, where the labels do not hold them yet              labels

Passes over holes and seeds are in seeds.py, those of growth and after it in rounds.py. A model whose
outputs are classes has one pass instead of all these, in classes.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from segpipe.components import SeamRecord, label_region
from segpipe.compute import Engine
from segpipe.geometry import Lattice, Region
from segpipe.records import Record, fingerprint, read_json, write_json
from segpipe.seams import merge_seams
from segpipe.stages.classes import label_classes
from segpipe.stages.image import Image, Progress
from segpipe.stages.manifest import Manifest, manifests_before
from segpipe.stages.places import remove
from segpipe.stages.rounds import drop_objects, grow_regions, publish
from segpipe.stages.seeds import (
    RUNS,
    checksums,
    filled_probabilities,
    find_holes,
    write_places,
    write_tables,
)
from segpipe.stages.stage_run import Pass, StageRun
from segpipe.store import LABEL_GROUP, create_labels

Array = np.ndarray[Any, np.dtype[Any]]
SEEDS = ("seeds.bin", "seeds.offsets", RUNS)


def stitch(image: Image, engine: Engine, progress: Progress) -> Manifest:
    """Write the label image (Y, X) uint32: ids 1..N in raster order of first pixels, or classes."""
    before = manifests_before(image, "stitch")["infer"]
    run = StageRun(image, "stitch", engine, progress, before)
    lattice = image.label_lattice
    levels = range(len(image.label_grid.levels))
    labels = [image.zarr / LABEL_GROUP / str(level) for level in levels]
    run.begin(labels, lambda: _create(image))
    if image.model.card.classes:
        return run.finish(label_classes(run, lattice))
    if image.settings.stitch.max_hole:
        find_holes(run, lattice)
    found = run.over("components", label_one, lattice, counts=True)
    index = _reduce(run, lattice, found)
    states = grow_regions(run, lattice)
    first_ids = index["first_ids"]
    if image.settings.stitch.filters and not run.failed:
        first_ids = drop_objects(run, lattice, states, first_ids)
    publish(run, lattice, states)
    rounds = int(states.max()) + 1
    objects = first_ids[-1] - 1
    return run.finish({"objects": objects, "first_ids": first_ids, "growth_rounds": rounds})


def _create(image: Image) -> None:
    for path in (image.zarr / "labels", image.work / "front"):
        remove(path)
    card, size = image.model.card, image.layout.pixel_size_um
    classes = card.outputs if card.classes else ()
    create_labels(
        image.zarr, image.label_grid, pixel_size_um=size, scale=image.scale, classes=classes
    )


def label_one(work: Pass, name: str) -> Record:
    """Pass 1 of one region."""
    image, region = work.image, work.lattice.named(name)
    foreground, interior = filled_probabilities(image, region.box)
    found = label_region(foreground, interior, region, work.lattice, image.decode)
    arrays = {"anchors": found.anchors, "runs": found.runs.pack()} | vars(found.seams)
    return work.records.add(name, None, arrays)


# --- reduce ---------------------------------------------------------------------------------------


def _reduce(run: StageRun, lattice: Lattice, found: dict[str, Record]) -> dict[str, Any]:
    """Join the seams and number the objects: where the runs lie, what their slots mean, and ids.json.

    A region that failed has no components: its neighbours' objects end at it.
    """
    image = run.image
    path = image.work / "ids.json"
    records = run.records("components")
    ordered = [found.get(region.name) for region in lattice]
    places = [None if one is None else [one.file, one.offset] for one in ordered]
    key = [records.fingerprint, run.lineage, fingerprint(places)]
    index = read_json(path)
    if isinstance(index, dict) and index.get("key") == key and _is_whole(image, index):
        return index

    def arrays_of(region: Region, names: Sequence[str]) -> dict[str, Array]:
        if region.name not in found:
            return _nothing(region, lattice)
        return records.payload(found[region.name], names)

    fields = tuple(SeamRecord.__dataclass_fields__)

    def seams_of(region: Region) -> SeamRecord:
        arrays = arrays_of(region, fields)
        return SeamRecord(**{field: arrays[field] for field in fields})

    first_ids = [1]
    bands = merge_seams(
        lattice, seams_of, lambda region: arrays_of(region, ["anchors"])["anchors"], image.decode
    )

    def tables() -> Iterator[Array]:
        for band in bands:
            yield from band.ids
            first_ids.append(band.last_id + 1)

    write_tables(image.work / "seeds", tables())
    write_places(image.work / RUNS, ordered)
    index = {
        "key": key,
        "objects": first_ids[-1] - 1,
        "first_ids": first_ids,
        "files": checksums(image.work, SEEDS),
    }
    write_json(path, index, durable=False)  # lost: the seams are joined again
    return index


def _is_whole(image: Image, index: Mapping[str, Any]) -> bool:
    """Whether the tables are as they were left: they are not waited for to be on disk."""
    try:
        return checksums(image.work, SEEDS) == index.get("files")
    except OSError:
        return False


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
