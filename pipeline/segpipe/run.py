"""`predict`: a folder through the four stages on one set of live workers, several images in flight."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from segpipe.compute import STOPPED, Engine, SerialEngine, open_engine
from segpipe.errors import SettingsError, Stopped
from segpipe.footprint import Processes, check_device, choose_processes
from segpipe.image_run import Work, run_image, stages_to_run
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
from segpipe.stages.image import STAGES, Image
from segpipe.stages.reading import closing_input
from segpipe.stopping import Stop, stop_on_signals
from segpipe.verifying import remove_damaged
from segpipe.whole_images import divided, run_whole

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
    work = Work(tuple(stages), restart, settings.engine.attempts, wait=in_job)
    with contextlib.ExitStack() as held:
        held.enter_context(closing_input())
        stop = held.enter_context(stop_on_signals())
        _translate([image for image, needed in todo if "infer" in needed], stop)
        processes = choose_processes(todo, settings, in_job=in_job)
        bar = held.enter_context(ProgressBar(pixels))
        engine = held.enter_context(_started(processes, settings.engine.attempts, stop))
        whole, passes = divided(todo, work, engine)
        # One thread more: that in which images are handed out whole does nothing but wait.
        in_flight = 1 if isinstance(engine, SerialEngine) else 2 * engine.workers + 1
        with ThreadPoolExecutor(in_flight, "image") as pool:
            flying: list[Future[ImageResult | list[ImageResult]]] = []
            if whole:
                flying.append(pool.submit(run_whole, whole, work, engine, bar))
            flying += [pool.submit(run_image, one, work, engine, bar, stop) for one, _ in passes]
            results: list[ImageResult] = []
            try:
                for future in as_completed(flying):
                    found = future.result()
                    results += found if isinstance(found, list) else [found]
            except BaseException:
                engine.stop()
                for future in flying:
                    future.cancel()
                raise
    return results


def _translate(images: Sequence[Image], stop: Stop) -> None:
    """Have networks ready for the processes that are going to load them."""
    if images:
        from segpipe.stages.infer import translate_networks

        translate_networks(images)
    if stop.asked:
        raise Stopped(STOPPED)


@contextlib.contextmanager
def _started(processes: Processes, attempts: int, stop: Stop) -> Iterator[Engine]:
    """The engine, which stops when asked; Ctrl-C reaches workers that only start, and ends them."""
    with contextlib.ExitStack() as held:
        try:
            opened = open_engine(processes.kind, processes.workers, attempts, processes.gpus)
            engine = held.enter_context(opened)
        except SettingsError:
            if stop.asked:
                raise Stopped(STOPPED) from None
            raise
        stop.watch(engine)
        yield engine
