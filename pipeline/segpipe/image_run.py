"""Images through their stages: pass by pass on all workers, or, where there is one region of them, whole
by one worker.

Of a small image the work is less than what it takes to hand out ten passes, so a worker gets it whole,
several at a time where they are quick. The stages are the same, and so are the bytes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import groupby
from typing import cast

from segpipe.compute import STOPPED, Engine, Outcome, SerialEngine
from segpipe.errors import BusyError, InputError, SegpipeError, Stopped
from segpipe.geometry import Lattice
from segpipe.records import locked
from segpipe.results import ImageResult, result_of
from segpipe.stages.exported import missing_exports
from segpipe.stages.image import STAGES, Image, Progress
from segpipe.stages.manifest import NEEDS, current_manifests, forget, has_results, is_whole
from segpipe.stopping import Stop

log = logging.getLogger(__name__)

INFER = "infer"
"""The stage that GPUs do."""


@dataclass(frozen=True)
class Work:
    """What is to be done with each image.

    attempts
        Tries of a region.
    wait
        For images that another process holds, as a job of a workflow does: that may be a job whose
        workflow was killed. Otherwise they fail.
    """

    stages: tuple[str, ...]
    restart: bool
    attempts: int
    wait: bool


def run_image(
    image: Image, work: Work, engine: Engine, progress: Progress, stop: Stop
) -> ImageResult:
    """One image through the stages, and what became of it; a bad one stops no other.

    Raises
    ------
    Stopped
        After `engine.stop`, or when the image is waited for and `stop` is asked.
    """
    try:
        _run_stages(image, work, engine, progress, stop)
        return result_of(image, "done", work.stages)
    except Stopped:
        raise
    except SegpipeError as error:
        log.error("%s", error)
        return ImageResult(image.name, image.source, "failed", str(error), image.plane)


def _run_stages(image: Image, work: Work, engine: Engine, progress: Progress, stop: Stop) -> None:
    """A stage that was done again may have changed what the next one reads, which is then needed too,
    though it was not before."""
    try:
        with _awaited(image, stop) if work.wait else locked(image.work, image.name):
            if work.restart:
                forget(image.out, image.name, STAGES[STAGES.index(work.stages[0]) :])
            needed = stages_to_run(image, work.stages)
            for stage in work.stages:
                if stage in needed or stage not in current_manifests(image):
                    progress.start(image.name, stage)
                    # Only infer imports torch: a second, and 200 MB in each process.
                    run_stage = getattr(import_module(f"segpipe.stages.{stage}"), stage)
                    run_stage(image, engine, progress)
    except OSError as error:
        if isinstance(error, InputError):
            raise
        where = f" {error.filename}" if error.filename else ""
        raise InputError(f"{image.name}: {error.strerror or error}{where}") from error


def stages_to_run(image: Image, wanted: Sequence[str] = STAGES) -> list[str]:
    """Those of the wanted stages that are not done with these settings, or whose arrays are lacking.

    Probabilities are work, which `clean` removes: they are made again only where a stage that reads
    them is to be done, wanted or not (it may be wanted of the next job).
    """
    needed = set()
    current = current_manifests(image)
    whole = functools.cache(lambda stage: is_whole(image, stage, current.get(stage)))
    for stage in STAGES:
        manifest = current.get(stage)
        if manifest is None or manifest.failed or not (stage == "infer" or whole(stage)):
            needed.add(stage)
    if "measure" not in needed and (
        not has_results(image.out, image.name, preview=image.settings.measure.preview)
        or missing_exports(image.out, image.name, image.settings.export, current["measure"].facts)
    ):
        needed.add("measure")
    for stage in reversed(STAGES):
        if stage in needed:
            needed |= {before for before in NEEDS[stage] if not whole(before)}
    return [stage for stage in STAGES if stage in needed and stage in wanted]


@contextlib.contextmanager
def _awaited(image: Image, stop: Stop) -> Iterator[None]:
    """Hold an image once no other process does."""
    with contextlib.ExitStack() as held:
        said = False
        while True:
            try:
                held.enter_context(locked(image.work, image.name))
                break
            except BusyError as error:
                if not said:
                    log.warning("%s; waiting for it", error)
                said = True
            if stop.asked:
                raise Stopped(STOPPED)
            time.sleep(0.2)
        yield


# --- whole images ---------------------------------------------------------------------------------

Todo = Sequence[tuple[Image, Sequence[str]]]
"""Images, and which stages are to be done of each."""
Line = tuple[int, str]
"""Level and text of what was logged."""
BATCHES = 3
"""Under way at a time where GPUs have workers of their own: one is read, one inferred, one measured."""
IMAGES_PER_WORKER = 16
"""Of a batch: some tasks for each worker, of several images each."""


def divided(todo: Todo, engine: Engine) -> tuple[Todo, Todo]:
    """What is handed out whole, and what pass by pass: all of it where this process does the work."""
    if isinstance(engine, SerialEngine):
        return [], todo
    whole = [one for one in todo if _has_one_region(one[0])]
    return whole, [one for one in todo if not _has_one_region(one[0])]


def _has_one_region(image: Image) -> bool:
    shards = image.grid.shard, image.label_grid.shard
    return all(len(Lattice(image.layout.plane, shard)) == 1 for shard in shards)


def run_whole(todo: Todo, work: Work, engine: Engine, progress: Progress) -> list[ImageResult]:
    """Images, each by one worker; where GPUs have workers of their own, by one of these for `infer`.

    Raises
    ------
    Stopped
        After `engine.stop`.
    """
    if not engine.gpus:
        return _through(todo, [work], engine, progress)
    groups = groupby(work.stages, lambda stage: stage == INFER)
    steps = [replace(work, stages=tuple(group)) for _, group in groups]
    size = IMAGES_PER_WORKER * engine.workers
    batches = [todo[start : start + size] for start in range(0, len(todo), size)]
    with ThreadPoolExecutor(BATCHES, "batch") as pool:
        done = pool.map(lambda batch: _through(batch, steps, engine, progress), batches)
        return [one for batch in done for one in batch]


def _through(
    todo: Todo, steps: Sequence[Work], engine: Engine, progress: Progress
) -> list[ImageResult]:
    """All images through one step after the other; those that fail stay behind."""
    needed = {image.name: stages for image, stages in todo}
    results: dict[str, ImageResult] = {}
    left = [image for image, _ in todo]
    for step in steps:
        going_on = []
        for outcome in engine.run(_do_whole, step, left, on_gpu=step.stages == (INFER,)):
            image: Image = outcome.region
            results[image.name] = result = _result(image, outcome)
            if result.status != "failed":
                going_on.append(image)
            for stage in step.stages:
                if stage in needed[image.name]:
                    progress.start(image.name, stage)
                    progress.advance(image.name, stage, math.prod(image.layout.plane))
        left = going_on
    return list(results.values())


def _result(image: Image, outcome: Outcome) -> ImageResult:
    """What a worker found, after what it logged; or why it found nothing."""
    if outcome.error is None:
        result, lines = outcome.found
        for level, text in lines:
            log.log(level, "%s", text)
        return cast("ImageResult", result)
    error = f"{image.name}: {outcome.error}"
    log.error("%s", error)
    return ImageResult(image.name, image.source, "failed", error, image.plane)


class _Silent:
    """Progress that nobody sees."""

    def start(self, image: str, stage: str) -> None:
        """Name what is at work."""

    def advance(self, image: str, stage: str, pixels: int) -> None:
        """Count pixels that a stage has passed."""


class _Told(logging.Handler):
    """Keeps what is logged, for the process that the user sees."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Line] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append((record.levelno, record.getMessage()))


def _do_whole(work: Work, image: Image) -> tuple[ImageResult, list[Line]]:
    """In a worker: what became of an image, and what was logged."""
    logger, told = logging.getLogger("segpipe"), _Told()
    logger.addHandler(told)
    logger.setLevel(logging.INFO)
    try:
        # Never asked: whoever stops ends this process.
        result = run_image(image, work, SerialEngine(work.attempts), _Silent(), Stop())
        return result, told.lines
    finally:
        logger.removeHandler(told)
