"""`plan`: what a job would be and need, before anything is run."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from segpipe.errors import SettingsError
from segpipe.footprint import (
    EXPORT_BYTES,
    Processes,
    choose_processes,
    client_bytes,
    distinct,
    worker_bytes,
)
from segpipe.image_run import stages_to_run
from segpipe.inputs import find_inputs
from segpipe.machine import usable_memory_bytes
from segpipe.prepare import Prepared, prepare
from segpipe.resampling import Resolution
from segpipe.sample import Sample, region_count, take_sample, window_operations
from segpipe.settings import Settings
from segpipe.stages.foresight import foreseen_skips
from segpipe.stages.image import STAGES, Image, Model, NumericPlan
from segpipe.stages.infer import translate_networks

KEPT = ("images.json", "plan.json")
"""What OUT keeps of earlier runs that decides how a run goes on: names and the plan."""


@dataclass(frozen=True)
class ImagePlan:
    """One image of a job.

    shape
        (C, Y, X) at the working resolution.
    full_shape
        (Y, X) of the full resolution.
    copied
        Whether OUT gets the image; else it is read where it is.
    useful_share
        Of the pixels that go through the network, those that are kept.
    operations
        Of the network, on all windows; tiles that hold nothing are found by the job and skipped.
    disk_bytes, files
        While it runs, were nothing compressed.
    worker_bytes
        Memory of a worker on the CPU.
    skipped
        Share of the tiles that will be left out as bare glass or outside the mask, as far as a coarse
        level of the file tells; None: not known before the run.
    stages
        Those that are to be done.
    """

    name: str
    source: Path
    shape: tuple[int, int, int]
    resolution: Resolution
    full_shape: tuple[int, int]
    copied: bool
    dtype: str
    model: Model
    numeric: NumericPlan
    region: int
    regions: int
    tiles: int
    window: tuple[int, int]
    useful_share: float
    operations: int
    worker_bytes: int
    disk_bytes: int
    files: int
    skipped: float | None
    stages: tuple[str, ...]

    @property
    def pixels(self) -> int:
        """Height times width."""
        return self.shape[1] * self.shape[2]


@dataclass(frozen=True)
class JobPlan:
    """All images of a job, and who does it.

    failed
        Inputs that cannot be used, and why.
    client_bytes, memory_bytes
        Of the process that hands out the work; of all processes together.
    free_memory_bytes, free_disk_bytes
        Of this machine now, and of the disk of OUT.
    sample
        None where there is nothing to do, or none was wanted.
    exports
        Formats that are to be written.
    objects
        About how many there will be, as dense as in the sample; None without one.
    """

    images: tuple[ImagePlan, ...]
    failed: tuple[tuple[str, str], ...]
    processes: Processes
    client_bytes: int
    memory_bytes: int
    free_memory_bytes: int
    free_disk_bytes: int
    sample: Sample | None
    exports: tuple[str, ...] = ()
    objects: int | None = None

    @property
    def todo(self) -> tuple[ImagePlan, ...]:
        """The images of which some stage is to be done."""
        return tuple(image for image in self.images if image.stages)

    @property
    def seconds(self) -> float | None:
        """An estimate of the whole job, where there is a sample; None where only parts are to be
        done anew, of which the sample tells nothing."""
        whole = [image for image in self.todo if image.stages == STAGES]
        if self.sample is None or len(whole) < len(self.todo):
            return None
        pixels, regions = (sum(getattr(one, key) for one in whole) for key in ("pixels", "regions"))
        return self.sample.job_seconds(pixels, regions, self.processes.workers)

    @property
    def export_bytes_per_object(self) -> int:
        """On disk, of all formats that are asked for: about."""
        return sum(EXPORT_BYTES[one] for one in self.exports)

    def to_json(self) -> dict[str, Any]:
        """For machines; bytes, seconds, pixels."""
        sample = None if self.sample is None else asdict(self.sample)
        return {
            "images": [_image_json(image) for image in self.images],
            "failed": [{"input": name, "error": error} for name, error in self.failed],
            "processes": asdict(self.processes),
            "client_bytes": self.client_bytes,
            "memory_bytes": self.memory_bytes,
            "free_memory_bytes": self.free_memory_bytes,
            "free_disk_bytes": self.free_disk_bytes,
            "seconds": self.seconds,
            "objects": self.objects,
            "exports": list(self.exports),
            "export_bytes_per_object": self.export_bytes_per_object,
            "sample": sample,
        }


def _image_json(image: ImagePlan) -> dict[str, Any]:
    fields: dict[str, Any] = {
        key: value for key, value in vars(image).items() if key not in ("model", "numeric")
    }
    model = image.model
    about = {key: getattr(model, key) for key in ("hash", "context", "halo", "stride", "exact")}
    return fields | {
        "source": str(image.source),
        "model": {"name": model.card.name} | about,
        "numeric": vars(image.numeric),
        "resolution": vars(image.resolution),
    }


def plan_job(
    inputs: Sequence[Path],
    out: Path | None,
    settings: Settings,
    *,
    sampled: bool,
    told: Callable[[str], None] = lambda line: None,
) -> JobPlan:
    """What `predict` would do with these inputs. Nothing is written into OUT.

    Parameters
    ----------
    out
        Where the job would write; what is done there is not planned again. None: a new folder.
    sampled
        Whether to run parts of the images, for an estimate of time: a minute or so.
    told
        Called with what is under way.

    Raises
    ------
    SettingsError, ModelError
        As `predict`.
    SegpipeError
        When the sample fails.
    """
    with tempfile.TemporaryDirectory(prefix="segpipe-plan-") as temporary:
        scratch = Path(temporary) / "out"
        (scratch / "manifests").mkdir(parents=True)
        if out is not None:
            if any(path.resolve() == out.resolve() for path in inputs):
                raise SettingsError(f"{out} is both searched and OUT; choose another OUT")
            for name in KEPT:
                if (out / "manifests" / name).is_file():
                    shutil.copy(out / "manifests" / name, scratch / "manifests" / name)
        prepared = prepare(find_inputs(inputs, scratch, settings.tile), scratch, settings)
        told(f"looked at {len(prepared.images) + len(prepared.failed)} inputs")
        todo = [(image, _stages(image, out)) for image in prepared.images]
        waiting = [(image, stages) for image, stages in todo if stages]
        processes = choose_processes(waiting, settings) if waiting else Processes("serial", 1, 0)
        sample = None
        if sampled and waiting:
            whole = [image for image, _ in waiting]
            translate_networks(whole)  # of two runs that are compared the first would do it
            sample = take_sample(whole, settings, processes, Path(temporary), told)
    memory = client = client_bytes(waiting, processes.kind) if waiting else 0
    objects = None if sample is None else _objects(sample, [image for image, _ in waiting])
    exports = settings.export.formats if any("measure" in stages for _, stages in waiting) else ()
    if processes.kind != "serial":
        memory += processes.workers * max(worker_bytes(*one) for one in distinct(waiting))
    return JobPlan(
        images=tuple(
            _plan_image(prepared, image, stages, processes.workers) for image, stages in todo
        ),
        failed=tuple((bad.name, str(error)) for bad, error in prepared.failed),
        processes=processes,
        client_bytes=client,
        memory_bytes=memory,
        free_memory_bytes=usable_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(_existing(out or Path())).free,
        sample=sample,
        exports=exports,
        objects=objects,
    )


def _objects(sample: Sample, images: Sequence[Image]) -> int:
    """About how many there will be: as dense as in the sample."""
    pixels = sum(math.prod(image.layout.plane) for image in images)
    return round(sample.objects * pixels / sample.pixels[1])


def _stages(image: Image, out: Path | None) -> tuple[str, ...]:
    return STAGES if out is None else tuple(stages_to_run(replace(image, out=out.resolve())))


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    found = folder.resolve()
    while not found.exists():
        found = found.parent
    return found


def _plan_image(
    prepared: Prepared, image: Image, stages: tuple[str, ...], workers: int
) -> ImagePlan:
    grid = image.tiles
    tiles = prepared.tiles(image)
    through = tiles * math.prod(grid.window_shape)
    return ImagePlan(
        name=image.name,
        source=image.source,
        shape=image.layout.shape,
        resolution=image.layout.resolution,
        full_shape=image.layout.full_shape,
        copied=image.layout.copied,
        dtype=image.layout.dtype,
        model=image.model,
        numeric=image.plan,
        region=image.region,
        regions=region_count(image, image.layout.plane),
        tiles=tiles,
        window=grid.window_shape,
        useful_share=math.prod(image.layout.plane) / through,
        operations=window_operations(image) * tiles,
        worker_bytes=worker_bytes(image),
        disk_bytes=prepared.disk_bytes(image),
        files=prepared.file_count(image, workers),
        skipped=foreseen_skips(image) if stages else None,
        stages=stages,
    )
