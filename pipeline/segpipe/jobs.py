"""Jobs of the workflow: batches of images, and manifests that say which stage of which batch is done.

Snakemake sees one file per job and stage, and knows of it only whether it is there:

    OUT/manifests/jobs/<job>.images.json             the images of a job
    OUT/manifests/jobs/<job>.<stage>.<digest>.json   that stage is done, or has failed, for all of them

The digest is of the settings, so that other settings are other files: what must be done again does
not depend on Snakemake's own records of the last run, which lie in the folder that it was started in.
What is true is told by the manifests of the images, whoever wrote them; `synchronise` removes job
manifests that they do not bear out, and adds those that they do.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from segpipe.errors import InputError, SettingsError
from segpipe.inputs import Input, names_in_order
from segpipe.records import read_json, write_json
from segpipe.settings import Settings
from segpipe.slide import THE_PLANE, Plane, input_fingerprint
from segpipe.stages.exported import missing_exports
from segpipe.stages.image import STAGES, Image
from segpipe.stages.manifest import NEEDS, Manifest, has_array, has_results, manifest_chain
from segpipe.stages.places import array_path, manifest_path

FOLDER = Path("manifests", "jobs")


@dataclass(frozen=True)
class JobImage:
    """One image in a job's list or manifest.

    Attributes
    ----------
    fingerprint
        Of the file when it was looked at; None when it could not be.
    token
        Of the manifest of the job's stage; None when there is none.
    entry
        What run.json is to say of it.
    """

    name: str
    source: Path
    plane: Plane = THE_PLANE
    fingerprint: str | None = None
    token: str | None = None
    entry: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether it, or a region of it, failed."""
        return self.entry.get("status") == "failed"

    @property
    def lost(self) -> bool:
        """Whether it failed altogether, so that later stages have nothing to work on."""
        return self.failed and self.token is None

    def now(self, image: Image | None, stage: str, entry: Mapping[str, Any]) -> JobImage:
        """What has become of the image after a stage; None: it could not be opened."""
        if image is None:
            found = _fingerprint(self.source)
            return replace(self, fingerprint=found, token=None, entry=entry)
        manifest = Manifest.read(image.manifest_path(stage))
        lost = entry["status"] == "failed" and not entry["failed_regions"]
        token = None if manifest is None or lost else manifest.token
        found = image.layout.source_fingerprint
        return replace(self, fingerprint=found, token=token, entry=entry)


@dataclass(frozen=True)
class Job:
    """A batch of images that go through each stage together."""

    id: str
    images: tuple[Input, ...]


