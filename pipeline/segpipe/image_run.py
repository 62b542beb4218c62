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

from segpipe.compute import STOPPED, Engine, Outcome, SerialEngine
from segpipe.errors import BusyError, InputError, SegpipeError, Stopped
from segpipe.geometry import Lattice
from segpipe.records import is_locked, locked
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
        return _failed(image, str(error))


def _run_stages(image: Image, work: Work, engine: Engine, progress: Progress, stop: Stop) -> None:
    """A stage that was done again may have changed what the next one reads, which is then needed too,
    though it was not before."""
    with _naming(image), _awaited(image, stop) if work.wait else locked(image.work, image.name):
        if work.restart:
            _forget(image, work)
        needed = stages_to_run(image, work.stages)
        for stage in work.stages:
            if stage in needed or stage not in current_manifests(image):
                progress.start(image.name, stage)
                # Only infer may import torch: a second, and 200 MB in each process.
                run_stage = getattr(import_module(f"segpipe.stages.{stage}"), stage)
                run_stage(image, engine, progress)


@contextlib.contextmanager
def _naming(image: Image) -> Iterator[None]:
    """What the system refuses is an error of the image."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise InputError(f"{image.name}: {error.strerror or error}{where}") from error


def _forget(image: Image, work: Work) -> None:
    forget(image.out, image.name, STAGES[STAGES.index(work.stages[0]) :])


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
FEWEST_BATCHES = 8
"""So that little is waited for at the beginning and at the end."""
IMAGES_PER_WORKER = 16
"""Of a batch at most: some tasks for each worker, of several images each."""


def divided(todo: Todo, work: Work, engine: Engine) -> tuple[Todo, Todo]:
    """What is handed out whole, and what pass by pass: all of it where this process does the work, and
    images that are to be waited for, so that no worker waits."""
    whole: list[tuple[Image, Sequence[str]]] = []
    passes: list[tuple[Image, Sequence[str]]] = []
    for image, stages in todo:
        small = not isinstance(engine, SerialEngine) and _has_one_region(image)
        held = small and work.wait and is_locked(image.work)
        (whole if small and not held else passes).append((image, stages))
    return whole, passes


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
    results: list[ImageResult] = []
    if work.restart:  # once, and not whenever a worker dies
        todo, results = _forgotten(todo, work)
        work = replace(work, restart=False)
    if not engine.gpus:
        return results + _through(todo, [work], engine, progress)
    groups = groupby(work.stages, lambda stage: stage == INFER)
    steps = [replace(work, stages=tuple(group)) for _, group in groups]
    some = max(engine.workers, -(-len(todo) // FEWEST_BATCHES))
    size = min(some, IMAGES_PER_WORKER * engine.workers)
    batches = [todo[start : start + size] for start in range(0, len(todo), size)]
    with ThreadPoolExecutor(BATCHES, "batch") as pool:
        done = pool.map(lambda batch: _through(batch, steps, engine, progress), batches)
        return results + [one for batch in done for one in batch]


def _forgotten(todo: Todo, work: Work) -> tuple[Todo, list[ImageResult]]:
    """Images of which nothing is known any more, and what became of those that others hold."""
    left, failed = [], []
    for image, stages in todo:
        try:
            with _naming(image), locked(image.work, image.name):
                _forget(image, work)
            left.append((image, stages))
        except SegpipeError as error:
            failed.append(_failed(image, str(error)))
    return left, failed


def _through(
    todo: Todo, steps: Sequence[Work], engine: Engine, progress: Progress
) -> list[ImageResult]:
    """All images through one step after the other; those that fail stay behind."""
    needed = {image.name: stages for image, stages in todo}
    results: dict[str, ImageResult] = {}
    left = {image.name: image for image, _ in todo}
    for step in steps:
        going_on: dict[str, Image] = {}
        on_gpu = step.stages == (INFER,)
        try:
            for outcome in engine.run(_do_whole, step, list(left.values()), on_gpu=on_gpu):
                image = left.pop(outcome.region.name)
                asked = [stage for stage in step.stages if stage in needed[image.name]]
                results[image.name] = result = _result(image, outcome, told=bool(asked))
                if result.status != "failed":
                    going_on[image.name] = image
                progress.start(image.name, "done")
                for stage in asked:
                    progress.advance(image.name, stage, math.prod(image.layout.plane))
        except Stopped:
            raise
        except SegpipeError as error:  # there are no workers any more
            undone = left | (going_on if step is not steps[-1] else {})
            results |= {name: _failed(image, f"{name}: {error}") for name, image in undone.items()}
            break
        left = going_on
    return list(results.values())


def _result(image: Image, outcome: Outcome, *, told: bool) -> ImageResult:
    """What a worker found, after what it logged; or why it found nothing.

    Parameters
    ----------
    told
        Whether there was something to do, of which the log tells.
    """
    if outcome.error is not None:
        return _failed(image, f"{image.name}: {outcome.error}")
    result: ImageResult
    lines: list[Line]
    result, lines = outcome.found
    for level, text in lines:
        log.log(level, "%s", text)
    if told and not lines:
        log.info("%s: done by a worker that died then, with what it had to say", image.name)
        for warning in result.warnings:
            log.warning("%s: %s", image.name, warning)
    return result


def _failed(image: Image, error: str) -> ImageResult:
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
