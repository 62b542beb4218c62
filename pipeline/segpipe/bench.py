"""`segpipe bench`: one fixed job, so that machines and versions can be compared.

A field of nuclei that is the same everywhere (`NucleiField`, seed 5, no bare background) goes through
the four stages, each a command of its own, so that one's peak of memory does not hide another's. Each
stage stands beside its floor, measured in the same run on the same number of processes: floors.py says
what they are.

A command must start Python, its processes and the network before it sees a pixel. What this takes is
measured by the same command over as many tiles of a few pixels as there are processes (the less of two
runs), told by itself, and no part of the rate per core and of the share of the floor.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from segpipe import __version__
from segpipe.bench_row import HEADER, Row, together
from segpipe.demo import write_field
from segpipe.errors import ModelError, SegpipeError, SettingsError
from segpipe.floors import SAMPLE, Floor, measure_floor
from segpipe.geometry import ceil_to
from segpipe.inputs import Input
from segpipe.machine import cpu_name, default_workers, memory_bytes, usable_cores
from segpipe.models.modelfile import find_model, read_card
from segpipe.prepare import load_model, prepare
from segpipe.records import write_json
from segpipe.report import library_versions
from segpipe.settings import Settings, load_settings
from segpipe.stages.image import STAGES, Image
from segpipe.synthetic import NucleiField
from segpipe.usage import Usage, watch, why_it_ended

log = logging.getLogger(__name__)

FORMAT = 1
"""Of the JSON; raised when a key changes its meaning, or the job is another one."""
SEED = 5
BYTES_PER_PIXEL = 8
"""On disk, half as much again as was seen."""
BYTES_PER_WORKER = 1_000_000_000
"""Of memory, to choose the number of processes: infer was seen to take 0.7 GB."""
STARTS = 2


@dataclass(frozen=True)
class Job:
    """What is run."""

    size: int
    workers: int
    model: str
    settings: Settings
    overrides: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        size: int,
        model: str,
        workers: int | None,
        device: str | None,
        overrides: Sequence[str],
    ) -> Job:
        """The job, with the number of workers that this machine suggests.

        Raises
        ------
        SettingsError, ModelError
            Wrong settings, or no such model.
        """
        options = {"infer.model": model, "infer.device": device, "engine.workers": workers}
        settings = load_settings(None, overrides, options)
        if read_card(find_model(settings.infer.model)).classes:
            raise SettingsError(f"{model} gives classes; bench measures models of objects")
        count = settings.engine.workers or default_workers(BYTES_PER_WORKER)
        return cls(size, count, settings.infer.model, settings, tuple(overrides))

    @property
    def gpus(self) -> int:
        """GPUs that infer will use."""
        device = self.settings.infer.device
        if device == "cpu":
            return 0
        from segpipe.segmenter import device_type, gpu_count

        return 0 if device_type(device) == "cpu" else max(1, gpu_count(device))

    def command(self, stage: str, image: Path, out: Path, *more: str) -> list[str]:
        """A stage as a command; `more` are settings."""
        kind = self.settings.engine.kind
        if kind == "auto":
            kind = "serial" if self.workers == 1 else "local"
        sets = [part for one in (*self.overrides, *more) for part in ("-s", one)]
        return [
            *(sys.executable, "-m", "segpipe.cli", "stage", stage, str(image), "-o", str(out)),
            *("-m", self.model, "--device", self.settings.infer.device),
            *("--engine", kind, "--workers", str(self.workers), *sets),
        ]

    def changed(self) -> dict[str, Any]:
        """The settings that are not the default, but for the model and the number of workers."""
        ours, default = (one.model_dump(mode="json") for one in (self.settings, Settings()))
        found = {
            f"{section}.{key}": value
            for section, keys in ours.items()
            for key, value in keys.items()
            if value != default[section][key]
        }
        return {key: found[key] for key in found if key not in ("infer.model", "engine.workers")}


def run_bench(job: Job, told: Path | None, say: Callable[[str], None]) -> None:
    """Run the job; say a line per stage as it comes, and write the JSON when all is done.

    Raises
    ------
    SettingsError, ModelError
        Before anything is run: `told` cannot be written, no space in the temporary folder, a model
        that does not take a field of one channel.
    SegpipeError
        When a stage fails, with what it said last.
    """
    if told is not None:
        check_writable(told)
    header = describe(job)
    rows = []
    try:
        with tempfile.TemporaryDirectory(prefix="segpipe-bench-") as temporary:
            check_space(Path(temporary), job)
            for line in _described(header):
                say(line)
            say(HEADER)
            for row in rows_of(job, Path(temporary)):
                say(row.line())
                rows.append(row)
    except OSError as error:
        where = error.filename or tempfile.gettempdir()
        raise SegpipeError(
            f"cannot write {where}: {error.strerror or error}; name another folder by TMPDIR"
        ) from error
    if told is not None:
        write_json(told, header | {"stages": [asdict(row) for row in rows]}, durable=False)


def check_writable(path: Path) -> None:
    """Raise a SettingsError unless the file can be written."""
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".segpipe-bench-"):
            pass
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from error


def check_space(folder: Path, job: Job) -> None:
    """Raise a SettingsError unless the temporary files of the job fit."""
    pixels = job.size**2 + job.workers * min(job.size, SAMPLE) ** 2  # each process copies a sample
    needed, free = BYTES_PER_PIXEL * pixels, shutil.disk_usage(folder).free
    if needed > free:
        raise SettingsError(
            f"a field of {job.size} x {job.size} may need {needed / 1e9:.1f} GB in {folder.parent}, "
            f"where {free / 1e9:.1f} GB are free; choose a smaller --size, or another folder by TMPDIR"
        )


def describe(job: Job) -> dict[str, Any]:
    """Machine, versions and job, for the JSON: neither names of hosts nor paths."""
    model = load_model(job.model)
    if len(model.card.channels) != 1:
        raise ModelError(
            f"the field of the bench has one channel, model {model.card.name} takes "
            f"{len(model.card.channels)} ({', '.join(model.card.channels)}); "
            "name another by -m"
        )
    return {
        "format": FORMAT,
        "versions": {
            "segpipe": __version__,
            "python": platform.python_version(),
            **library_versions(),
        },
        "machine": {
            "cpu": cpu_name(),
            "cores": usable_cores(),
            "memory_bytes": memory_bytes(),
            "system": f"{platform.system()} {platform.machine()}",
            "gpu": _gpu_name(job),
        },
        "model": {"name": model.card.name, "hash": model.hash},
        "size": job.size,
        "workers": job.workers,
        "settings": job.changed(),
    }


def _gpu_name(job: Job) -> str | None:
    if not job.gpus:
        return None
    import torch

    if not torch.cuda.is_available():
        return "mps"
    return f"{job.gpus} x {torch.cuda.get_device_name(0)}"


def _described(header: Mapping[str, Any]) -> Iterator[str]:
    machine, versions, model = header["machine"], header["versions"], header["model"]
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    yield f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB{gpu}"
    yield ", ".join(f"{name} {version}" for name, version in versions.items())
    size, workers = header["size"], header["workers"]
    processes = f"{workers} process{'es' if workers > 1 else ''}"
    yield f"{model['name']} {model['hash'][:12]}, {size} x {size} px, {processes}"
    for key, value in header["settings"].items():
        yield f"{key}: {json.dumps(value)}"


def rows_of(job: Job, folder: Path) -> Iterator[Row]:
    """The rows of the stages, and one of all together."""
    image, strip = folder / "in" / "field.tif", folder / "in" / "strip.tif"
    sample = folder / "in" / "sample.tif" if job.size > SAMPLE else image
    side = ceil_to(64, load_model(job.model).stride)
    log.info("making a field of %d x %d pixels", job.size, job.size)
    _write(image, job.size, job.size)
    _write(strip, side, side * job.workers)
    if sample != image:
        _write(sample, SAMPLE, SAMPLE)
    gpus = job.gpus
    parts: list[tuple[Usage, Usage, Floor]] = []
    for stage in STAGES:
        start = _started(job, stage, strip, side)
        log.info("%s: over the field", stage)
        used = _watch(job.command(stage, image, folder / "out"), folder)
        log.info("%s: its floor", stage)
        opened, on_gpu = _opened(job, image, folder), stage == "infer" and gpus > 0
        floor = measure_floor(stage, opened, sample, folder, 1 if on_gpu else job.workers)
        if on_gpu:
            floor = Floor(floor.seconds / gpus, floor.cpu_seconds)
        parts.append((used, start, floor))
        yield Row.of(stage, job.size**2, used, start, floor, "wall" if on_gpu else "cpu")
    yield Row.of("all", job.size**2, *together(parts), "wall" if gpus else "cpu")


def _started(job: Job, stage: str, strip: Path, side: int) -> Usage:
    """What the stage uses for as many tiles of `side` pixels as there are processes."""
    log.info("%s: starting, %d times over almost nothing", stage, STARTS)
    sizes = ("tile.chunk", "tile.core", "tile.region", "stitch.region")
    small = [*(f"{key}={side}" for key in sizes), "infer.skip_empty=false"]
    folder = strip.parents[1]
    begun = [
        _watch(job.command(stage, strip, folder / f"start-{number}", *small), folder)
        for number in range(STARTS)
    ]
    return min(begun, key=lambda used: used.cpu_seconds)


def _write(path: Path, height: int, width: int) -> None:
    write_field(NucleiField((height, width), seed=SEED, empty=0.0), path)


def _opened(job: Job, source: Path, folder: Path) -> Image:
    prepared = prepare([Input(source.stem, source)], folder / "out", job.settings)
    return prepared.images[0]


def _watch(command: Sequence[str], folder: Path) -> Usage:
    import subprocess

    said = folder / "log"
    said.unlink(missing_ok=True)
    try:
        return watch(command, log=said)
    except subprocess.CalledProcessError as error:
        raise SegpipeError(
            f"a stage ended with exit code {error.returncode}: {why_it_ended(said)}"
        ) from error
