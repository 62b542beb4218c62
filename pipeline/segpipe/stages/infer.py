"""infer: probabilities of every pixel, region by region, as the whole image would give them."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segpipe import store
from segpipe.compute import Engine, gpu_index
from segpipe.geometry import Lattice, TileGrid
from segpipe.inference import predict_region, read_box_of
from segpipe.segmenter import Segmenter, device_type, load_segmenter
from segpipe.stages.image import Image, Manifest, Progress, manifest_before, remove
from segpipe.stages.stage_run import Pass, StageRun
from segpipe.stages.tile import Range, ranges_of
from segpipe.store import create_array, write_shard


@dataclass(frozen=True)
class InferArgs:
    """What `tile` found out."""

    ranges: list[Range]


def infer(image: Image, engine: Engine, progress: Progress) -> Manifest:
    """Write the probabilities of every pixel: (K, Y, X) uint8."""
    before = manifest_before(image, "infer")
    run = StageRun(image, "infer", engine, progress, before)
    args = InferArgs(ranges_of(before))
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
    made_by = Counter(str(record.facts["made_by"]) for record in found.values())
    warnings = []
    if len(made_by) > 1:
        warnings.append(
            f"regions were inferred by {' and '.join(made_by)}: equal to rounding, not to the byte"
        )
    return run.finish({"made_by": made_by, "plan": vars(image.plan), "warnings": warnings})


def _create(image: Image) -> None:
    remove(image.probabilities)
    planes = (len(image.model.card.outputs),)
    create_array(image.probabilities, planes, image.grid, np.dtype(np.uint8))


@functools.lru_cache(maxsize=2)
def _segmenter(path: Path, _hash: str, device: str, plan: Any) -> Segmenter:
    """The network, loaded once per process."""
    return load_segmenter(
        path,
        device,
        threads=plan.threads,
        batch=plan.batch,
        memory_format=plan.memory_format,
        precision=plan.precision,
    )


def infer_region(work: Pass, name: str) -> dict[str, Any]:
    """Probabilities of one region."""
    image, region = work.image, work.lattice.named(name)
    plan = image.plan
    device = device_type(image.settings.infer.device)
    device = f"cuda:{gpu_index()}" if device == "cuda" else device
    segmenter = _segmenter(image.model.path, image.model.hash, device, plan)
    grid = TileGrid(image.layout.plane, plan.core, plan.halo, plan.stride)
    box = read_box_of(grid, region.box)
    block = store.read_box(image.zarr / "0", box, image.layout.channels)
    constant = all(low == high for low, high in work.args.ranges)
    probabilities = predict_region(
        block,
        box,
        grid,
        region.box,
        work.args.ranges,
        segmenter,
        skip=(lambda _: True) if constant else None,
    )
    shard = write_shard(image.probabilities, region.box, probabilities)
    work.records.add(name, shard, made_by=segmenter.made_by)
    return {}
