"""The table of an image's objects, written band by band from the sums of its regions."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segpipe import seam_sums
from segpipe.bands import Bands
from segpipe.columns import (
    NEIGHBOURS,
    Frame,
    centroids,
    descriptions,
    different_names,
    instance_columns,
    neighbour_columns,
)
from segpipe.errors import SegpipeError
from segpipe.export import parquet
from segpipe.neighbours import nearest_distances
from segpipe.properties import ObjectSums
from segpipe.records import Record
from segpipe.sizes import SizeHistogram
from segpipe.slide import THE_PLANE
from segpipe.slide.source import printable
from segpipe.stages.image import Image
from segpipe.stages.manifest import Manifest
from segpipe.stages.stage_run import StageRun

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


def write_table(
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
