"""Images through their stages: pass by pass on all workers, or, where there is one region of them, whole
by one worker.

Of a small image the work is less than what it takes to hand out ten passes, so a worker gets it whole,
several at a time where they are quick. The stages are the same, and so are the bytes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

from segpipe.compute import STOPPED, Engine, LocalEngine, SerialEngine
from segpipe.errors import BusyError, InputError, SegpipeError, Stopped
from segpipe.geometry import Lattice
from segpipe.records import locked
from segpipe.results import ImageResult, result_of
from segpipe.stages.exported import missing_exports
from segpipe.stages.image import STAGES, Image, Progress
from segpipe.stages.manifest import NEEDS, current_manifests, forget, has_results, is_whole
from segpipe.stopping import Stop

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What is to be done with each image.

    attempts
        Tries of a region.
    """

    stages: tuple[str, ...]
    restart: bool
    attempts: int


def run_image(
    image: Image, work: Work, engine: Engine, progress: Progress, waiting: Stop | None
) -> list[ImageResult]:
    """One image through the stages, and what became of it; a bad one stops no other.

    Parameters
    ----------
    waiting
        Of a job of a workflow: it waits until no other process holds the image, or this is asked.

    Raises
    ------
    Stopped
        After `engine.stop`.
    """
    try:
        _run_stages(image, work, engine, progress, waiting)
        return [result_of(image, "done", work.stages)]
    except Stopped:
        raise
    except SegpipeError as error:
        log.error("%s", error)
        return [ImageResult(image.name, image.source, "failed", str(error), image.plane)]


def _run_stages(
    image: Image, work: Work, engine: Engine, progress: Progress, waiting: Stop | None
) -> None:
    """A stage that was done again may have changed what the next one reads, which is then needed too,
    though it was not before."""
    try:
        with locked(image.work, image.name) if waiting is None else _awaited(image, waiting):
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
    """Hold an image once no other process does: a job whose workflow was killed may still run."""
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


def divided(todo: Todo, engine: Engine) -> tuple[Todo, Todo]:
    """What is handed out whole, and what pass by pass: all where this process does it itself, and
    where GPUs have workers of their own, for then an image needs two."""
    if not isinstance(engine, LocalEngine) or engine.gpus:
        return [], todo
    whole = [one for one in todo if _has_one_region(one[0])]
    return whole, [one for one in todo if not _has_one_region(one[0])]


def _has_one_region(image: Image) -> bool:
    shards = image.grid.shard, image.label_grid.shard
    return all(len(Lattice(image.layout.plane, shard)) == 1 for shard in shards)


def run_whole(
    todo: Todo, work: Work, engine: Engine, progress: Progress, *, wait: bool
) -> list[ImageResult]:
    """Images, each by one worker.

    Raises
    ------
    Stopped
        After `engine.stop`.
    """
    results = []
    needed = {image.name: stages for image, stages in todo}
    for outcome in engine.run(_do_whole, (work, wait), [image for image, _ in todo]):
        image: Image = outcome.region
        height, width = image.layout.plane
        for stage in needed[image.name]:
            progress.start(image.name, stage)
            progress.advance(image.name, stage, height * width)
        if outcome.error is None:
            result, told = outcome.found
            for level, text in told:
                log.log(level, "%s", text)
            results += result
        else:
            error = f"{image.name}: {outcome.error}"
            log.error("%s", error)
            results.append(ImageResult(image.name, image.source, "failed", error, image.plane))
    return results


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
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append((record.levelno, record.getMessage()))


def _do_whole(
    job: tuple[Work, bool], image: Image
) -> tuple[list[ImageResult], list[tuple[int, str]]]:
    """In a worker: what became of an image, and what was logged."""
    work, wait = job
    logger, told = logging.getLogger("segpipe"), _Told()
    logger.addHandler(told)
    logger.setLevel(logging.INFO)
    try:
        waiting = Stop() if wait else None  # who stops ends this process
        return run_image(image, work, SerialEngine(work.attempts), _Silent(), waiting), told.lines
    finally:
        logger.removeHandler(told)
