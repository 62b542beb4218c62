"""`clean`: work files of finished images go, results stay."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from segpipe.errors import SettingsError
from segpipe.inputs import Input
from segpipe.records import locked, read_json
from segpipe.stages.image import STAGES, Manifest, work_folder


def find_images(out: Path) -> list[Input]:
    """The images that OUT knows, by the names given to them."""
    known = read_json(out / "manifests" / "images.json")
    if not isinstance(known, dict):
        raise SettingsError(f"{out} holds no results of segpipe")
    return [Input(name, Path(source)) for name, source in sorted(known.items())]


def clean(out: Path) -> list[str]:
    """Remove work arrays of the images that are done; the names of those that are not."""
    unfinished = []
    for one in find_images(out):
        work = work_folder(out, one.name)
        if not _is_finished(out, one.name):
            unfinished.append(one.name)
        elif work.exists():
            with locked(work, one.name):
                shutil.rmtree(work)
    top = out / ".segpipe"
    for lock in top.rglob("*.lock"):
        lock.unlink()
    for place, _, _ in sorted(os.walk(top), reverse=True):
        with contextlib.suppress(OSError):
            Path(place).rmdir()
    return unfinished


def _is_finished(out: Path, name: str) -> bool:
    """Whether all four stages are done, each from the result of the one before."""
    token = None
    for stage in STAGES:
        manifest = Manifest.read(out / "manifests" / f"{name}.{stage}.json")
        if manifest is None or manifest.failed or manifest.before != token:
            return False
        token = manifest.token
    return True
