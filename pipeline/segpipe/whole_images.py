"""Images of one region, handed out whole: one worker does all stages of one.

Of a small image the work is less than what it takes to hand out ten passes, so a worker gets it whole,
several at a time where they are quick. The stages are the same, and so are the bytes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby

from segpipe.compute import Engine, Outcome, SerialEngine
from segpipe.errors import SegpipeError, Stopped
from segpipe.geometry import Lattice
from segpipe.image_run import Work, failure_of, forget_stages, naming, run_image
from segpipe.records import is_locked, locked
from segpipe.results import ImageResult
from segpipe.stages.image import Image, Progress
from segpipe.stopping import Stop

log = logging.getLogger(__name__)

INFER = "infer"
"""The stage that GPUs do."""
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
            with naming(image), locked(image.work, image.name):
                forget_stages(image, work)
            left.append((image, stages))
        except SegpipeError as error:
            failed.append(failure_of(image, str(error)))
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
            results |= {
                name: failure_of(image, f"{name}: {error}") for name, image in undone.items()
            }
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
        return failure_of(image, f"{image.name}: {outcome.error}")
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
