"""`clean`: work files of finished images go, results stay."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from segpipe.errors import SettingsError
from segpipe.inputs import Input, known_inputs
from segpipe.records import locked
from segpipe.stages.image import STAGES
from segpipe.stages.manifest import manifest_chain
from segpipe.stages.places import work_folder


def find_images(out: Path) -> list[Input]:
    """The images that OUT knows, by the names given to them."""
    known = known_inputs(out)
    if not known:
        raise SettingsError(f"{out} holds no results of segpipe")
    return sorted(known, key=lambda one: one.name)


def clean(out: Path) -> list[str]:
    """Remove work arrays of the images that are done; the names of those that are not."""
    unfinished = []
    for one in find_images(out):
        work = work_folder(out, one.name)
        if not work.exists():
            continue
        if not _is_finished(out, one.name):
            unfinished.append(one.name)
        else:
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
    chain = manifest_chain(out, name)
    return len(chain) == len(STAGES) and not any(manifest.failed for manifest in chain.values())
