"""Exports of a finished image: outlines, tables and labels as files for other programs.

Made from what is on disk alone (labels, table, manifests), so that `predict`, the workflow and
`segpipe export` do the same. Outlines are traced region by region by the engine, and then written in
order of ids together with the rows of the table, some ten thousand objects at a time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.compute import Engine
from segpipe.errors import InputError, SegpipeError
from segpipe.export.csv import write_csv
from segpipe.export.geojson import GeojsonWriter
from segpipe.export.geoparquet import GeoparquetWriter
from segpipe.export.h5ad import write_h5ad
from segpipe.export.labels_tiff import write_labels_tiff
from segpipe.export.parquet import TableReader
from segpipe.geometry import Box, Lattice
from segpipe.outlines import Pieces, trace_region
from segpipe.polygons import Polygons, bands_of_polygons
from segpipe.records import Record, Records, fingerprint, read_records
from segpipe.settings import ExportSettings
from segpipe.simplify import simplify
from segpipe.stages.exported import (
    FACT,
    OUTLINES,
    check_formats,
    export_key,
    export_path,
    missing_exports,
)
from segpipe.stages.manifest import Manifest
from segpipe.stages.places import manifest_path, remove, work_folder
from segpipe.store import LABEL_GROUP, open_array, read_box

Array = np.ndarray[Any, np.dtype[Any]]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Results:
    """What is there of a finished image.

    labels
        Arrays of the pyramid, finest first.
    lattice
        The regions of the labels.
    first_ids
        The first id that is anchored in each band of regions, and one more than the last of all.
    scale
        Pixels of the full-resolution image, of which the table tells, per pixel of the labels.
    full_shape
        (Y, X) of that image.
    """

    name: str
    table: Path
    labels: tuple[Path, ...]
    lattice: Lattice
    first_ids: tuple[int, ...]
    metadata: dict[str, str]
    scale: float
    full_shape: tuple[int, int]
    pixel_size_um: float | None

    @classmethod
    def of(cls, out: Path, name: str) -> Results:
        """The results of an image whose four stages are done.

        Raises
        ------
        InputError
            When they are not there.
        """
        tiled, stitched = (
            Manifest.read(manifest_path(out, name, stage)) for stage in ("tile", "stitch")
        )
        table, group = out / f"{name}.parquet", out / f"{name}.ome.zarr" / LABEL_GROUP
        if (
            tiled is None
            or stitched is None
            or not table.exists()
            or not (group / "0" / "zarr.json").exists()
        ):
            raise InputError(
                f"{name}: is not finished in {out}; run the same `segpipe predict` again"
            )
        levels: list[Path] = []
        while (group / str(len(levels)) / "zarr.json").exists():
            levels.append(group / str(len(levels)))
        array = open_array(levels[0])
        shard = array.shards or array.chunks
        full_shape = tiled.facts.get("full_shape") or array.shape
        told = pq.read_schema(table).metadata or {}
        metadata = {key.decode(): value.decode() for key, value in told.items()}
        size = metadata.get("pixel_size_um", "")
        return cls(
            name,
            table,
            tuple(levels),
            Lattice((array.shape[0], array.shape[1]), (shard[0], shard[1])),
            tuple(stitched.facts["first_ids"]),
            metadata,
            float(tiled.facts.get("scale", 1.0)),
            (full_shape[0], full_shape[1]),
            float(size) if size else None,
        )


def make_exports(
    out: Path, name: str, settings: ExportSettings, engine: Engine, digest: str | None = None
) -> Manifest:
    """Make the exports that are lacking, and record them; the manifest of measure as it is then.

    Parameters
    ----------
    digest
        Of the settings that the manifest is to tell, where these are those of a run.

    Raises
    ------
    InputError
        When the image is not finished.
    SegpipeError
        When table and labels disagree, labels are damaged, or a file cannot be written.
    """
    path = manifest_path(out, name, "measure")
    manifest = Manifest.read(path)
    if manifest is None or manifest.failed:
        raise InputError(f"{name}: is not finished in {out}; run the same `segpipe predict` again")
    check_formats(settings.formats)
    missing = missing_exports(out, name, settings, manifest.facts)
    if digest is not None and manifest.facts.get("settings") != digest:
        manifest = replace(manifest, facts={**manifest.facts, "settings": digest})
        manifest.write(path)
    if not missing:
        return manifest
    results = Results.of(out, name)
    for formats in _together(missing):
        started = time.perf_counter()
        paths = {one: export_path(out, name, one) for one in formats}
        if formats[0] in OUTLINES:
            folder = work_folder(out, name) / "records" / "export"
            _write_outlines(results, paths, settings, engine, folder, manifest.token)
        else:
            _write_one(results, formats[0], paths[formats[0]])
        seconds = time.perf_counter() - started
        made = {
            one: {
                "key": export_key(one, settings),
                "bytes": paths[one].stat().st_size,
                "seconds": round(seconds, 3),
            }
            for one in formats
        }
        told = {**manifest.facts.get(FACT, {}), **made}
        manifest = replace(manifest, facts={**manifest.facts, FACT: told})
        manifest.write(path)
        log.info("%s: export: %s, %.1f s", name, " and ".join(formats), seconds)
    return manifest


def _together(formats: Sequence[str]) -> list[tuple[str, ...]]:
    """Formats by what is written in one go."""
    outlines = tuple(one for one in formats if one in OUTLINES)
    others: list[tuple[str, ...]] = [(one,) for one in formats if one not in OUTLINES]
    return [outlines, *others] if outlines else others


def _write_one(results: Results, format_: str, path: Path) -> None:
    if format_ == "tiff":
        size = results.pixel_size_um
        size = None if size is None else size * results.scale
        made_of = json.dumps(results.metadata, sort_keys=True)
        write_labels_tiff(path, results.labels, Path(results.name).name, size, made_of)
    else:
        {"csv": write_csv, "anndata": write_h5ad}[format_](path, results.table)


@dataclass(frozen=True)
class Tracing:
    """What every task that traces a region is handed."""

    labels: Path
    lattice: Lattice
    records: Records


def trace_one(work: Tracing, name: str) -> dict[str, Any]:
    """The pieces of outline of one region."""
    box = work.lattice.named(name).box
    height, width = work.lattice.shape
    seen = box.grow(1).intersect(Box(0, 0, height, width))
    labels = np.zeros((box.shape[0] + 2, box.shape[1] + 2), np.uint32)
    labels[seen.within(box.grow(1)).slices] = read_box(work.labels, seen)
    work.records.add(name, None, trace_region(labels, box).pack(box))
    return {}


def _done(records: Records) -> dict[str, Record]:
    """The regions that are traced, by name."""
    found = read_records(records.folder)
    return {one.region: one for one in found if one.fingerprint == records.fingerprint}


def _write_outlines(
    results: Results,
    paths: dict[str, Path],
    settings: ExportSettings,
    engine: Engine,
    folder: Path,
    token: str,
) -> None:
    """Trace, and write the formats that hold outlines; what was traced before is not traced again."""
    lattice = results.lattice
    folder.mkdir(parents=True, exist_ok=True)
    records = Records(folder, "outlines", fingerprint(token, lattice.shape, lattice.cell))
    found = _done(records)
    waiting = [region.name for region in lattice if region.name not in found]
    for outcome in engine.run(trace_one, Tracing(results.labels[0], lattice, records), waiting):
        if outcome.error is not None:
            box = lattice.named(outcome.region).box
            raise InputError(
                f"{results.name}: export: region {outcome.region} {box}: {outcome.error}"
            )
    found = _done(records)

    def pieces_of(row: int) -> Iterator[Pieces]:
        for column in range(lattice.count[1]):
            region = lattice[row, column]
            yield Pieces.unpack(records.payload(found[region.name]), region.box)

    bands = [functools.partial(pieces_of, row) for row in range(lattice.count[0])]
    schema = pq.read_schema(results.table)
    with contextlib.ExitStack() as opened:
        rows = opened.enter_context(TableReader(results.table))
        writers: list[Callable[[Polygons, pa.Table], None]] = []
        if "geojson" in paths:
            geojson = GeojsonWriter(
                paths["geojson"],
                results.metadata,
                settings.classification,
                results.scale,
                results.full_shape,
            )
            writers.append(opened.enter_context(geojson).write)
        if "geoparquet" in paths:
            geoparquet = GeoparquetWriter(
                paths["geoparquet"], schema, results.full_shape, results.scale
            )
            writers.append(opened.enter_context(geoparquet).write)
        for polygons in bands_of_polygons(results.first_ids, bands):
            if len(polygons) == 0:
                continue
            table = _rows_of(rows, polygons.ids, results.name)
            if settings.simplify_px > 0:
                polygons = simplify(polygons, settings.simplify_px / results.scale)
            for write in writers:
                write(polygons, table)
        _rows_of(rows, np.zeros(0, np.int64), results.name)
    remove(folder)  # as large as the labels, and quick to make again


def _rows_of(rows: TableReader, ids: Array, name: str) -> pa.Table:
    """The next rows of the table, which must be those of these ids; with none, that it has no more.

    Raises
    ------
    SegpipeError
        When that is not so.
    """
    taken = rows.take(max(len(ids), 1))
    if not np.array_equal(taken["id"].to_numpy(), ids):
        raise SegpipeError(
            f"{name}: the objects of the table are not those of the labels; they were changed by "
            "others; run the same `segpipe predict` again with --restart"
        )
    return taken
