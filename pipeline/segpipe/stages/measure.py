"""measure: coarser labels, the table of instances, and the picture that a person looks at first."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segpipe import seam_sums
from segpipe.bands import Bands
from segpipe.columns import (
    INTENSITY,
    NEIGHBOURS,
    SHAPE,
    Frame,
    centroids,
    descriptions,
    different_names,
    instance_columns,
    neighbour_columns,
)
from segpipe.compute import Engine
from segpipe.errors import SegpipeError
from segpipe.export import parquet, preview
from segpipe.export.drawing import contrast
from segpipe.export.png import write_jpeg, write_png
from segpipe.geometry import Box, Lattice
from segpipe.intensities import largest_of, unit_of
from segpipe.neighbours import nearest_distances
from segpipe.perimeters import MARGIN
from segpipe.properties import Features, ObjectSums, measure_region, plane_sums
from segpipe.records import Record
from segpipe.resampling import full_box
from segpipe.sizes import SizeHistogram
from segpipe.slide import THE_PLANE
from segpipe.slide.source import printable
from segpipe.stages.classes import certainty_in
from segpipe.stages.exports import make_exports
from segpipe.stages.image import Image, Progress, image_facts
from segpipe.stages.manifest import Manifest, current_manifests, has_results, manifests_before
from segpipe.stages.reading import pixels_in, read_coarse
from segpipe.stages.stage_run import Pass, StageRun
from segpipe.stages.tile import pyramid_level, ranges_of
from segpipe.store import LABEL_GROUP, halve_nearest, read_box

log = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]
NEIGHBOURHOOD = 256
"""Pixels a side of the squares in which objects are counted to find the preview's detail."""


@dataclass
class Told:
    """What the manifest tells of all objects, added up while the table is written.

    masked
        Whether a user's mask cut objects: those at its border are then not compared with others, for
        its border may be a line on which regions meet.
    """

    distances: seam_sums.ObjectDistances
    masked: bool
    sizes: SizeHistogram = field(default_factory=SizeHistogram)

    def add(self, rows: Array, columns: Mapping[str, Array]) -> None:
        """Add objects, by their sums and by their columns in the table."""
        area = rows["area"].astype(np.float64)
        if not self.masked:
            self.distances.add(rows["sum_y"] / area, rows["sum_x"] / area, area)
        self.sizes.add(columns["area_px"])


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
    busiest = _write_table(run, found, before, units, sums)
    if image.settings.measure.preview:
        _write_preview(image, told["tile"], before, busiest)
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


# --- the table ------------------------------------------------------------------------------------


