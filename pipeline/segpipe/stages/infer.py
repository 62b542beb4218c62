"""infer: probabilities of every pixel, region by region, as the whole image would give them."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segpipe import store
from segpipe.backend import EAGER
from segpipe.compute import Engine, gpu_index
from segpipe.geometry import Lattice
from segpipe.inference import predict_region, read_box_of
from segpipe.records import Record
from segpipe.segmenter import Segmenter, device_type, load_segmenter
from segpipe.settings import AUTO
from segpipe.stages.emptiness import empty_tiles
from segpipe.stages.image import Image, Manifest, NumericPlan, Progress, manifests_before, remove
from segpipe.stages.stage_run import Pass, StageRun
from segpipe.stages.tile import Range, ranges_of
from segpipe.store import clear_shard, create_array, write_shard

log = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class InferArgs:
    """What `tile` found out."""

    ranges: list[Range]
    empty: Array
    """Tiles that hold nothing: bool (rows, columns)."""


def infer(image: Image, engine: Engine, progress: Progress) -> Manifest:
    """Write the probabilities of every pixel: (K, Y, X) uint8."""
    before = manifests_before(image, "infer")["tile"]
    run = StageRun(image, "infer", engine, progress, before)
    args = InferArgs(ranges_of(before), empty_tiles(image, before))
    run.begin([image.probabilities], lambda: _create(image))
    found = run.over(
        "infer",
        infer_region,
        Lattice(image.layout.plane, image.grid.shard),
        args,
        array=image.probabilities,
        counts=True,
        on_gpu=True,
    )
    makers = (record.facts["made_by"] for record in found.values())
    made_by = Counter(maker for maker in makers if maker is not None)
    warnings = []
    if len(made_by) > 1:
        warnings.append(
            f"regions were inferred by {' and '.join(made_by)}: equal to rounding, not to the byte"
        )
    tiles, skipped = args.empty.size, int(args.empty.sum())
    if skipped:
        share = 100 * skipped / tiles
        log.info("%s: infer: %.1f %% of %d tiles hold nothing: skipped", image.name, share, tiles)
    return run.finish(
        {
            "made_by": made_by,
            "plan": vars(image.plan),
            "tiles": tiles,
            "tiles_skipped": skipped,
            "warnings": warnings,
        }
    )


def _create(image: Image) -> None:
    remove(image.probabilities)
    planes = (len(image.model.card.outputs),)
    create_array(image.probabilities, planes, image.grid, np.dtype(np.uint8))


def segmenter_of(image: Image) -> Segmenter:
    """The network of an image, loaded once per process."""
    device = device_type(image.settings.infer.device)
    device = f"cuda:{gpu_index()}" if device == "cuda" else device
    # a GPU may go on with what a CPU began
    goes_on = device != "cpu" and image.settings.infer.backend == AUTO
    backend = EAGER if goes_on else image.plan.backend
    return _segmenter(image.model.path, image.model.hash, device, backend, image.plan)


@functools.lru_cache(maxsize=2)
def _segmenter(path: Path, _hash: str, device: str, backend: str, plan: NumericPlan) -> Segmenter:
    return load_segmenter(
        path,
        device,
        threads=plan.threads,
        batch=plan.batch,
        memory_format=plan.memory_format,
        precision=plan.precision,
        backend=backend,
        core_only=True,
        tta=plan.tta,
    )


def infer_region(work: Pass, name: str) -> Record:
    """Probabilities of one region; 0 in tiles that hold nothing, of which a region may consist."""
    image, region = work.image, work.lattice.named(name)
    grid, empty = image.tiles, work.args.empty
    if all(empty[tile.index] for tile in grid.meeting(region.box)):
        return work.records.add(name, clear_shard(image.probabilities, region.box), made_by=None)
    segmenter = segmenter_of(image)
    box = read_box_of(grid, region.box)
    block = store.read_box(image.zarr / "0", box, image.layout.channels)
    probabilities = predict_region(
        block,
        box,
        grid,
        region.box,
        work.args.ranges,
        segmenter,
        skip=lambda tile: bool(empty[tile.index]),
    )
    shard = write_shard(image.probabilities, region.box, probabilities)
    return work.records.add(name, shard, made_by=segmenter.made_by)
