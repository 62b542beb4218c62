"""run.json: what a run did, for machines."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from segpipe import __version__
from segpipe.records import locked, read_json, write_json
from segpipe.results import ImageResult
from segpipe.settings import Settings
from segpipe.slide import address
from segpipe.stages.image import Image, image_facts

LIBRARIES = ("torch", "openvino", "numpy", "scipy", "numba", "zarr", "tifffile", "dask")
"""Of which the versions are told: dependencies of every installation, or left out where lacking."""


def write_run_json(
    out: Path, entries: Mapping[str, Mapping[str, Any]], settings: Settings, seconds: float | None
) -> None:
    """Write OUT/run.json; images of earlier runs into the same OUT stay in it.

    Parameters
    ----------
    entries
        `entry_of` each image, by name.
    """
    with locked(out / "manifests" / ".run.json", "run.json", wait=True):
        images = {**_still_true(read_entries(out), entries), **entries}
        write_json(
            out / "run.json",
            {
                "segpipe": __version__,
                "python": sys.version.split()[0],
                "platform": platform.platform(),
                "libraries": library_versions(),
                "seconds": None if seconds is None else round(seconds, 3),
                "settings": settings.model_dump(mode="json"),
                "failed": sorted(name for name, one in images.items() if one["status"] == "failed"),
                "images": dict(sorted(images.items())),
            },
        )


def library_versions() -> dict[str, str]:
    """Versions of those LIBRARIES that are installed."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _still_true(
    before: Mapping[str, Mapping[str, Any]], entries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Entries of earlier runs, but for a file that was refused as one image and whose planes are now
    told apart: it failed no more."""
    told = {one["source"] for one in entries.values() if one.get("plane")}
    return {
        name: one
        for name, one in before.items()
        if one["status"] != "failed" or one.get("plane") or one["source"] not in told
    }


def read_entries(out: Path) -> dict[str, Mapping[str, Any]]:
    """The entries of the images in OUT/run.json, if it is there."""
    before = read_json(out / "run.json")
    found = before.get("images") if isinstance(before, dict) else None
    return dict(found) if isinstance(found, dict) else {}


def entry_of(result: ImageResult, image: Image | None) -> dict[str, Any]:
    """What run.json says of an image; None: it could not be opened."""
    entry: dict[str, Any] = {
        "source": address(result.source),
        "plane": result.plane.stated() or None,
        "status": "failed" if result.status == "failed" else "done",
        "error": result.error,
        "objects": result.objects,
        "tiles": result.tiles,
        "tiles_skipped": result.tiles_skipped,
        "failed_regions": result.failed_regions,
        "warnings": result.warnings,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "seam_check": result.seam_check,
        "sizes": result.sizes,
        "looked_at_px": result.looked_at_px,
    }
    if image is not None:
        entry |= image_facts(image)
    return entry


def bytes_text(count: float) -> str:
    """`1.2 GB`, `12 MB`, `3 kB`."""
    for unit, size, digits in (("GB", 1e9, 1), ("MB", 1e6, 0)):
        if count >= size:
            return f"{count / size:.{digits}f} {unit}"
    return f"{count / 1e3:.0f} kB"
