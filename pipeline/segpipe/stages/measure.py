"""measure: coarser labels, the table of instances, and the picture that a person looks at first."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from segpipe import seam_sums
from segpipe.columns import INTENSITY, SHAPE
from segpipe.compute import Engine
from segpipe.geometry import Box, Lattice
from segpipe.intensities import largest_of, unit_of
from segpipe.perimeters import MARGIN
from segpipe.properties import Features, measure_region, plane_sums
from segpipe.records import Record
from segpipe.stages.classes import certainty_in
from segpipe.stages.exports import make_exports
from segpipe.stages.image import Image, Progress, image_facts
from segpipe.stages.manifest import Manifest, current_manifests, has_results, manifests_before
from segpipe.stages.picture import write_preview
from segpipe.stages.reading import pixels_in
from segpipe.stages.stage_run import Pass, StageRun
from segpipe.stages.table import Told, write_table
from segpipe.stages.tile import pyramid_level
from segpipe.store import LABEL_GROUP, halve_nearest, read_box

log = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]


def measure(image: Image, engine: Engine, progress: Progress) -> Manifest:
    """Write the label pyramid, `<name>.parquet` and `<name>.png`; and the exports asked for.

    Where only exports are lacking, only they are made.
    """
    manifest = current_manifests(image).get("measure")
    preview = image.settings.measure.preview
    whole = has_results(image.out, image.name, preview=preview)
    if manifest is None or manifest.failed or not whole:
        manifest = _measure(image, engine, progress)
    else:
        height, width = image.layout.plane
        progress.advance(image.name, "measure", height * width)
    if manifest.failed:
        return manifest
    digest = image.digests.get("measure")
    return make_exports(image.out, image.name, image.settings.export, engine, digest)


def _measure(image: Image, engine: Engine, progress: Progress) -> Manifest:
    """The label pyramid, the table and the picture."""
    told = manifests_before(image, "measure")
    before = told["stitch"]
    run = StageRun(image, "measure", engine, progress, before)
    lattice = image.label_lattice
    run.begin([], lambda: None)
    units = _units(run, lattice)
    found = run.over("sums", sum_one, lattice, units, counts=True)
    for level in range(1, len(image.label_grid.levels)):
        pyramid_level(run, image.zarr / LABEL_GROUP, level, halve_nearest)
    sums = Told(seam_sums.ObjectDistances(seam_lattices_of(image)), image.mask is not None)
    busiest = write_table(run, found, before, units, sums)
    if image.settings.measure.preview:
        write_preview(image, told["tile"], before, busiest)
    return run.finish(
        {
            "objects": before.facts["objects"],
            "seam_check": _check_seams(run, lattice, found, sums.distances),
            "sizes": sums.sizes.to_json(),
            "looked_at_px": _looked_at(image, found.values()),
            "image": image_facts(image),
        }
    )


def seam_lattices_of(image: Image) -> list[seam_sums.SeamLattice]:
    """The lattices on which seams could be: what the network saw at once, and units of work."""
    cells = {
        "tiles": image.tiles.core_shape,
        "regions": image.label_grid.shard,
        "regions of infer": image.grid.shard,
    }
    return seam_sums.seam_lattices(image.layout.plane, cells, image.plan.stride)


def _check_seams(
    run: StageRun,
    lattice: Lattice,
    found: dict[str, Record],
    distances: seam_sums.ObjectDistances,
) -> dict[str, Any]:
    """The verdict, and a warning where seams show."""
    from segpipe.seam_check import SUSPICIOUS, check_seams  # scipy, which workers do without

    records = run.records("sums")
    sums = seam_sums.add_sums(
        records.payload(found[one.name], ["seams"])["seams"] for one in lattice if one.name in found
    )
    check = check_seams(distances.lattices, sums, distances)
    if check.verdict == SUSPICIOUS:
        log.warning("%s: seams show in the result: %s", run.image.name, check.loudest())
    return check.to_json()


# --- sums -----------------------------------------------------------------------------------------


def _units(run: StageRun, lattice: Lattice) -> tuple[float, ...]:
    """Of the fixed point of each channel's intensities; of none where they are not asked for."""
    image = run.image
    if INTENSITY not in image.settings.measure.features:
        return ()
    channels = image.layout.shape[0]
    if np.dtype(image.layout.dtype).kind != "f":
        return (1.0,) * channels
    found = run.over("largest", find_largest, lattice)
    largest = np.array([record.facts["largest"] for record in found.values()])
    return tuple(unit_of(float(one)) for one in largest.max(axis=0))


def find_largest(work: Pass, name: str) -> Record:
    """The largest absolute intensity of each channel in the objects of one region."""
    image, box = work.image, work.lattice.named(name).box
    labels = read_box(image.labels, box)
    sums = plane_sums(labels, _planes(image, box)) if labels.any() else []
    return work.records.add(name, largest=largest_of(sums) or [0.0] * image.layout.shape[0])


def sum_one(work: Pass, name: str) -> Record:
    """Sums over the objects' pixels in one region."""
    image, units, box = work.image, work.args, work.lattice.named(name).box
    around = box.grow(max(MARGIN, seam_sums.MARGIN))
    inside = around.intersect(Box(0, 0, *image.layout.plane))
    labels = read_box(image.labels, inside)
    padded = np.zeros(around.shape, np.uint32)
    padded[inside.within(around).slices] = labels
    window = padded[box.grow(MARGIN).within(around).slices]
    some = bool(window.any())  # else nothing needs to be read
    sums = measure_region(
        window,
        box,
        image.layout.plane,
        certainty_in(image, box) if some else np.zeros(box.shape, np.uint8),
        zip(_planes(image, box) if units and some else (), units, strict=False),
        Features(
            shape=SHAPE in image.settings.measure.features,
            channels=len(units),
            connected=not image.model.card.classes,
        ),
    )
    known, looked_at = None, box.area
    if image.mask is not None:
        known = image.mask.inside(inside, image.scale, image.layout.full_shape)
        looked_at = int(np.count_nonzero(known[box.within(inside).slices]))
    seams = seam_sums.line_sums(labels, inside, box, seam_lattices_of(image), known)
    return work.records.add(name, None, vars(sums) | {"seams": seams}, looked_at=looked_at)


def _looked_at(image: Image, found: Iterable[Record]) -> int | None:
    """Full-resolution pixels inside the user's mask; None: there is none, or regions failed."""
    counts = [int(record.facts["looked_at"]) for record in found]
    if image.mask is None or len(counts) < len(image.label_lattice):
        return None
    share: float = sum(counts) / math.prod(image.layout.plane)
    return round(share * math.prod(image.layout.full_shape))


def _planes(image: Image, box: Box) -> Iterator[Array]:
    """The channels of the image in a box, one after the other."""
    for channel in range(image.layout.shape[0]):
        yield pixels_in(image, box, [channel])[0]
