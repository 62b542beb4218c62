"""A JobPlan as people read it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from segpipe.plan import ImagePlan, JobPlan
from segpipe.report import bytes_text
from segpipe.results import counted
from segpipe.stages.image import STAGES

SHOWN = 20
"""Images of which a line is shown; all are in the JSON."""


def plan_text(plan: JobPlan) -> Iterator[str]:
    """Lines about the model, each image, and the job."""
    for number, (name, error) in enumerate(plan.failed):
        if number == SHOWN:
            yield f"... and {len(plan.failed) - SHOWN} more"
            break
        yield f"cannot be used: {name}: {error}"
    if not plan.images:
        yield "no image can be used"
        return
    yield from _models(plan.images)
    yield ""
    yield (
        f"{'image':<28}{'pixels':>17}{'tiles':>8}{'window':>12}{'useful':>8}"
        f"{'Tflop':>9}{'worker':>9}{'disk':>10}{'files':>7}  to do"
    )
    for image in plan.images[:SHOWN]:
        yield _line(image)
    if len(plan.images) > SHOWN:
        yield f"... and {counted(len(plan.images) - SHOWN, 'image')} more (all of them by --json FILE)"
    yield ""
    yield from _scales(plan.images)
    yield from _copies(plan.images)
    yield from _job(plan)


def _models(images: Sequence[ImagePlan]) -> Iterator[str]:
    said = set()
    for image in images:
        model, numeric = image.model, image.numeric
        key = (model.hash, tuple(vars(numeric).items()), image.region)
        if key in said:
            continue
        said.add(key)
        exact = "exact" if model.exact else "NOT exact: its tiles may show"
        yield f"model         {model.card.name} ({model.hash}), {exact}"
        yield (
            f"geometry      context {model.context} px, halo {numeric.halo}, stride {numeric.stride}, "
            f"core {numeric.core}, region {image.region}"
        )
        views = ", mean of 8 views" if numeric.tta else ""
        skips = "skips empty tiles" if numeric.skip_empty else "infers all tiles"
        layout = f", {numeric.memory_format}" if numeric.backend == "eager" else ""
        yield (
            f"numeric plan  {numeric.backend}{layout}, {numeric.precision}, batch {numeric.batch}, "
            f"{counted(numeric.threads, 'thread')} per process{views}, {skips}"
        )


def _scales(images: Sequence[ImagePlan]) -> Iterator[str]:
    """Of images that are not worked on at full resolution: how large, and what is read for it."""
    found = [image.resolution for image in images if image.resolution.scale != 1.0]
    counts = Counter((one.scale, one.level, one.resampled) for one in found)
    for (scale, level, resampled), count in counts.most_common(SHOWN):
        wide = f"{1 / scale:.4g} times wider" if scale < 1 else f"{scale:.4g} times narrower"
        how = "resampled" if resampled else "taken as it is"
        yield (
            f"scale         {counted(count, 'image')} worked on {wide} than the file; level {level} "
            f"of the file is {how}; results are in the file's own pixels"
        )


def _copies(images: Sequence[ImagePlan]) -> Iterator[str]:
    """Of images that OUT will not hold at full resolution."""
    found = [image for image in images if not image.copied]
    if found:
        size = sum(math.prod(one.shape) * np.dtype(one.dtype).itemsize for one in found)
        yield (
            f"copy          {counted(len(found), 'image')} read where they are: OUT gets coarse levels "
            f"of them; tile.copy=always would add up to {bytes_text(size)}"
        )


def _line(image: ImagePlan) -> str:
    channels, height, width = image.shape
    name = image.name if len(image.name) < 28 else f"...{image.name[-24:]}"
    pixels = f"{width} x {height}" + (f" x {channels}" if channels > 1 else "")
    todo = "all" if image.stages == STAGES else ", ".join(image.stages) or "nothing"
    return (
        f"{name:<28}{pixels:>17}{image.tiles:>8}{f'{image.window[1]} x {image.window[0]}':>12}"
        f"{100 * image.useful_share:>6.0f} %{image.operations / 1e12:>9.3g}"
        f"{bytes_text(image.worker_bytes):>9}{bytes_text(image.disk_bytes):>10}{image.files:>7}  {todo}"
    )


def _job(plan: JobPlan) -> Iterator[str]:
    todo = plan.todo
    if not todo:
        yield f"nothing to do: {counted(len(plan.images), 'image')} finished"
        return
    pixels = sum(image.pixels for image in todo)
    tiles = sum(image.tiles for image in todo)
    teraflop = sum(image.operations for image in todo) / 1e12
    yield (
        f"to do         {counted(len(todo), 'image')}, {pixels / 1e6:,.1f} Mpx, "
        f"{counted(tiles, 'tile')}, {teraflop:,.3g} Tflop at most: tiles that hold nothing are skipped"
    )
    known = [image for image in todo if image.skipped is not None]
    if known:
        spared = sum((image.skipped or 0) * image.tiles for image in known)
        share = 100 * spared / sum(image.tiles for image in known)
        yield (
            f"left out      about {share:.0f} % of the tiles of {counted(len(known), 'image')}: "
            "bare glass, or outside the mask"
        )
    who = plan.processes
    if who.kind == "serial":
        processes = f"this process alone, {bytes_text(plan.memory_bytes)}"
    else:
        gpus = f", {who.gpus} more with a GPU each" if who.gpus else ""
        processes = (
            f"{counted(who.workers, 'worker')}{gpus}, and one process that leads "
            f"({bytes_text(plan.client_bytes)}); together {bytes_text(plan.memory_bytes)}"
        )
    yield f"processes     {processes} of {bytes_text(plan.free_memory_bytes)} that are free"
    if plan.memory_bytes > plan.free_memory_bytes:
        yield (
            "              THIS IS TOO MUCH: fewer --workers, a smaller tile.core, or a smaller "
            "tile.region need less"
        )
    disk = sum(image.disk_bytes for image in todo)
    files = sum(image.files for image in todo)
    line = f"disk          at most {bytes_text(disk)} in about {files:,} files while it runs"
    sample = plan.sample
    if sample is not None:
        share = pixels / sample.pixels[1]
        line += (
            f"; by the sample about {bytes_text(sample.disk_bytes * share)}, of which "
            f"{bytes_text(sample.results_bytes * share)} are results"
        )
    yield f"{line}; {bytes_text(plan.free_disk_bytes)} are free"
    yield from _exports(plan)
    if sample is None:
        return
    if plan.seconds is None:
        yield "time          not told: some stages are done already"
    else:
        yield (
            f"time          about {duration_text(plan.seconds)}, by a sample of "
            f"{sample.pixels[1] / 1e6:.1f} Mpx that took {sample.seconds[1]:.0f} s, "
            f"{sample.start_seconds:.0f} of them to start"
        )
    peaks = ", ".join(bytes_text(peak) for peak in sample.usage.peaks_bytes if peak > 5e7)
    yield f"memory        of the sample's processes: {peaks}"


def _exports(plan: JobPlan) -> Iterator[str]:
    """What exports add: how many objects there will be is known by a sample alone."""
    if not plan.exports:
        return
    each = plan.export_bytes_per_object
    line = (
        f"exports       {', '.join(plan.exports)}: for nuclei some {bytes_text(each * 1e6)} of disk"
    )
    if plan.objects is None:
        yield f"{line} per 1,000,000 objects; how many there are, a sample would tell"
    else:
        yield (
            f"{line} per 1,000,000 objects; as dense as in the sample, {plan.objects:,} make "
            f"{bytes_text(each * plan.objects)}"
        )


def duration_text(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h" if hours >= 48 else f"{hours} h {minutes} min"
