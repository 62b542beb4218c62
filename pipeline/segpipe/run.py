"""`predict`: a folder through the four stages on one set of live workers, several images in flight."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segpipe.compute import STOPPED, Engine, SerialEngine, open_engine, usable_cores
from segpipe.errors import SegpipeError, SettingsError, Stopped
from segpipe.inputs import Input, find_inputs
from segpipe.prepare import BYTES_PER_WORKER, Prepared, prepare
from segpipe.progress import ProgressBar
from segpipe.records import locked
from segpipe.report import write_run_json
from segpipe.settings import Settings
from segpipe.stages.image import STAGES, Image, Manifest, current_manifest, work_folder
from segpipe.stages.infer import infer
from segpipe.stages.measure import measure, preview_path, table_path
from segpipe.stages.stitch import stitch
from segpipe.stages.tile import tile

log = logging.getLogger(__name__)

FUNCTIONS = {"tile": tile, "infer": infer, "stitch": stitch, "measure": measure}
NEEDS = {"tile": (), "infer": ("tile",), "stitch": ("infer",), "measure": ("infer", "stitch")}
"""Stages whose arrays a stage reads."""
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
    found = find_inputs([Path(path) for path in inputs], folder)
    if restart:
        for one in found:
            forget(folder, one.name)
    prepared = prepare(found, folder, settings)
    results: list[ImageResult] = []
    todo: list[tuple[Image, list[str]]] = []
    for image in prepared.images:
        needed = stages_to_run(image, stages)
        if needed:
            todo.append((image, needed))
        else:
            results.append(_result(image, "skipped"))
    results += [
        ImageResult(bad.name, bad.source, "failed", str(error)) for bad, error in prepared.failed
    ]
    for bad in results:
        if bad.status == "failed":
            log.error("%s", bad.error)
    if todo:
        _announce(prepared, todo, folder, stages)
        results += _run_all(todo, settings)
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


def forget(out: Path, name: str) -> None:
    """Remove what OUT holds of an image."""
    shutil.rmtree(work_folder(out, name), ignore_errors=True)
    shutil.rmtree(out / f"{name}.ome.zarr", ignore_errors=True)
    for stage in STAGES:
        (out / "manifests" / f"{name}.{stage}.json").unlink(missing_ok=True)


def stages_to_run(image: Image, wanted: Sequence[str] = STAGES) -> list[str]:
    """Stages that are not done with these settings, and those whose arrays they lack."""
    outputs = {
        "tile": [image.zarr / "0" / "zarr.json"],
        "infer": [image.probabilities / "zarr.json"],
        "stitch": [image.labels / "zarr.json"],
        "measure": [table_path(image)]
        + ([preview_path(image)] if image.settings.measure.preview else []),
    }

    def is_there(stage: str) -> bool:
        return all(path.exists() for path in outputs[stage])

    stale: set[str] = set()
    for stage in STAGES:
        manifest = current_manifest(image, stage)
        final = stage != "infer"  # probabilities are work: `clean` may have removed them
        if manifest is None or manifest.failed or (final and not is_there(stage)):
            stale.add(stage)
    needed = stale & set(wanted)
    for stage in reversed(STAGES):
        if stage in needed:
            needed |= {earlier for earlier in NEEDS[stage] if not is_there(earlier)} & set(wanted)
    return [stage for stage in STAGES if stage in needed]


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


def _run_all(todo: Sequence[tuple[Image, list[str]]], settings: Settings) -> list[ImageResult]:
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
    results = []
    with (
        _stop_on_signals() as stop,
        ProgressBar(pixels) as bar,
        open_engine(kind, choice.workers, choice.attempts, BYTES_PER_WORKER) as engine,
    ):
        stop.engines.append(engine)
        in_flight = 1 if isinstance(engine, SerialEngine) else 2 * engine.workers
        with ThreadPoolExecutor(in_flight, "image") as pool:
            flying = {
                pool.submit(_run_image, image, needed, engine, bar): image for image, needed in todo
            }
            try:
                for future in as_completed(flying):
                    results.append(_outcome(flying[future], future))
            except BaseException:
                stop.now()
                for future in flying:
                    future.cancel()
                raise
    return results


def _run_image(image: Image, needed: list[str], engine: Engine, bar: ProgressBar) -> ImageResult:
    with locked(image.work, image.name):
        for stage in needed:
            bar.start(image.name, stage, 0)
            FUNCTIONS[stage](image, engine, bar)
    return _result(image, "done")


def _outcome(image: Image, future: Future[ImageResult]) -> ImageResult:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, SegpipeError) and not isinstance(error, (Stopped, SettingsError)):
        log.error("%s", error)
        return ImageResult(image.name, image.source, "failed", str(error))
    raise error


def _result(image: Image, status: str) -> ImageResult:
    """What the manifests say of an image."""
    result = ImageResult(image.name, image.source, status)
    for stage in STAGES:
        manifest = Manifest.read(image.manifest_path(stage))
        if manifest is None:
            continue
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
    for bad in result.failed:
        log.error("failed: %s", bad.error)


# --- stopping -------------------------------------------------------------------------------------


@dataclass
class _Stop:
    engines: list[Engine] = field(default_factory=list)
    asked: bool = False

    def now(self) -> None:
        for engine in self.engines:
            engine.stop()


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[_Stop]:
    """SIGINT and SIGTERM stop the engines; what is done stays done."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(_number: int, _frame: object) -> None:
        if stop.asked:  # asked twice: now
            raise KeyboardInterrupt
        stop.asked = True
        log.warning("stopping; the same command goes on from here")
        stop.now()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
        if stop.asked:
            raise Stopped(STOPPED)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_images(out: Path) -> list[Input]:
    """The images that OUT knows, by the names given to them."""
    from segpipe.records import read_json

    known = read_json(out / "manifests" / "images.json")
    if not isinstance(known, dict):
        raise SettingsError(f"{out} holds no results of segpipe")
    return [Input(name, Path(source)) for name, source in sorted(known.items())]


def clean(out: Path) -> list[str]:
    """Remove work arrays of the images that are done; the names of those that are not."""
    unfinished = []
    for one in find_images(out):
        work = work_folder(out, one.name)
        manifest = Manifest.read(out / "manifests" / f"{one.name}.measure.json")
        if manifest is None or manifest.failed:
            unfinished.append(one.name)
            continue
        if work.exists():
            with locked(work, one.name):
                shutil.rmtree(work)
    top = out / ".segpipe"
    for place, _, _ in sorted(os.walk(top), reverse=True):
        with contextlib.suppress(OSError):
            Path(place).rmdir()
    return unfinished
