"""One input on its way through the four stages: where its files lie, what decides them, its passes.

A stage is `stage(image, engine, progress) -> Manifest`: rerunnable alone, resumable, idempotent. It is
made of passes over regions; each pass has completion records (records.py) and one kind of task.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from segpipe.components import Decode, to_byte
from segpipe.compute import Engine, Task
from segpipe.errors import InputError
from segpipe.geometry import Box, Lattice, Region
from segpipe.models.modelfile import ModelCard
from segpipe.records import Record, Records, fingerprint, read_json, write_json
from segpipe.settings import Settings
from segpipe.store import Grid, shard_is_whole

log = logging.getLogger(__name__)

STAGES = ("tile", "infer", "stitch", "measure")
VERSION = {"tile": 1, "infer": 1, "stitch": 1, "measure": 1}
"""Raised when a stage's result changes with the same settings: finished results are then redone."""


LOGGED_FAILURES = 3


class Progress(Protocol):
    """Told what is done."""

    def start(self, image: str, stage: str, pixels: int) -> None: ...
    def advance(self, image: str, stage: str, pixels: int) -> None: ...


class NoProgress:
    """Says nothing."""

    def start(self, image: str, stage: str, pixels: int) -> None: ...
    def advance(self, image: str, stage: str, pixels: int) -> None: ...


@dataclass(frozen=True)
class NumericPlan:
    """Everything besides image and model that the probability bytes depend on. Never from a timing."""

    core: int
    halo: int
    stride: int
    batch: int
    precision: str
    memory_format: str
    threads: int
    backend: str = "eager"


@dataclass(frozen=True)
class Model:
    """A model file as the stages need it."""

    path: Path
    hash: str
    card: ModelCard
    context: int
    halo: int
    stride: int
    exact: bool


@dataclass(frozen=True)
class Layout:
    """What opening the file told, and the sizes that follow from it."""

    shape: tuple[int, int, int]
    dtype: str
    channels: tuple[int, ...]
    """Those that the model sees."""
    channel_names: tuple[str, ...]
    rgb: bool
    pixel_size_um: float | None
    source_fingerprint: str

    @property
    def plane(self) -> tuple[int, int]:
        """Height and width."""
        return self.shape[1], self.shape[2]


