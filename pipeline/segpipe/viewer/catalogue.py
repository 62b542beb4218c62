"""What an OUT holds, as the page is told it: its images, one of them, one of its objects."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from segpipe.cleaning import find_images
from segpipe.errors import InputError, SettingsError
from segpipe.export.drawing import PALETTE, contrast, draw_overview
from segpipe.geometry import Box
from segpipe.records import read_json
from segpipe.report import read_entries
from segpipe.stages.image import STAGES
from segpipe.stages.manifest import Manifest
from segpipe.stages.places import manifest_path
from segpipe.store import LABEL_GROUP, open_array, read_box

THUMBNAIL = 192
"""Pixels of a thumbnail's longer side at most."""


@dataclass(frozen=True)
class Catalogue:
    """The images of one OUT. Looks at the files each time it is asked: a run may be going on.

    Raises
    ------
    SettingsError
        When there is no such folder, or it holds no results.
    """

    out: Path

    def __post_init__(self) -> None:
        if not self.out.is_dir():
            raise SettingsError(f"no such folder: {self.out}")
        find_images(self.out)

    def slides(self) -> list[Slide]:
        """All images, by name."""
        return [Slide(self.out, one.name) for one in find_images(self.out)]

    def slide(self, key: str) -> Slide | None:
        """The image that a key stands for; None when no image of OUT has it."""
        name = os.fsdecode(unquote_to_bytes(key))
        return next((one for one in self.slides() if one.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """What the page needs to list the images."""
        told = read_entries(self.out)
        return {
            "folder": str(self.out.resolve()),
            "palette": PALETTE.tolist(),
            "slides": [one.entry(told.get(one.name, {})) for one in self.slides()],
        }


@dataclass(frozen=True)
class Slide:
    """An image of an OUT by its name."""

    out: Path
    name: str

    @property
    def key(self) -> str:
        """The name as one segment of a URL, whatever bytes are in it."""
        return quote(os.fsencode(self.name), safe="")

    @property
    def zarr(self) -> Path:
        """Its OME-Zarr."""
        return self.out / f"{self.name}.ome.zarr"

    @property
    def preview(self) -> Path:
        """Its picture."""
        return self.out / f"{self.name}.png"

    @property
    def table(self) -> Path:
        """Its objects."""
        return self.out / f"{self.name}.parquet"

    @cached_property
    def _manifests(self) -> dict[str, Manifest]:
        read = {stage: Manifest.read(manifest_path(self.out, self.name, stage)) for stage in STAGES}
        return {stage: manifest for stage, manifest in read.items() if manifest is not None}

    def entry(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """What the list says of it.

        Parameters
        ----------
        told
            The image's entry in run.json, which a run writes at its end; the manifests are newer.
        """
        done = self._manifests
        failed = [
            {"stage": stage} | dict(one) for stage, made in done.items() for one in made.failed
        ]
        shown = "tile" in done and (self.zarr / "zarr.json").is_file()
        measured = done["measure"].facts if "measure" in done else {}
        if "measure" in done:
            status, error = ("failed" if failed else "done"), None
        elif told.get("status") == "failed":
            status, error = "failed", told.get("error")
        else:
            status, error = "unfinished", None
        if failed:
            error = f"{len(failed)} failed: {failed[0].get('error')}"
        return {
            "key": self.key,
            "name": self.name,
            "status": status,
            "error": error,
            "shown": shown,
            "labelled": "measure" in done,
            "preview": self.preview.is_file(),
            "objects": measured.get("objects"),
            "classes": measured.get("image", {}).get("classes", []),  # of objects: none
            "failed_regions": failed,
            "warnings": [text for one in done.values() for text in one.facts.get("warnings", [])],
        }

    def to_json(self) -> dict[str, Any]:
        """What its own files do not tell the page: full-resolution pixels for a pixel of the labels."""
        metadata: Mapping[bytes, bytes] = {}
        if self.table.is_file():
            metadata = pq.read_schema(self.table).metadata or {}
        tiled = self._manifests.get("tile")
        facts = {} if tiled is None else tiled.facts
        return {
            "label_scale": float(facts.get("scale", 1.0)),
            "full_shape": facts.get("full_shape"),
            "pixel_size_um": float(metadata.get(b"pixel_size_um", b"") or "nan"),
            "model": metadata.get(b"model", b"").decode(),
        }

    def row(self, number: int) -> dict[str, Any] | None:
        """The row of the object with this id; None when there is none.

        Ids ascend, and Parquet tells the least and the largest of each group of rows: one is read.
        """
        with pq.ParquetFile(self.table) as file:
            column = file.schema_arrow.get_field_index("id")
            for group in range(file.num_row_groups):
                bounds = file.metadata.row_group(group).column(column).statistics
                if bounds is not None and not bounds.min <= number <= bounds.max:
                    continue
                ids = file.read_row_group(group, ["id"]).column(0).to_numpy()
                found = np.flatnonzero(ids == number)
                if found.size:
                    rows = file.read_row_group(group).slice(int(found[0]), 1).to_pylist()
                    return dict(rows[0])
        return None

    def thumbnail(self) -> bytes:
        """PNG of the whole image with its objects, from the coarsest level of the pyramid.

        Raises
        ------
        InputError
            When it has no level that is small enough, or its metadata is not as segpipe writes it.
        """
        ome = (read_json(self.zarr / "zarr.json") or {}).get("attributes", {}).get("ome", {})
        try:
            level = ome["multiscales"][0]["datasets"][-1]["path"]
            channels = [one for one in enumerate(ome["omero"]["channels"]) if one[1]["active"]]
            ranges = [(one["window"]["start"], one["window"]["end"]) for _, one in channels]
            rgb = [one["color"] for _, one in channels] == ["FF0000", "00FF00", "0000FF"]
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{self.zarr} is not an OME-Zarr as segpipe writes it") from error
        height, width = open_array(self.zarr / level).shape[-2:]
        if max(height, width) > 4096:
            raise InputError(f"the coarsest level of {self.zarr} has {height:,} x {width:,} pixels")
        box = Box(0, 0, height, width)
        pixels = read_box(self.zarr / level, box, [number for number, _ in channels])
        step = max(1, max(height, width) // THUMBNAIL)
        picture = contrast(pixels[:, ::step, ::step], ranges, rgb)
        if "measure" in self._manifests:
            labels = read_box(self.zarr / LABEL_GROUP / level, box)
            picture = draw_overview(picture, labels[::step, ::step])
        image = Image.fromarray(picture)
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()
