"""`status`: how far each image of an OUT is and what failed, from manifests and locks alone.

No image is opened and nothing is written, so it may be asked at any time, of a run on another node too
where the file system shares its locks.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segpipe.errors import SettingsError
from segpipe.inputs import Input, known_inputs
from segpipe.jobs import FOLDER, told_by
from segpipe.records import is_locked
from segpipe.report import read_entries
from segpipe.results import counted, regions_text
from segpipe.slide import THE_PLANE, address
from segpipe.slide.source import printable
from segpipe.stages.image import STAGES
from segpipe.stages.manifest import Manifest, manifest_chain
from segpipe.stages.places import work_folder

FAILED, RUNNING, UNFINISHED, WAITING, DONE = STATES = (
    "failed", "running", "unfinished", "waiting", "done",
)  # fmt: skip
"""In the order in which they are listed."""


@dataclass(frozen=True)
class ImageStatus:
    """How far an image is.

    state
        `failed`; `running`: a process holds it; `unfinished`: begun, and nobody works on it now;
        `waiting`: not begun; `done`.
    at
        The stage that is being run or comes next, or that failed; None where all are done, and of an
        input that failed before any.
    stages
        What the manifests say of each stage that is through: `done` or `failed`, and seconds.
    """

    name: str
    source: str
    plane: Mapping[str, Any] | None
    state: str
    at: str | None
    error: str | None
    objects: int | None
    stages: Mapping[str, Mapping[str, Any]]
    failed_regions: Sequence[Mapping[str, Any]]

    @property
    def told(self) -> str:
        """What a line says of it beside its state."""
        if self.error is not None:
            return printable(self.error, 4096)
        if self.state == DONE:
            return f"{sum(one['seconds'] for one in self.stages.values()):.1f} s"
        return f"{', '.join(self.stages)} done" if self.stages else ""


@dataclass(frozen=True)
class Status:
    """All images of an OUT, what needs a look first."""

    out: Path
    images: tuple[ImageStatus, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Images by state, of states that there are."""
        found = Counter(one.state for one in self.images)
        return {state: found[state] for state in STATES if found[state]}

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        images = [asdict(one) for one in self.images]
        return {"out": os.fspath(self.out), "counts": self.counts, "images": images}

    def lines(self) -> Iterator[str]:
        """A line per image, and one about all of them."""
        names = [printable(one.name, 200) for one in self.images]
        width = max(map(len, names))
        for name, one in zip(names, self.images, strict=True):
            yield f"{one.state:<11}{one.at or '':<8}{name:<{width}}  {one.told}".rstrip()
        told = ", ".join(f"{count:,} {state}" for state, count in self.counts.items())
        yield f"{counted(len(names), 'image')}: {told}"


def read_status(out: Path) -> Status:
    """How far the images of OUT are.

    Raises
    ------
    SettingsError
        When OUT holds no results.
    """
    known = known_inputs(out)
    if not known:
        raise SettingsError(f"{out} holds no results of segpipe")
    lost = _lost(out)
    in_planes = {one.source for one in known if one.plane != THE_PLANE}
    found = [_status(out, one, lost.get(one.name)) for one in known]
    images = [
        status
        for one, status in zip(known, found, strict=True)
        # Refused as one image once; now its planes are images.
        if not (status.state == WAITING and one.plane == THE_PLANE and one.source in in_planes)
    ]
    images.sort(key=lambda one: (STATES.index(one.state), one.name))
    return Status(out, tuple(images))


def _status(out: Path, one: Input, lost: str | None) -> ImageStatus:
    chain = manifest_chain(out, one.name)
    work = work_folder(out, one.name)
    regions = [{"stage": s} | dict(bad) for s, told in chain.items() for bad in told.failed]
    missing = [stage for stage in STAGES if stage not in chain]
    error = lost or (regions_text(regions) if regions else None)
    at = missing[0] if missing else None
    if is_locked(work):
        state, error, at = RUNNING, None, at or STAGES[-1]
    elif error is not None:
        state = FAILED
        at = at if chain and lost else regions[0]["stage"] if regions else None
    elif missing:
        state = UNFINISHED if chain or work.is_dir() else WAITING
    else:
        state = DONE
    return ImageStatus(
        one.name,
        address(one.source),
        one.plane.stated() or None,
        state,
        at,
        error,
        _objects(chain),
        {
            stage: {"status": told.status, "seconds": round(told.seconds, 3)}
            for stage, told in chain.items()
        },
        regions,
    )


def _objects(chain: Mapping[str, Manifest]) -> int | None:
    objects: int | None = chain["stitch"].facts.get("objects") if "stitch" in chain else None
    return objects


def _lost(out: Path) -> dict[str, str]:
    """Why images have no manifest of the stage that they failed in: by run.json, and by the manifests
    of jobs of the workflow that are newer."""
    lost = {
        name: str(entry.get("error"))
        for name, entry in read_entries(out).items()
        if entry.get("status") == "failed" and not entry.get("failed_regions")
    }
    run = out / "run.json"
    since = run.stat().st_mtime_ns if run.exists() else 0
    for path in (out / FOLDER).glob("*.*.*.json"):
        if path.stat().st_mtime_ns > since:
            lost |= {one.name: str(one.entry["error"]) for one in told_by(path) if one.lost}
    return lost
