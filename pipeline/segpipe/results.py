"""What became of images, as the manifests of their stages tell it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segpipe.slide import THE_PLANE, Plane
from segpipe.stages.image import STAGES, Image
from segpipe.stages.manifest import current_manifests

log = logging.getLogger(__name__)

NAMED_FAILURES = 10
NAMED_CLASSES = 12


@dataclass
class ImageResult:
    """What became of one input."""

    name: str
    source: Path
    status: str
    """done, failed or skipped (done before)."""
    error: str | None = None
    plane: Plane = THE_PLANE
    objects: int | None = None
    """Of a model of classes: how many of them occur."""
    classes: tuple[str, ...] = ()
    """Their names, where the model gives each pixel a class."""
    tiles: int | None = None
    tiles_skipped: int | None = None
    """Because they hold nothing that the model would see."""
    failed_regions: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    """By stage: of its largest process, since that began."""
    seam_check: dict[str, Any] | None = None
    sizes: dict[str, Any] | None = None
    looked_at_px: int | None = None
    """Full-resolution pixels inside the user's mask; None where there is none."""


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


def result_of(image: Image, status: str, stages: Sequence[str]) -> ImageResult:
    """What the manifests say of an image, up to the last of these stages."""
    result = ImageResult(image.name, image.source, status, plane=image.plane)
    if image.model.card.classes:
        result.classes = tuple(image.model.card.outputs)
    for stage, manifest in current_manifests(image).items():
        if STAGES.index(stage) > STAGES.index(stages[-1]):
            break
        result.seconds[stage] = round(manifest.seconds, 3)
        if "peak_memory_bytes" in manifest.facts:
            result.peak_memory_bytes[stage] = manifest.facts["peak_memory_bytes"]
        result.failed_regions += [{"stage": stage} | dict(entry) for entry in manifest.failed]
        result.warnings += manifest.facts.get("warnings", [])
        if "tiles" in manifest.facts:
            result.tiles = manifest.facts["tiles"]
            result.tiles_skipped = manifest.facts["tiles_skipped"]
        if "objects" in manifest.facts:
            result.objects = manifest.facts["objects"]
        result.seam_check = manifest.facts.get("seam_check")
        result.sizes = manifest.facts.get("sizes")
        result.looked_at_px = manifest.facts.get("looked_at_px")
    if result.failed_regions:
        result.status = "failed"
        result.error = f"{image.name}: {regions_text(result.failed_regions)}"
    return result


def regions_text(failed: Sequence[Mapping[str, Any]]) -> str:
    """What is said of an image of which these regions failed."""
    first = failed[0]
    return (
        f"{counted(len(failed), 'region')} failed, the rest is done; "
        f"first: {first['stage']} at {first['box']}: {first['error']}"
    )


def conclude(result: RunResult) -> None:
    """Log a line about all images, and one that names those that failed."""
    done = [image for image in result.images if image.status != "failed"]
    log.info(
        "%s done, %s, %d failed, in %.1f s; results in %s",
        counted(len(done), "image"),
        found_text((image.objects, image.classes) for image in done),
        len(result.failed),
        result.seconds,
        result.out,
    )
    log_failed([bad.name for bad in result.failed], result.out)


def found_text(found: Iterable[tuple[int | None, Sequence[str]]]) -> str:
    """What was found in images: of each how many objects, and the classes where it has none.

    >>> found_text([(3, ()), (None, ()), (1200, ())]), found_text([(2, ("ground", "disc"))])
    ('1,203 objects', 'pixels in 2 classes (ground, disc)')
    """
    objects: int | None = None
    names: dict[str, None] = {}
    for count, classes in found:
        if classes:
            names |= dict.fromkeys(classes)
        else:
            objects = (objects or 0) + (count or 0)
    told = [] if names and objects is None else [counted(objects or 0, "object")]
    if names:
        more = ", ..." if len(names) > NAMED_CLASSES else ""
        listed = ", ".join(list(names)[:NAMED_CLASSES])
        told.append(f"pixels in {len(names)} classes ({listed}{more})")
    return ", ".join(told)


def log_failed(names: Sequence[str], out: Path) -> None:
    """Name the images that failed, if any."""
    if names:
        hidden = len(names) - NAMED_FAILURES
        more = f" and {hidden} more" if hidden > 0 else ""
        where = out / "run.json"
        log.error("failed: %s%s; why is in %s", ", ".join(names[:NAMED_FAILURES]), more, where)


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
