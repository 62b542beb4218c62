"""What the stages of an image did: manifests, and whether what they tell of is still there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from segpipe.errors import InputError
from segpipe.records import fingerprint, json_text
from segpipe.stages.exported import remove_exports
from segpipe.stages.image import STAGES, Image
from segpipe.stages.places import manifest_path, remove, work_folder
from segpipe.store import disk_usage

NEEDS: Mapping[str, tuple[str, ...]] = {
    "tile": (),
    "infer": ("tile",),
    "stitch": ("infer",),
    "measure": ("tile", "infer", "stitch"),
}
"""Stages whose arrays a stage reads."""
PARQUET_END = b"PAR1"
PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class Manifest:
    """What a stage did: written last, and all that the next stage needs to be told.

    token
        Differs when the stage's output does: its fingerprint, and what failed.
    """

    stage: str
    fingerprint: str
    token: str
    failed: tuple[Mapping[str, Any], ...]
    facts: Mapping[str, Any]
    before: str | None = None
    """Token of the stage before."""
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """`done` or `failed`."""
        return "failed" if self.failed else "done"

    def write(self, path: Path) -> None:
        """Write it as JSON, where there is none. When it is lost or torn, the stage is done again as
        far as its records are, and nobody takes half of one for a manifest."""
        text = json_text({"status": self.status} | vars(self)).encode("utf-8", "surrogateescape")
        try:
            path.write_bytes(text)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """The manifest at `path`, None when there is none."""
        try:
            stat = path.stat()
            return _read(path, (stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except OSError:
            return None


@lru_cache(maxsize=64)
def _read(path: Path, _state: tuple[int, int, int]) -> Manifest | None:
    """The manifest in a file; it is asked for again and again while an image is worked on."""
    content = path.read_bytes()
    try:
        told = json.loads(content.decode("utf-8", "surrogateescape"))
        return Manifest(
            told["stage"],
            told["fingerprint"],
            told["token"],
            tuple(told["failed"]),
            told["facts"],
            told["before"],
            told["seconds"],
        )
    except (ValueError, KeyError, TypeError):
        return None


def stage_fingerprint(image: Image, stage: str, before: Manifest | None) -> str:
    """Hash of all that decides what a stage writes, failures before it included."""
    return _joined(image.fingerprint(stage), None if before is None else before.token)


@lru_cache(maxsize=1024)
def _joined(own: str, before: str | None) -> str:
    return fingerprint(own, before)


def manifests_before(image: Image, stage: str) -> dict[str, Manifest]:
    """The manifests of the stages before this one, when all that this one reads is there.

    Raises
    ------
    InputError
        When an earlier stage was not run, or with other settings, or its arrays are not whole.
    """
    current = current_manifests(image)
    for earlier in NEEDS[stage]:
        if not is_whole(image, earlier, current.get(earlier)):
            raise InputError(
                f"{image.name}: {stage} needs the result of {earlier} with the same settings; "
                f"run `segpipe stage {earlier}` first"
            )
    return current


def is_whole(image: Image, stage: str, manifest: Manifest | None) -> bool:
    """Whether the stage's array is as its manifest left it: no shard is missing or torn.

    A shard that is absent reads as background, so it must be missed before it is read.
    """
    return manifest is not None and has_array(manifest, image.array(stage))


def has_array(manifest: Manifest, array: Path | None) -> bool:
    """Whether an array is as the manifest of its stage left it."""
    return array is None or manifest.facts.get("disk") == list(disk_usage(array) or ())


def has_results(out: Path, name: str, *, preview: bool) -> bool:
    """Whether the files are there that measure writes, and end as they should: nobody waits for them
    to be on disk, and a power failure may leave less of them than of the manifest that tells of them."""
    ends = {"parquet": PARQUET_END} | ({"png": PNG_END} if preview else {})
    return all(_ends_with(out / f"{name}.{suffix}", end) for suffix, end in ends.items())


def _ends_with(path: Path, end: bytes) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-len(end), os.SEEK_END)
            return file.read() == end
    except OSError:
        return False


def current_manifests(image: Image) -> dict[str, Manifest]:
    """The manifests, by stage, that were made from this input with these settings; in order, up to
    the first that was not."""
    current: dict[str, Manifest] = {}
    before: Manifest | None = None
    for stage in STAGES:
        manifest = Manifest.read(image.manifest_path(stage))
        if manifest is None or manifest.fingerprint != stage_fingerprint(image, stage, before):
            break
        current[stage] = before = manifest
    return current


def manifest_chain(out: Path, name: str) -> dict[str, Manifest]:
    """The manifests of an image, by stage, each made from the result of the one before; whatever the
    input and the settings are now."""
    found: dict[str, Manifest] = {}
    token = None
    for stage in STAGES:
        manifest = Manifest.read(manifest_path(out, name, stage))
        if manifest is None or manifest.before != token:
            break
        found[stage], token = manifest, manifest.token
    return found


def forget(out: Path, name: str, stages: Sequence[str], *, records: bool = True) -> None:
    """Remove what says that these stages of an image are done; their arrays are then made anew.

    Exports go too: nothing would make those anew that are no longer asked for.
    """
    for stage in stages:
        path = manifest_path(out, name, stage)
        if stage == "measure" and (told := Manifest.read(path)) is not None:
            remove_exports(out, name, told.facts)
        path.unlink(missing_ok=True)
        if records:
            remove(work_folder(out, name) / "records" / stage)