@dataclass(frozen=True)
class Image:
    """One input and everything that decides its result. Small: it travels with every task."""

    name: str
    source: Path
    out: Path
    settings: Settings
    model: Model
    plan: NumericPlan
    region: int
    layout: Layout

    @property
    def zarr(self) -> Path:
        """The OME-Zarr: the image, later its labels."""
        return self.out / f"{self.name}.ome.zarr"

    @property
    def work(self) -> Path:
        """Work arrays and records; removed by `clean`."""
        return work_folder(self.out, self.name)

    @property
    def probabilities(self) -> Path:
        """(K, Y, X) uint8."""
        return self.work / "probabilities.zarr"

    @property
    def labels(self) -> Path:
        """(Y, X) uint32, the finest level."""
        return self.zarr / "labels" / "instances" / "0"

    @property
    def grid(self) -> Grid:
        """Storage of image and probabilities."""
        return Grid.fitting(self.layout.plane, self.region, self.settings.tile.chunk)

    @property
    def label_grid(self) -> Grid:
        """Storage of labels and of the seeds before them."""
        region = self.settings.stitch.region or self.region
        return Grid.fitting(self.layout.plane, region, self.settings.tile.chunk)

    @property
    def decode(self) -> Decode:
        """Thresholds as bytes: from the settings, else from the model's card."""
        return decode_of(self.settings, self.model.card)

    def manifest_path(self, stage: str) -> Path:
        """Where the stage's manifest is written, last of all."""
        return self.out / "manifests" / f"{self.name}.{stage}.json"

    def fingerprint(self, stage: str) -> str:
        """Hash of what decides this stage's result besides the result of the stage before."""
        tile, infer, measure = self.settings.tile, self.settings.infer, self.settings.measure
        own: dict[str, Callable[[], list[Any]]] = {
            "tile": lambda: [
                self.layout.source_fingerprint,
                [tile.chunk, tile.core, self.region],
                list(self.layout.channels),
                self.layout.pixel_size_um,
                self.model.card.normalisation.model_dump(),
                infer.normalise,
                self.plan.stride,
            ],
            "infer": lambda: [self.model.hash, vars(self.plan)],
            "stitch": lambda: [vars(self.decode), self.label_grid.shard, self.model.card.outputs],
            "measure": lambda: [measure.model_dump()],
        }
        return fingerprint(stage, VERSION[stage], own[stage]())


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
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """`done` or `failed`."""
        return "failed" if self.failed else "done"

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, {"status": self.status} | vars(self))

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """The manifest at `path`, None when there is none."""
        content = read_json(path)
        if not isinstance(content, dict):
            return None
        try:
            return cls(
                content["stage"],
                content["fingerprint"],
                content["token"],
                tuple(content["failed"]),
                content["facts"],
                content["seconds"],
            )
        except (KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Pass:
    """What every task of one pass over regions is handed."""

    image: Image
    records: Records
    lattice: Lattice
    args: Any


@dataclass
class StageRun:
    """The passes of one stage over one image, and what went wrong in them."""

    image: Image
    stage: str
    engine: Engine
    progress: Progress
    before: Manifest | None = None
    failed: list[dict[str, Any]] = field(default_factory=list)
    done_now: int = 0
    done_before: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides what this stage writes, failures before it included."""
        return stage_fingerprint(self.image, self.stage, self.before)

    def over(
        self,
        pass_name: str,
        task: Task,
        lattice: Lattice,
        args: Any = None,
        *,
        regions: Iterable[Region] | None = None,
        prepare: Callable[[], None] = lambda: None,
        array: Path | None = None,
        counts: bool = False,
    ) -> dict[str, Record]:
        """Run a task over regions, but for those that are done; their records by region name.

        Parameters
        ----------
        task
            `task(Pass, region name)` writes the shard and appends the record.
        args
            Whatever else the task needs; must follow from the stage's fingerprint.
        prepare
            Makes the arrays; called when nothing is done yet under this fingerprint.
        array
            Where each region writes one shard: a record counts only with its shard.
        counts
            Whether this pass is the one that progress and manifest count.
        """
        records = self.records(pass_name)
        if not records.is_current():
            prepare()
            records.begin()
        chosen = list(lattice if regions is None else regions)
        found = records.read()
        torn = [
            region.name
            for region in chosen
            if array is not None
            and region.name in found
            and (shard := found[region.name].shard) is not None
            and not shard_is_whole(array, region.box, shard)
        ]
        if torn:
            log.warning(
                "%s: %s: %d torn regions are done again", self.image.name, pass_name, len(torn)
            )
            records.discard(torn)
        boxes: dict[str, Box] = {
            region.name: region.box
            for region in chosen
            if region.name not in found or region.name in torn
        }
        if counts:
            self.done_before += len(chosen) - len(boxes)
            before = sum(region.box.area for region in chosen if region.name not in boxes)
            self.progress.advance(self.image.name, self.stage, before)
        job = Pass(self.image, records, lattice, args)
        for outcome in self.engine.run(task, job, list(boxes)):
            box = boxes[outcome.region]
            if counts:
                self.done_now += 1
                self.progress.advance(self.image.name, self.stage, box.area)
            if outcome.error is not None:
                self._fail(pass_name, outcome.region, box, outcome.error)
        return records.read()

    def _fail(self, pass_name: str, region: str, box: Box, error: str) -> None:
        if len(self.failed) < LOGGED_FAILURES:
            log.error("%s: %s: region %s %s: %s", self.image.name, self.stage, region, box, error)
        elif len(self.failed) == LOGGED_FAILURES:
            log.error("%s: %s: more regions fail; all are in run.json", self.image.name, self.stage)
        self.failed.append(
            {
                "pass": pass_name,
                "region": region,
                "box": [box.y0, box.x0, box.y1, box.x1],
                "error": error,
            }
        )

    def records(self, pass_name: str) -> Records:
        """The records of one of this stage's passes."""
        key = fingerprint(self.fingerprint, pass_name)
        return Records(self.image.work / "records" / pass_name, key)

    def finish(self, facts: Mapping[str, Any]) -> Manifest:
        """Write the manifest, last of all."""
        seconds = time.perf_counter() - self.started
        failed = tuple(self.failed)
        token = fingerprint(
            self.fingerprint, [[entry["pass"], entry["region"]] for entry in failed]
        )
        more = {"regions_done": self.done_now, "regions_done_before": self.done_before}
        manifest = Manifest(self.stage, self.fingerprint, token, failed, {**facts, **more}, seconds)
        manifest.write(self.image.manifest_path(self.stage))
        pixels = self.image.layout.plane[0] * self.image.layout.plane[1]
        log.info(
            "%s: %s: %d regions (%d done before), %.1f s, %.2f Mpx/s",
            self.image.name,
            self.stage,
            self.done_now,
            self.done_before,
            seconds,
            pixels / 1e6 / max(seconds, 1e-9),
        )
        return manifest


def decode_of(settings: Settings, card: ModelCard) -> Decode:
    """Thresholds as bytes: from the settings, else from the model's card."""

    def chosen(key: str) -> Any:
        value = getattr(settings.stitch, key)
        return getattr(card.decode, key) if value is None else value

    return Decode(
        max(1, to_byte(chosen("foreground"))),
        tuple(to_byte(level) for level in chosen("interior")),
        chosen("min_area"),
        tuple(to_byte(level) for level in chosen("growth_levels")),
        chosen("growth_steps"),
    )


def intensity_range(low: float, high: float, top: float) -> tuple[float, float]:
    """What becomes 0 and 1: where both percentiles coincide (almost all of the image is
    background) the maximum is the high one, so that a few objects are not lost."""
    return low, high if high > low else top


def work_folder(out: Path, name: str) -> Path:
    """Work arrays and records of an image; the suffix keeps `a` apart from the images in `a/`."""
    return out / ".segpipe" / f"{name}.work"


def stage_fingerprint(image: Image, stage: str, before: Manifest | None) -> str:
    """Hash of all that decides what a stage writes, failures before it included."""
    return fingerprint(image.fingerprint(stage), None if before is None else before.token)


def manifest_before(image: Image, stage: str) -> Manifest:
    """The manifest of the stage before this one.

    Raises
    ------
    InputError
        When that stage was not run, or with other settings.
    """
    previous = STAGES[STAGES.index(stage) - 1]
    manifest = current_manifest(image, previous)
    if manifest is None:
        raise InputError(
            f"{image.name}: {stage} needs the result of {previous} with the same settings; "
            f"run `segpipe stage {previous}` first"
        )
    return manifest


def current_manifest(image: Image, stage: str) -> Manifest | None:
    """The stage's manifest if it was made from this input with these settings."""
    place = STAGES.index(stage)
    before = None if place == 0 else current_manifest(image, STAGES[place - 1])
    if place > 0 and before is None:
        return None
    manifest = Manifest.read(image.manifest_path(stage))
    if manifest is None or manifest.fingerprint != stage_fingerprint(image, stage, before):
        return None
    return manifest


def remove(path: Path) -> None:
    """Remove a folder of ours, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
