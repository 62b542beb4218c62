"""One image through its stages, pass by pass, and what became of it."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

from segpipe.compute import STOPPED, Engine
from segpipe.errors import BusyError, InputError, SegpipeError, Stopped
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
        return failure_of(image, str(error))


def _run_stages(image: Image, work: Work, engine: Engine, progress: Progress, stop: Stop) -> None:
    """A stage that was done again may have changed what the next one reads, which is then needed too,
    though it was not before."""
    with naming(image), _awaited(image, stop) if work.wait else locked(image.work, image.name):
        if work.restart:
            forget_stages(image, work)
        needed = stages_to_run(image, work.stages)
        for stage in work.stages:
            if stage in needed or stage not in current_manifests(image):
                progress.start(image.name, stage)
                # A job of the workflow does one stage, and need not import what the others use.
                run_stage = getattr(import_module(f"segpipe.stages.{stage}"), stage)
                run_stage(image, engine, progress)


@contextlib.contextmanager
def naming(image: Image) -> Iterator[None]:
    """What the system refuses is an error of the image."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        raise InputError(f"{image.name}: {error.strerror or error}{where}") from error


def forget_stages(image: Image, work: Work) -> None:
    """Forget what OUT holds of an image from the first of the stages on."""
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


def failure_of(image: Image, error: str) -> ImageResult:
    """What becomes of an image by an error, which is logged."""
    log.error("%s", error)
    return ImageResult(image.name, image.source, "failed", error, image.plane)