def plan_jobs(found: Iterable[Input], out: Path, batch: int) -> list[Job]:
    """Batches of images, and their lists on disk.

    An image's place in the order in which names were given in OUT decides its job, so that images
    that come in later do not move the others.
    """
    place = {name: number for number, name in enumerate(names_in_order(out))}
    batches: dict[int, list[Input]] = {}
    for one in sorted(found, key=lambda one: place[one.name]):
        batches.setdefault(place[one.name] // batch, []).append(one)
    jobs = []
    for number, images in batches.items():
        readable = re.sub("[^A-Za-z0-9_-]+", "_", images[0].name)[:40]
        job = Job(f"{number * batch:06d}-{readable}", tuple(images))
        listed = [JobImage(one.name, one.source, one.plane) for one in images]
        path = out / FOLDER / f"{job.id}.images.json"
        if told_by(path) != listed:
            write_job(path, listed)
        jobs.append(job)
    return jobs


def write_job(path: Path, images: Sequence[JobImage]) -> None:
    """Write a job's list or manifest, whole or not at all."""
    failed = any(image.failed for image in images)
    told = [
        asdict(one) | {"source": os.fspath(one.source), "plane": one.plane.stated()}
        for one in images
    ]
    content = {"status": "failed" if failed else "done", "images": told}
    write_json(path, content, durable=False)  # what is lost or torn is written again


def read_job(path: Path) -> list[JobImage]:
    """A job's list or manifest.

    Raises
    ------
    SettingsError
        When it is none.
    """
    content = read_json(path)
    try:
        return [_job_image(**told) for told in content["images"]]  # type: ignore[index]
    except (TypeError, KeyError):
        raise SettingsError(f"{path} is no list of a job's images") from None


def _job_image(source: str, plane: Mapping[str, Any], **told: Any) -> JobImage:
    return JobImage(source=Path(source), plane=Plane(**plane), **told)


def told_by(path: Path) -> list[JobImage]:
    """As `read_job`; nothing where there is no file, or none of ours."""
    try:
        return read_job(path)
    except SettingsError:
        return []


def job_manifest(out: Path, job: str, stage: str, digest: str) -> Path:
    """Where a job's stage says that it is done."""
    return out / FOLDER / f"{job}.{stage}.{digest}.json"


def _fingerprint(source: Path) -> str | None:
    try:
        return input_fingerprint(source)
    except InputError:
        return None


class _Truth:
    """What the manifests of one image say."""

    def __init__(self, out: Path, one: Input, print_of: Callable[[Path], str | None]) -> None:
        self.out = out
        self.name = one.name
        self.source = one.source
        self.plane = one.plane
        self._print_of = print_of

    @property
    def fingerprint(self) -> str | None:
        """Of the input, now."""
        return self._print_of(self.source)

    @cached_property
    def chain(self) -> dict[str, Manifest]:
        """Manifests up to the last that was made from the one before it."""
        return manifest_chain(self.out, self.name)

    def bears_out(self, told: JobImage, stage: str) -> bool:
        """Whether what a job's manifest says of the image still holds."""
        input_now = (self.source, self.plane, self.fingerprint)
        if (told.source, told.plane, told.fingerprint) != input_now:
            return False
        manifest = self.chain.get(stage)
        return told.lost or (manifest is not None and manifest.token == told.token)

    def is_done(self, stage: str, digest: str) -> bool:
        """Whether the stage is done with these settings, and nothing of it has failed."""
        passed = [self.chain.get(one) for one in STAGES[: STAGES.index(stage) + 1]]
        if any(manifest is None or manifest.failed for manifest in passed):
            return False
        facts = self.chain[stage].facts
        return facts.get("settings") == digest and facts.get("source") == self.fingerprint

    def is_told_by(self, entry: Mapping[str, Any] | None) -> bool:
        """Whether an entry of run.json is of this result, not of one before it."""
        objects = self.chain[STAGES[-1]].facts["objects"]
        return entry is not None and (entry["status"], entry["objects"]) == ("done", objects)

    def has_output(self, stage: str, settings: Settings) -> bool:
        """Whether what the stage has written is there."""
        manifest = self.chain.get(stage)
        if manifest is None:
            return False
        if stage == "measure":
            exports = missing_exports(self.out, self.name, settings.export, manifest.facts)
            preview = settings.measure.preview
            return not exports and has_results(self.out, self.name, preview=preview)
        finest = manifest.facts.get("finest", 0)
        return has_array(manifest, array_path(self.out, self.name, stage, finest))


def synchronise(
    out: Path,
    jobs: Sequence[Job],
    digests: Mapping[str, str],
    entries: Mapping[str, Any],
    settings: Settings,
) -> None:
    """Have job manifests exactly where the manifests of the images bear them out.

    So a run that `predict` has begun or finished goes on here, and one whose results were changed
    since, or lost, is done again. Nothing but job manifests is written: a dry run may do it too.

    Parameters
    ----------
    digests
        `stage_digests` of the settings.
    entries
        Of run.json.
    settings
        They say which files are among the results.
    """
    present: dict[str, list[str]] = {}
    for file in sorted(path.name for path in (out / FOLDER).glob("*.*.*.json")):
        present.setdefault(file.rsplit(".", 2)[0], []).append(file)
    print_of = functools.cache(_fingerprint)  # one for all planes of a file
    for job in jobs:
        truths = {one.name: _Truth(out, one, print_of) for one in job.images}
        paths = {stage: job_manifest(out, job.id, stage, digests[stage]) for stage in STAGES}
        done = set()
        for stage, path in paths.items():
            for file in present.get(f"{job.id}.{stage}", []):
                _remove_unless_true(out / FOLDER / file, stage, truths)
            if path.exists() or _adopt(path, stage, digests[stage], truths, entries):
                done.add(stage)
        for stage in reversed(STAGES):
            # Probabilities are work, which `clean` removes: missed only where they will be read.
            if stage in done and stage != "infer":
                _forget_if_lost(paths, stage, done, truths, settings)
            for before in NEEDS[stage] if stage not in done else ():
                if before in done:
                    _forget_if_lost(paths, before, done, truths, settings)


def _forget_if_lost(
    paths: Mapping[str, Path],
    stage: str,
    done: set[str],
    truths: Mapping[str, _Truth],
    settings: Settings,
) -> None:
    told = read_job(paths[stage])
    if not all(image.lost or truths[image.name].has_output(stage, settings) for image in told):
        paths[stage].unlink()
        done.discard(stage)


def _remove_unless_true(path: Path, stage: str, truths: Mapping[str, _Truth]) -> None:
    told = told_by(path)
    same = [image.name for image in told] == list(truths)
    if not same or not all(truths[image.name].bears_out(image, stage) for image in told):
        path.unlink()


def _adopt(
    path: Path, stage: str, digest: str, truths: Mapping[str, _Truth], entries: Mapping[str, Any]
) -> bool:
    """Write a job's manifest of what is done already; whether it is."""
    if not all(truth.is_done(stage, digest) for truth in truths.values()):
        return False
    if stage == STAGES[-1] and not all(
        t.is_told_by(entries.get(name)) for name, t in truths.items()
    ):
        return False
    images, times = [], []
    for name, truth in truths.items():
        entry = entries.get(name, {"status": "done"})
        token = truth.chain[stage].token
        images.append(JobImage(name, truth.source, truth.plane, truth.fingerprint, token, entry))
        times.append(manifest_path(truth.out, name, stage).stat().st_mtime_ns)
    write_job(path, images)
    # As old as what it tells of: stage after stage, so that Snakemake finds nothing newer.
    os.utime(path, ns=(max(times), max(times)))
    return True
