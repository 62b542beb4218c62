"""`predict`: a folder through the four stages on one set of live workers, several images in flight."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from segpipe.compute import Engine, SerialEngine, open_engine, usable_cores
from segpipe.errors import InputError, SegpipeError, SettingsError, Stopped
from segpipe.inputs import find_inputs
from segpipe.prepare import BYTES_PER_WORKER, Prepared, prepare
from segpipe.progress import ProgressBar
from segpipe.records import locked
from segpipe.report import write_run_json
from segpipe.settings import Settings
from segpipe.stages.image import (
    NEEDS,
    STAGES,
    Image,
    current_manifests,
    forget,
    is_whole,
)
from segpipe.stopping import stop_on_signals
from segpipe.verifying import remove_damaged

log = logging.getLogger(__name__)

SMALL_JOB_PIXELS = 6_000_000
"""Below this, starting processes takes longer than the work."""


@dataclass
class ImageResult:
    """What became of one input."""

    name: str
    source: Path
    status: str
    """done, failed or skipped (done before)."""
    error: str | None = None
    objects: int | None = None
    failed_regions: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """What became of all of them."""

    images: list[ImageResult]
    out: Path
    seconds: float

    @property
    def failed(self) -> list[ImageResult]:
        """Those to name."""
        return [image for image in self.images if image.status == "failed"]

    @property
    def exit_code(self) -> int:
        """0 all done, 1 an input failed."""
        return 1 if self.failed else 0


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
    folder = _writable(Path(out))
    if "infer" in stages and settings.infer.device not in ("auto", "cpu"):
        _gpu_count(
            settings.infer.device
        )  # a device that is not here: said before the plan is written
    search = find_inputs([Path(path) for path in inputs], folder)
    prepared = prepare(search, folder, settings)
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
            results.append(_result(image, "skipped", stages))
    results += [
        ImageResult(bad.name, bad.source, "failed", str(error)) for bad, error in prepared.failed
    ]
    for bad in results:
        if bad.status == "failed":
            log.error("%s", bad.error)
    if todo:
        _announce(prepared, todo, folder, stages)
        results += _run_all(todo, settings, stages, restart)
    elif not prepared.failed:
        log.info("nothing to do: %s finished in %s", counted(len(results), "image"), folder)
    results.sort(key=lambda result: result.name)
    result = RunResult(results, folder, time.perf_counter() - started)
    write_run_json(result, prepared, settings)
    _conclude(result, len(todo))
    return result


def _writable(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".segpipe-probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise SettingsError(f"cannot write into {out}: {error.strerror}") from error
    return out.resolve()


def stages_to_run(image: Image, wanted: Sequence[str] = STAGES) -> list[str]:
    """Those of the wanted stages that are not done with these settings, or whose arrays are lacking.

    Probabilities are work, which `clean` removes: they are made again only for a stage that reads
    them.
    """
    needed = set()
    current = current_manifests(image)
    for stage in STAGES:
        manifest = current.get(stage)
        lacks = stage != "infer" and not _has_output(image, stage)
        if manifest is None or manifest.failed or lacks:
            needed.add(stage)
    needed &= set(wanted)
    for stage in reversed(STAGES):
        if stage in needed:
            needed |= {before for before in NEEDS[stage] if not is_whole(image, before)}
            needed &= set(wanted)
    return [stage for stage in STAGES if stage in needed]


def _has_output(image: Image, stage: str) -> bool:
    if stage != "measure":
        return is_whole(image, stage)
    files = [image.table] + [image.preview] * image.settings.measure.preview
    return all(path.exists() for path in files)


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
        _bytes(disk),
        files,
        _bytes(free),
    )
    if disk > free:
        log.warning(
            "the disk may become full: compressed results are smaller than %s, but only %s are free",
            _bytes(disk),
            _bytes(free),
        )
    resumed = sum(needed != list(stages) for _, needed in todo)
    if resumed:
        log.info("%d of them go on where they stopped, or redo what new settings concern", resumed)


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def _run_all(
    todo: Sequence[tuple[Image, list[str]]],
    settings: Settings,
    stages: Sequence[str],
    restart: bool,
) -> list[ImageResult]:
    pixels: dict[str, int] = {}
    for image, needed in todo:
        for stage in needed:
            pixels[stage] = pixels.get(stage, 0) + image.layout.plane[0] * image.layout.plane[1]
    choice = settings.engine
    workers = choice.workers or usable_cores()
    kind = choice.kind
    if kind == "auto":
        small = max(pixels.values()) < SMALL_JOB_PIXELS and choice.workers is None
        kind = "serial" if small or workers == 1 else "local"
    gpus = _gpu_count(settings.infer.device) if "infer" in pixels else 0
    results = []
    with (
        stop_on_signals() as stop,
        ProgressBar(pixels) as bar,
        open_engine(kind, choice.workers, choice.attempts, BYTES_PER_WORKER, gpus) as engine,
    ):
        stop.watch(engine)
        in_flight = 1 if isinstance(engine, SerialEngine) else 2 * engine.workers
        with ThreadPoolExecutor(in_flight, "image") as pool:
            flying = {
                pool.submit(_run_image, image, stages, restart, engine, bar): image
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


def _gpu_count(device: str) -> int:
    from segpipe.segmenter import gpu_count

    return gpu_count(device)


def _run_image(
    image: Image, stages: Sequence[str], restart: bool, engine: Engine, bar: ProgressBar
) -> ImageResult:
    """One image through the stages; what is needed is asked anew after each, because a stage that
    was done again may have changed what the next one reads."""
    try:
        with locked(image.work, image.name):
            if restart:
                forget(image.out, image.name, STAGES[STAGES.index(stages[0]) :])
            for stage in stages:
                if stage in stages_to_run(image, stages):
                    bar.start(image.name, stage)
                    # Only infer imports torch: a second, and 200 MB in each process.
                    run_stage = getattr(import_module(f"segpipe.stages.{stage}"), stage)
                    run_stage(image, engine, bar)
    except OSError as error:
        if isinstance(error, InputError):
            raise
        where = f" {error.filename}" if error.filename else ""
        raise InputError(f"{image.name}: {error.strerror or error}{where}") from error
    return _result(image, "done", stages)


def _outcome(image: Image, future: Future[ImageResult]) -> ImageResult:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, SegpipeError) and not isinstance(error, Stopped):
        log.error("%s", error)
        return ImageResult(image.name, image.source, "failed", str(error))
    raise error


def _result(image: Image, status: str, stages: Sequence[str]) -> ImageResult:
    """What the manifests say of an image, up to the last of these stages."""
    result = ImageResult(image.name, image.source, status)
    for stage, manifest in current_manifests(image).items():
        if STAGES.index(stage) > STAGES.index(stages[-1]):
            break
        result.seconds[stage] = round(manifest.seconds, 3)
        result.failed_regions += [{"stage": stage} | dict(entry) for entry in manifest.failed]
        result.warnings += manifest.facts.get("warnings", [])
        if "objects" in manifest.facts:
            result.objects = manifest.facts["objects"]
    if result.failed_regions:
        result.status = "failed"
        first = result.failed_regions[0]
        result.error = (
            f"{image.name}: {counted(len(result.failed_regions), 'region')} failed, the rest is done; "
            f"first: {first['stage']} at {first['box']}: {first['error']}"
        )
    return result


def _conclude(result: RunResult, started: int) -> None:
    if not started and not result.failed:
        return
    done = [image for image in result.images if image.status != "failed"]
    objects = sum(image.objects or 0 for image in done)
    log.info(
        "%s done, %s, %d failed, in %.1f s; results in %s",
        counted(len(done), "image"),
        counted(objects, "object"),
        len(result.failed),
        result.seconds,
        result.out,
    )
    if result.failed:
        names = [bad.name for bad in result.failed]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        where = result.out / "run.json"
        log.error("failed: %s%s; why is in %s", ", ".join(names[:10]), more, where)
