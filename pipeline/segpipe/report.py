"""run.json: what a run did, for machines."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segpipe import __version__
from segpipe.prepare import Prepared
from segpipe.records import locked, read_json, write_json
from segpipe.settings import Settings

if TYPE_CHECKING:
    from segpipe.run import RunResult

LIBRARIES = ("torch", "numpy", "zarr", "tifffile", "numba", "connected-components-3d", "dask")


def write_run_json(result: RunResult, prepared: Prepared, settings: Settings) -> None:
    """Write OUT/run.json; images of earlier runs into the same OUT stay in it."""
    path = result.out / "run.json"
    with locked(result.out / "manifests" / ".run.json", "run.json", wait=True):
        _write(path, result, prepared, settings)


def _write(path: Path, result: RunResult, prepared: Prepared, settings: Settings) -> None:
    before = read_json(path)
    images: dict[str, Any] = {}
    if isinstance(before, dict) and isinstance(before.get("images"), dict):
        images = dict(before["images"])
    by_name = {image.name: image for image in prepared.images}
    for one in result.images:
        entry: dict[str, Any] = {
            "source": str(one.source),
            "status": "failed" if one.status == "failed" else "done",
            "error": one.error,
            "objects": one.objects,
            "failed_regions": one.failed_regions,
            "warnings": one.warnings,
            "seconds": one.seconds,
        }
        if one.name in by_name:
            image = by_name[one.name]
            entry |= {
                "shape": list(image.layout.shape),
                "dtype": image.layout.dtype,
                "channels": [
                    image.layout.channel_names[number] for number in image.layout.channels
                ],
                "pixel_size_um": image.layout.pixel_size_um,
                "model": image.model.card.name,
                "model_hash": image.model.hash,
                "exact": image.model.exact,
                "plan": vars(image.plan) | {"context": image.model.context},
            }
        images[one.name] = entry
    write_json(
        path,
        {
            "segpipe": __version__,
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "libraries": {name: metadata.version(name) for name in LIBRARIES},
            "seconds": round(result.seconds, 3),
            "settings": settings.model_dump(mode="json"),
            "failed": sorted(name for name, one in images.items() if one["status"] == "failed"),
            "images": dict(sorted(images.items())),
        },
    )