def _write_table(
    run: StageRun,
    found: dict[str, Record],
    before: Manifest,
    units: Sequence[float],
    told: Told,
) -> tuple[int, int]:
    """Write the table band by band; the working pixel (y, x) around which there are most objects.

    Adds the objects to `told`.
    """
    image, records = run.image, run.records("sums")
    lattice, layout = image.label_lattice, image.layout

    def regions_of(row: int) -> Iterator[ObjectSums]:
        regions = (lattice[row, column] for column in range(lattice.count[1]))
        return (
            ObjectSums(**records.payload(found[one.name], ["rows", "points"]))
            for one in regions
            if one.name in found
        )

    bands = Bands(
        before.facts["first_ids"],
        [functools.partial(regions_of, row) for row in range(lattice.count[0])],
    )
    channels = different_names([printable(name) for name in layout.channel_names])
    frame = Frame(
        shape=layout.plane,
        full_shape=layout.full_shape,
        pixel_size_um=layout.pixel_size_um,
        scale=image.scale,
        channels=channels[: len(units)],
        units=units,
    )
    distances = _distances(image, bands, frame)  # none: they are not asked for
    cells = tuple(-(-size // NEIGHBOURHOOD) for size in layout.plane)
    density = np.zeros(cells, np.int64)
    written = 0
    with parquet.TableWriter(image.table, _metadata(image), descriptions(channels)) as writer:
        for _, sums in bands:
            rows = sums.closed()
            columns = instance_columns(rows, frame)
            if distances is not None:
                columns |= neighbour_columns(distances[written : written + len(rows)], frame)
            writer.write(columns)
            written += len(rows)
            told.add(rows, columns)
            y, x = (rows[f"sum_{axis}"] // rows["area"] for axis in ("y", "x"))
            np.add.at(density, (y // NEIGHBOURHOOD, x // NEIGHBOURHOOD), 1)
    if written != before.facts["objects"] and not (run.failed or before.failed):
        raise SegpipeError(
            f"{image.name}: {before.facts['objects']} objects were numbered, {written} are in the "
            f"labels; {image.zarr} was changed by others; run again with --restart"
        )
    row, column = np.unravel_index(int(density.argmax()), density.shape)
    return int(row) * NEIGHBOURHOOD + NEIGHBOURHOOD // 2, int(
        column
    ) * NEIGHBOURHOOD + NEIGHBOURHOOD // 2


def _distances(image: Image, bands: Bands, frame: Frame) -> Array | None:
    """Distances of all objects to their nearest neighbours, by id, in a file that has no name."""
    if NEIGHBOURS not in image.settings.measure.features:
        return None

    def parts() -> Iterator[Array]:
        return (np.stack(centroids(sums.rows, frame), axis=1) for _, sums in bands)

    points = _mapped(image.work, parts()).reshape(-1, 2)
    return _mapped(image.work, nearest_distances(points))


def _mapped(folder: Path, parts: Iterable[Array]) -> Array:
    """Arrays of float64, one after the other; where there are several, on disk and not in memory."""
    parts = iter(parts)
    begun = list(itertools.islice(parts, 2))
    if len(begun) == 1:
        return begun[0]
    with tempfile.TemporaryFile(dir=folder) as file:
        for part in itertools.chain(begun, parts):
            file.write(part.tobytes())
        return np.memmap(file, np.float64, "r") if file.tell() else np.zeros(0)


def _metadata(image: Image) -> dict[str, str]:
    size = image.layout.pixel_size_um
    return {
        "image": Path(image.name).name,
        **({"plane": str(image.plane)} if image.plane != THE_PLANE else {}),
        "model": image.model.card.name,
        "model_hash": image.model.hash,
        **_told_classes(image),
        "pixel_size_um": "" if size is None else repr(size),
        "label_scale": repr(image.scale),
        "coordinates": "pixels of the full-resolution image, pixel centres at integers; um is px "
        "times the pixel size; boxes are half-open; a pixel w of the labels lies at "
        "(w + 1/2) label_scale - 1/2",
    }


def _told_classes(image: Image) -> dict[str, str]:
    """What the ids stand for where they are classes."""
    card = image.model.card
    named = ", ".join(f"{number} {name}" for number, name in enumerate(card.outputs))
    return {"classes": named} if card.classes else {}


def _write_preview(
    image: Image, tiled: Manifest, before: Manifest, busiest: tuple[int, int]
) -> None:
    """The whole image from the pyramid, and a detail around the pixel with most objects."""
    layout = image.layout
    if layout.rgb:
        channels: tuple[int, ...] = (0, 1, 2)
        top = {"uint8": 255.0, "uint16": 65535.0}.get(layout.dtype, 1.0)
        ranges = [(0.0, top)] * 3
    else:
        channels, ranges = layout.channels, ranges_of(tiled)
    plan = preview.Plan.of(layout.plane)
    level = min(plan.step.bit_length(), len(image.grid.levels)) - 1

    def view(number: int, box: Box) -> preview.View:
        """Part of a level; the box is in that level's pixels."""
        if number == 0:
            pixels = pixels_in(image, box, channels)
        elif number < image.finest:  # the picture needs no more than the level that there is
            pixels = read_coarse(image, number, box)[list(channels)]
        else:
            pixels = read_box(image.zarr / str(number), box, channels)
        labels = read_box(image.zarr / LABEL_GROUP / str(number), box)
        working = Box(*(value << number for value in (box.y0, box.x0, box.y1, box.x1)))
        if working.contains(Box(0, 0, *layout.plane)):
            shown = Box(
                0, 0, *layout.full_shape
            )  # of a pyramid's level the last rows may be lacking
        else:
            shown = full_box(working, image.scale, layout.full_shape)
        return preview.View(contrast(pixels, ranges, layout.rgb), labels, shown)

    corner = (
        max(0, min(centre - length // 2, size - length))
        for centre, length, size in zip(busiest, plan.detail, layout.plane, strict=True)
    )
    failed = (*tiled.failed, *before.failed)
    caption = preview.Caption(
        image.name,
        before.facts["objects"],
        layout.pixel_size_um,
        [f"model {image.model.card.name}"] + ([f"{len(failed)} REGIONS FAILED"] if failed else []),
        image.model.card.classes,
    )
    whole, part = Box(0, 0, *image.grid.levels[level]), Box(0, 0, *plan.detail).shift(*corner)
    overview = view(level, whole)
    detail = overview if level == 0 and part == whole else view(0, part)
    picture = preview.compose(overview, detail, caption)
    write_png(image.preview, picture)
    write_jpeg(image.thumbnail, preview.thumbnail_of(picture))
