"""measure: coarser labels, the table of instances, and the picture that a person looks at first."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.compute import Engine
from segpipe.errors import SegpipeError
from segpipe.export import parquet, preview
from segpipe.export.drawing import contrast
from segpipe.geometry import Box, Lattice
from segpipe.properties import bands_of_rows, instance_columns, sum_region
from segpipe.records import Record
from segpipe.resampling import full_box
from segpipe.slide import THE_PLANE
from segpipe.stages.classes import certainty_in
from segpipe.stages.image import Image, Manifest, Progress, current_manifests, manifest_before
from segpipe.stages.reading import pixels_in, read_coarse
from segpipe.stages.stage_run import Pass, StageRun
from segpipe.stages.tile import pyramid_level, ranges_of
from segpipe.store import LABEL_GROUP, halve_nearest, read_box

Array = np.ndarray[Any, np.dtype[Any]]
NEIGHBOURHOOD = 256
"""Pixels a side of the squares in which objects are counted to find the preview's detail."""


def measure(image: Image, engine: Engine, progress: Progress) -> Manifest:
    """Write the label pyramid, `<name>.parquet` and `<name>.png`."""
    before = manifest_before(image, "measure")
    run = StageRun(image, "measure", engine, progress, before)
    lattice = image.label_lattice
    run.begin([], lambda: None)
    found = run.over("sums", sum_one, lattice, counts=True)
    for level in range(1, len(image.label_grid.levels)):
        pyramid_level(run, image.zarr / LABEL_GROUP, level, halve_nearest)
    busiest = _write_table(run, lattice, found, before)
    if image.settings.measure.preview:
        _write_preview(image, before, busiest)
    return run.finish({"objects": before.facts["objects"]})


def sum_one(work: Pass, name: str) -> dict[str, Any]:
    """Sums over the objects' pixels in one region."""
    box = work.lattice.named(name).box
    rows = sum_region(read_box(work.image.labels, box), certainty_in(work.image, box), box)
    work.records.add(name, None, {"rows": rows})
    return {}


def _write_table(
    run: StageRun, lattice: Lattice, found: dict[str, Record], before: Manifest
) -> tuple[int, int]:
    """Write the table band by band; the working pixel (y, x) around which there are most objects."""
    image, records = run.image, run.records("sums")

    def rows_of(row: int) -> Iterator[Array]:
        regions = (lattice[row, column] for column in range(lattice.count[1]))
        return (records.payload(found[one.name])["rows"] for one in regions if one.name in found)

    first_ids: Sequence[int] = before.facts["first_ids"]
    bands = bands_of_rows(
        first_ids, [functools.partial(rows_of, row) for row in range(lattice.count[0])]
    )
    cells = tuple(-(-size // NEIGHBOURHOOD) for size in image.layout.plane)
    density = np.zeros(cells, np.int64)
    written = 0
    with parquet.TableWriter(image.table, _metadata(image)) as writer:
        for _, rows in bands:
            columns = instance_columns(
                rows,
                image.layout.plane,
                image.layout.pixel_size_um,
                image.scale,
                image.layout.full_shape,
            )
            writer.write(columns)
            written += len(rows)
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


def _write_preview(image: Image, before: Manifest, busiest: tuple[int, int]) -> None:
    """The whole image from the pyramid, and a detail around the pixel with most objects."""
    tiled = current_manifests(image)["tile"]
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
    picture = preview.compose(
        view(level, Box(0, 0, *image.grid.levels[level])),
        view(0, Box(0, 0, *plan.detail).shift(*corner)),
        caption,
    )
    preview.write_png(image.preview, picture)
