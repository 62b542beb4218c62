"""The passes of one stage over the regions of one image: what is done, what is torn, what failed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from segpipe import __version__
from segpipe.compute import Engine, Task
from segpipe.errors import InputError
from segpipe.geometry import Box, Lattice, Region
from segpipe.machine import peak_memory_bytes
from segpipe.records import FORMAT, Record, Records, drop_records, fingerprint, read_records
from segpipe.stages.image import STAGES, Image, Progress
from segpipe.stages.manifest import Manifest, forget, stage_fingerprint
from segpipe.stages.places import remove
from segpipe.store import disk_usage, is_array, shard_is_whole, shard_path

log = logging.getLogger(__name__)

LOGGED_FAILURES = 3
BEGIN = "begin"
"""In place of a pass: the stage's arrays are made."""


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
    passes: dict[str, Records] = field(default_factory=dict)
    left: list[Record] = field(default_factory=list)
    """Records of a run before this one, of all passes."""
    lineage: str = ""
    """What failed in the passes so far: later ones saw it absent, and are done again once mended."""
    done_now: int = 0
    done_before: int = 0
    peak_bytes: int = 0
    started: float = field(default_factory=time.perf_counter)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides what this stage writes, failures before it included."""
        return stage_fingerprint(self.image, self.stage, self.before)

    @property
    def seconds(self) -> float:
        """Since it was begun."""
        return time.perf_counter() - self.started

    @cached_property
    def folder(self) -> Path:
        """Records of all passes of this stage."""
        return self.image.work / "records" / self.stage

    def begin(self, arrays: Sequence[Path], prepare: Callable[[], None]) -> None:
        """Have the stage's arrays made anew, unless those that are there are of this fingerprint.

        What told of the old ones goes first: the manifests of this stage and of those after it,
        then its records, then (in `prepare`) the arrays. So whatever is interrupted here, nothing
        says that something is done which is not.
        """
        begun = BEGIN, self.fingerprint
        if all(map(is_array, arrays)):
            self.left = read_records(self.folder)
            if any((one.pass_name, one.fingerprint) == begun for one in self.left):
                return
            self.left = []
        forget(self.image.out, self.image.name, STAGES[STAGES.index(self.stage) :], records=False)
        remove(self.folder)
        prepare()
        self.folder.mkdir(parents=True, exist_ok=True)
        Records(self.folder, *begun).add("")

    def drop(self, goes: Callable[[Record], bool]) -> None:
        """Have records of a run before this one count no more."""
        drop_records(self.folder, filter(goes, self.left))
        self.left = [one for one in self.left if not goes(one)]

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
        check: bool = True,
        counts: bool = False,
        on_gpu: bool = False,
    ) -> dict[str, Record]:
        """Run a task over regions, but for those that are done; their records by region name.

        Parameters
        ----------
        task
            `task(Pass, region name)` writes the shard, appends the record and returns it.
        args
            Whatever else the task needs; must follow from the stage's fingerprint and the outcome
            of the passes before.
        prepare
            Makes an array of this pass alone; called when nothing of the pass is done yet.
        array
            Where each region writes one shard: a record counts only with its shard.
        check
            False where later passes have rewritten shards of `array`.
        counts
            Whether this pass is the one that progress and manifest count.
        on_gpu
            Whether the task uses the GPU, where there is one.

        Raises
        ------
        InputError
            When every region fails.
        """
        key = fingerprint(self.fingerprint, pass_name, self.lineage, FORMAT)
        records = self.passes[pass_name] = Records(self.folder, pass_name, key, array)
        mine = pass_name, key
        self.drop(lambda one: one.pass_name == pass_name and one.fingerprint != key)
        found = {one.region: one for one in self.left if (one.pass_name, one.fingerprint) == mine}
        if not found:
            prepare()
        chosen = list(lattice if regions is None else regions)
        torn = {
            region.name
            for region in chosen
            if array is not None
            and check
            and region.name in found
            and (shard := found[region.name].shard) is not None
            and not shard_is_whole(array, region.box, shard)
        }
        if torn:
            log.warning(
                "%s: %s: %d torn regions are done again", self.image.name, pass_name, len(torn)
            )
            self.drop(lambda one: one.pass_name == pass_name and one.region in torn)
            found = {name: one for name, one in found.items() if name not in torn}
        boxes: dict[str, Box] = {
            region.name: region.box for region in chosen if region.name not in found
        }
        if counts:
            self.done_before += len(chosen) - len(boxes)
            before = sum(region.box.area for region in chosen if region.name not in boxes)
            self.progress.advance(self.image.name, self.stage, before)
        job = Pass(self.image, records, lattice, args)
        for outcome in self.engine.run(task, job, list(boxes), on_gpu=on_gpu):
            box = boxes[outcome.region]
            self.peak_bytes = max(self.peak_bytes, outcome.peak_bytes)
            if counts:
                self.done_now += 1
                self.progress.advance(self.image.name, self.stage, box.area)
            if outcome.error is not None:
                if array is not None:  # it failed after it was written: absent, like its record
                    shard_path(array, box).unlink(missing_ok=True)
                self._fail(pass_name, outcome.region, box, outcome.error)
                if len(boxes) > 1:  # else the image's own line says it
                    self._log_failure(outcome.region, box, outcome.error)
            else:
                found[outcome.region] = outcome.found
        missing = sorted(region.name for region in chosen if region.name not in found)
        if missing:
            self.lineage = fingerprint(self.lineage, pass_name, missing)
        if len(missing) == len(chosen) > 0:
            raise InputError(f"{self.image.name}: {self.stage}: {self.failed[0]['error']}")
        return found

    def _fail(self, pass_name: str, region: str, box: Box, error: str) -> None:
        self.failed.append(
            {
                "pass": pass_name,
                "region": region,
                "box": [box.y0, box.x0, box.y1, box.x1],
                "error": error,
            }
        )

    def _log_failure(self, region: str, box: Box, error: str) -> None:
        if len(self.failed) <= LOGGED_FAILURES:
            log.error("%s: %s: region %s %s: %s", self.image.name, self.stage, region, box, error)
        elif len(self.failed) == LOGGED_FAILURES + 1:
            log.error("%s: %s: more regions fail; all are in run.json", self.image.name, self.stage)

    def records(self, pass_name: str) -> Records:
        """The records of a pass that was run."""
        return self.passes[pass_name]

    def finish(self, facts: Mapping[str, Any]) -> Manifest:
        """Write the manifest, last of all."""
        seconds = self.seconds
        failed = tuple(self.failed)
        token = fingerprint(
            self.fingerprint, [[entry["pass"], entry["region"]] for entry in failed]
        )
        more: dict[str, Any] = {
            "regions_done": self.done_now,
            "regions_done_before": self.done_before,
            "peak_memory_bytes": max(self.peak_bytes, peak_memory_bytes()),
            "segpipe": __version__,
            "settings": self.image.digests.get(self.stage),
            "source": self.image.layout.source_fingerprint,
        }
        array = self.image.array(self.stage)
        if array is not None:
            more["disk"] = disk_usage(array)
        before = None if self.before is None else self.before.token
        manifest = Manifest(
            self.stage, self.fingerprint, token, failed, {**facts, **more}, before, seconds
        )
        manifest.write(self.image.manifest_path(self.stage))
        pixels = self.image.layout.plane[0] * self.image.layout.plane[1]
        log.info(
            "%s: %s: regions %d (%d done before), %.1f s, %.2f Mpx/s",
            self.image.name,
            self.stage,
            self.done_now,
            self.done_before,
            seconds,
            pixels / 1e6 / max(seconds, 1e-9),
        )
        return manifest
