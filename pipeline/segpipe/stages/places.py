"""Where the files of an image lie in OUT."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from segpipe.store import LABEL_GROUP

WORK = ".segpipe/{name}.work"
ARRAYS: Mapping[str, str] = {
    "tile": "{name}.ome.zarr/{finest}",
    "infer": f"{WORK}/probabilities.zarr",
    "stitch": f"{{name}}.ome.zarr/{LABEL_GROUP}/0",
}
"""In OUT: the array that a stage writes and others read."""


def manifest_path(out: Path, name: str, stage: str) -> Path:
    """Where a stage's manifest of an image is written, last of all."""
    return out / f"manifests/{name}.{stage}.json"


def thumbnail_path(out: Path, name: str) -> Path:
    """Where the small copy of an image's picture is."""
    return out / "manifests" / f"{name}.jpg"


def array_path(out: Path, name: str, stage: str, finest: int = 0) -> Path | None:
    """The array that a stage writes and others read; `finest` is the first level of the image."""
    inside = ARRAYS.get(stage)
    return None if inside is None else out / inside.format(name=name, finest=finest)


def work_folder(out: Path, name: str) -> Path:
    """Work arrays and records of an image; the suffix keeps `a` apart from the images in `a/`."""
    return out / WORK.format(name=name)


def remove(path: Path) -> None:
    """Remove a folder of ours, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
