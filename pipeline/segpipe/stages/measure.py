"""measure: coarser labels, the table of instances, and the picture that a person looks at first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.compute import Engine
from segpipe.errors import SegpipeError
from segpipe.export import parquet, preview
from segpipe.geometry import Box, Lattice
from segpipe.properties import ROW, bands_of_rows, instance_columns, sum_region
from segpipe.records import Record
from segpipe.stages.image import (
    Image,
    Manifest,
    Pass,
    Progress,
    StageRun,
    current_manifest,
    manifest_before,
)
from segpipe.stages.stitch import probabilities_in
from segpipe.stages.tile import pyramid_level, ranges_of
from segpipe.store import LABEL_GROUP, halve_nearest, open_array, read_box

Array = np.ndarray[Any, np.dtype[Any]]
DETAIL = 512
"""Pixels of the preview's full-resolution detail."""
OVERVIEW = 1024
"""Pixels at most of the pyramid level that the overview is drawn from."""


def measure(image: Image, engine: Engine, progress: Progress) -> Manifest:
    """Write the label pyramid, `<name>.parquet` and `<name>.png`."""
    before = manifest_before(image, "measure")
    run = StageRun(image, "measure", engine, progress, before)
    lattice = Lattice(image.layout.plane, image.label_grid.shard)
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
    foreground, _ = probabilities_in(work.image, box)
    rows = sum_region(read_box(work.image.labels, box), foreground, box)
    work.records.add(name, None, {"rows": rows})
    return {}


def table_path(image: Image) -> Path:
    """The InstanceTable."""
    return image.out / f"{image.name}.parquet"


def preview_path(image: Image) -> Path:
    """The picture."""
    return image.out / f"{image.name}.png"


def _write_table(
    run: StageRun, lattice: Lattice, found: dict[str, Record], before: Manifest
) -> tuple[int, int]:
    """Write the table band by band; the pixel (y, x) around which there are most objects."""
    image, records = run.image, run.records("sums")

    def rows_of(row: int) -> Array:
        regions = [lattice[row, column] for column in range(lattice.count[1])]
        parts = [records.payload(found[r.name])["rows"] for r in regions if r.name in found]
        return np.concatenate([np.zeros(0, ROW), *parts])

    first_ids: Sequence[int] = before.facts["first_ids"]
    bands = bands_of_rows(
        first_ids, [functools.partial(rows_of, row) for row in range(lattice.count[0])]
    )
    cells = tuple(-(-size // (DETAIL // 2)) for size in image.layout.plane)
    density = np.zeros(cells, np.int64)
    written = 0
    with parquet.TableWriter(table_path(image), _metadata(image)) as writer:
        for rows in bands:
            columns = instance_columns(rows, image.layout.plane, image.layout.pixel_size_um)
            writer.write(columns)
            written += len(rows)
            y, x = (columns[key].astype(np.int64) for key in ("centroid_y_px", "centroid_x_px"))
            np.add.at(density, (y // (DETAIL // 2), x // (DETAIL // 2)), 1)
    if written != before.facts["objects"] and not (run.failed or before.failed):
        raise SegpipeError(
            f"{image.name}: {before.facts['objects']} objects were numbered, {written} are in the "
            f"labels; {image.zarr} was changed by others; run again with --restart"
        )
    row, column = np.unravel_index(int(density.argmax()), density.shape)
    return int(row) * (DETAIL // 2) + DETAIL // 4, int(column) * (DETAIL // 2) + DETAIL // 4


def _metadata(image: Image) -> dict[str, str]:
    size = image.layout.pixel_size_um
    return {
        "image": Path(image.name).name,
        "model": image.model.card.name,
        "model_hash": image.model.hash,
        "pixel_size_um": "" if size is None else repr(size),
        "coordinates": "pixels of the full-resolution image, pixel centres at integers; um is px "
        "times the pixel size; boxes are half-open",
    }


def _write_preview(image: Image, before: Manifest, busiest: tuple[int, int]) -> None:
    tiled = current_manifest(image, "tile")
    assert tiled is not None  # noqa: S101 - its successor is current
    layout = image.layout
    if layout.rgb:
        channels: tuple[int, ...] = (0, 1, 2)
        top = 255.0 if layout.dtype == "uint8" else 65535.0 if layout.dtype == "uint16" else 1.0
        ranges = [(0.0, top)] * 3
    else:
        channels, ranges = layout.channels[:3], ranges_of(tiled)[:3]
    levels = image.label_grid.levels
    level = next(
        n for n, shape in enumerate(levels) if max(shape) <= OVERVIEW or n + 1 == len(levels)
    )

    def drawn(number: int, box: Box) -> tuple[Array, Array]:
        pixels = read_box(image.zarr / str(number), box, channels)
        labels = read_box(image.zarr / LABEL_GROUP / str(number), box)
        return preview.contrast(pixels, ranges, rgb=layout.rgb), labels

    height, width = layout.plane
    y0, x0 = (
        max(0, min(centre - DETAIL // 2, size - DETAIL))
        for centre, size in zip(busiest, (height, width), strict=True)
    )
    detail = Box(y0, x0, min(y0 + DETAIL, height), min(x0 + DETAIL, width))
    whole = Box(0, 0, *open_array(image.zarr / str(level)).shape[-2:])
    display, labels = drawn(level, whole)
    close_display, close_labels = drawn(0, detail)
    size = layout.pixel_size_um
    facts = [
        f"{before.facts['objects']:,} objects",
        f"{width:,} x {height:,} px",
        "pixel size not known" if size is None else f"{size:.4g} um per pixel",
        f"model {image.model.card.name}",
    ]
    failed = (*tiled.failed, *before.failed)
    if failed:
        facts.append(f"{len(failed)} regions failed")
    picture = preview.compose(
        preview.draw_overview(display, labels, 2**level),
        preview.draw_overview(close_display, close_labels, 1),
        title=image.name,
        facts=facts,
        detail_box=Box(*(value >> level for value in (detail.y0, detail.x0, detail.y1, detail.x1))),
        overview_um_per_px=None if size is None else size * 2**level,
        detail_um_per_px=size,
    )
    preview.write_png(preview_path(image), picture)
