"""`predict`: a folder through the four stages on one set of live workers, several images in flight."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

from segpipe.compute import STOPPED, Engine, SerialEngine, open_engine
from segpipe.errors import BusyError, InputError, SegpipeError, SettingsError, Stopped
from segpipe.footprint import check_device, choose_processes
from segpipe.inputs import Input, find_inputs
from segpipe.jobs import read_job, write_job
from segpipe.prepare import Prepared, prepare, writable_folder
from segpipe.progress import ProgressBar
from segpipe.records import locked
from segpipe.report import bytes_text, entry_of, write_run_json
from segpipe.reporting import write_report
from segpipe.results import ImageResult, RunResult, conclude, counted, result_of
from segpipe.settings import Settings
from segpipe.slide import THE_PLANE
from segpipe.stages.exported import missing_exports
from segpipe.stages.image import STAGES, Image
from segpipe.stages.manifest import NEEDS, current_manifests, forget, has_results, is_whole
from segpipe.stages.reading import closing_input
from segpipe.stopping import Stop, stop_on_signals
from segpipe.verifying import remove_damaged

log = logging.getLogger(__name__)


def predict(
    inputs: Sequence[Path | str],
    out: Path | str,
    settings: Settings | None = None,
    *,
    stages: Sequence[str] = STAGES,
    restart: bool = False,
    verify: bool = False,
) -> RunResult:
    """Segment files and folders into OUT; what is done already is not done again.

    Parameters
    ----------
    inputs
        Image files, OME-Zarr folders, and folders that are searched for them.
    out
        Folder of the results; made if need be.
    stages
        Run only these; others must be done.
    restart
        Forget what OUT holds of these inputs.
    verify
        First compare all finished shards with their checksums; damaged ones are made again.

    Returns
    -------
    RunResult
        An input that fails is named there and does not stop the others.

    Raises
    ------
    SettingsError
        Wrong settings, no input, an OUT that cannot be written: nothing was started.
    Stopped
        After SIGINT or SIGTERM; the same call goes on.
    """
    started = time.perf_counter()
    settings = settings or Settings()
    was_there = Path(out).exists()
    folder = writable_folder(Path(out))
    try:
        if "infer" in stages and settings.infer.device not in ("auto", "cpu"):
            check_device(settings.infer.device)  # not here: said before the plan is written
        search = find_inputs([Path(path) for path in inputs], folder, settings.tile)
    except SettingsError:
        if not was_there:
            with contextlib.suppress(OSError):
                folder.rmdir()  # nothing was started
        raise
    planes = [one.source for one in search if one.plane != THE_PLANE]
    if planes:
        files = counted(len(set(planes)), "file")
        log.info("%s of several planes or scenes, as %s", files, counted(len(planes), "image"))
    prepared = prepare(search, folder, settings)
    results, busy = _work(prepared, folder, settings, stages, restart=restart, verify=verify)
    results.sort(key=lambda result: result.name)
    result = RunResult(results, folder, time.perf_counter() - started)
    write_run_json(folder, _entries(results, prepared), settings, result.seconds)
    write_report(folder)
    if busy or result.failed:
        conclude(result)
    return result


def run_job(stage: str, job: Path, manifest: Path, out: Path, settings: Settings) -> None:
    """One stage of the images that a job of the workflow lists; what failed is told by its manifest.

    Parameters
    ----------
    job
        The job's list of images, or its manifest of the stage before. Images that this tells to be
        lost are passed on as they are.
    manifest
        Written last: what became of each image.

    Raises
    ------
    SettingsError, Stopped
        As `predict`; then no manifest is written.
    """
    folder = writable_folder(out)
    listed = read_job(job)
    found = [Input(one.name, one.source, one.plane) for one in listed if not one.lost]
    prepared = prepare(found, folder, settings)
    results, _ = _work(prepared, folder, settings, (stage,), in_job=True)
    entries = _entries(results, prepared)
    images = {image.name: image for image in prepared.images}
    done = [
        one.now(images.get(one.name), stage, entries[one.name]) if one.name in entries else one
        for one in listed
    ]
    write_job(manifest, done)


def _entries(results: Sequence[ImageResult], prepared: Prepared) -> dict[str, dict[str, Any]]:
    images = {image.name: image for image in prepared.images}
    return {one.name: entry_of(one, images.get(one.name)) for one in results}


def _work(
    prepared: Prepared,
    folder: Path,
    settings: Settings,
    stages: Sequence[str],
    *,
    restart: bool = False,
    verify: bool = False,
    in_job: bool = False,
) -> tuple[list[ImageResult], int]:
    """Results of all images in no order, and on how many of them there was something to do."""
    results: list[ImageResult] = []
    for image in prepared.images if verify else []:
        with locked(image.work, image.name):
            remove_damaged(folder, image.name)
    todo: list[tuple[Image, list[str]]] = []
    for image in prepared.images:
        needed = list(stages) if restart else stages_to_run(image, stages)
        if needed:
            todo.append((image, needed))
        else:
            results.append(result_of(image, "skipped", stages))
    results += [
        ImageResult(bad.name, bad.source, "failed", str(error), bad.plane)
        for bad, error in prepared.failed
    ]
    for bad in results:
        if bad.status == "failed":
            log.error("%s", bad.error)
    if todo:
        _announce(prepared, todo, folder, stages)
        results += _run_all(todo, settings, stages, restart, in_job)
    elif not prepared.failed:
        log.info("nothing to do: %s finished in %s", counted(len(results), "image"), folder)
    return results, len(todo)


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


def _announce(
    prepared: Prepared, todo: Sequence[tuple[Image, list[str]]], out: Path, stages: Sequence[str]
) -> None:
    images = [image for image, _ in todo]
    pixels = sum(image.layout.plane[0] * image.layout.plane[1] for image in images)
    tiles = sum(prepared.tiles(image) for image in images)
    disk = sum(prepared.disk_bytes(image) for image in images)
    files = sum(prepared.file_count(image) for image in images)
    free = shutil.disk_usage(out).free
    log.info(
        "%s, %.1f Mpx, %d tiles; up to %s on disk in about %d files while it runs (%s free)",
        counted(len(images), "image"),
        pixels / 1e6,
        tiles,
        bytes_text(disk),
        files,
        bytes_text(free),
    )
    if disk > free:
        log.warning(
            "the disk may become full: compressed results are smaller than %s, but only %s are free",
            bytes_text(disk),
            bytes_text(free),
        )
    resumed = sum(needed != list(stages) for _, needed in todo)
    if resumed:
        log.info("%d of them go on where they stopped, or redo what new settings concern", resumed)


def _run_all(
    todo: Sequence[tuple[Image, list[str]]],
    settings: Settings,
    stages: Sequence[str],
    restart: bool,
    in_job: bool,
) -> list[ImageResult]:
    pixels: dict[str, int] = {}
    for image, needed in todo:
        for stage in needed:
            pixels[stage] = pixels.get(stage, 0) + image.layout.plane[0] * image.layout.plane[1]
    processes = choose_processes(todo, settings, in_job=in_job)
    results = []
    with (
        closing_input(),
        stop_on_signals() as stop,
        ProgressBar(pixels) as bar,
        open_engine(
            processes.kind, processes.workers, settings.engine.attempts, processes.gpus
        ) as engine,
    ):
        stop.watch(engine)
        in_flight = 1 if isinstance(engine, SerialEngine) else 2 * engine.workers
        with ThreadPoolExecutor(in_flight, "image") as pool:
            flying = {
                pool.submit(
                    _run_image, image, stages, restart, engine, bar, stop if in_job else None
                ): image
                for image, _ in todo
            }
            try:
                for future in as_completed(flying):
                    results.append(_outcome(flying[future], future))
            except BaseException:
                engine.stop()
                for future in flying:
                    future.cancel()
                raise
    return results


def _run_image(
    image: Image,
    stages: Sequence[str],
    restart: bool,
    engine: Engine,
    bar: ProgressBar,
    waiting: Stop | None,
) -> ImageResult:
    """One image through the stages. A stage that was done again may have changed what the next one
    reads, which is then needed too, though it was not before."""
    try:
        with locked(image.work, image.name) if waiting is None else _awaited(image, waiting):
            if restart:
                forget(image.out, image.name, STAGES[STAGES.index(stages[0]) :])
            needed = stages_to_run(image, stages)
            for stage in stages:
                if stage in needed or stage not in current_manifests(image):
                    bar.start(image.name, stage)
                    # Only infer imports torch: a second, and 200 MB in each process.
                    run_stage = getattr(import_module(f"segpipe.stages.{stage}"), stage)
                    run_stage(image, engine, bar)
    except OSError as error:
        if isinstance(error, InputError):
            raise
        where = f" {error.filename}" if error.filename else ""
        raise InputError(f"{image.name}: {error.strerror or error}{where}") from error
    return result_of(image, "done", stages)


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


def _outcome(image: Image, future: Future[ImageResult]) -> ImageResult:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, SegpipeError) and not isinstance(error, Stopped):
        log.error("%s", error)
        return ImageResult(image.name, image.source, "failed", str(error), image.plane)
    raise error
