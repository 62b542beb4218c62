"""infer: probabilities of every pixel, region by region, as the whole image would give them.

Outside a user's mask every output is 0, so nothing is foreground there: M of the decode is M and mask.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.backend import EAGER, OPENVINO, choose_backend
from segpipe.compute import Engine, gpu_index
from segpipe.errors import ModelError, SettingsError
from segpipe.geometry import Box, Lattice, Tile
from segpipe.inference import predict_region, read_box_of
from segpipe.records import Record
from segpipe.segmenter import Segmenter, device_type, load_segmenter
from segpipe.settings import AUTO
from segpipe.stages.emptiness import skipped_tiles
from segpipe.stages.image import Image, NumericPlan, Progress
from segpipe.stages.manifest import Manifest, manifests_before
from segpipe.stages.places import remove
from segpipe.stages.reading import pixels_in
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

    def seen(self, image: Image, tile: Tile) -> bool:
        """Whether the network has to see a tile."""
        if self.empty[tile.index]:
            return False
        return image.mask is None or bool(mask_in(image, tile.keep).any())


def infer(image: Image, engine: Engine, progress: Progress) -> Manifest:
    """Write the probabilities of every pixel: (K, Y, X) uint8."""
    before = manifests_before(image, "infer")["tile"]
    run = StageRun(image, "infer", engine, progress, before)
    left_out = skipped_tiles(image, before)
    args = InferArgs(ranges_of(before), left_out.either)
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
    why = {
        "empty": int(left_out.empty.sum()),
        "glass": int(left_out.glass.sum()),
        "masked": sum(int(record.facts["masked"]) for record in found.values()),
    }
    tiles, skipped = args.empty.size, sum(why.values())
    whole = tiles > skipped and not run.done_before  # of a part, the time tells nothing
    saved = run.seconds * skipped / (tiles - skipped) if whole else None
    _tell_skipped(image, tiles, why, saved)
    return run.finish(
        {
            "made_by": made_by,
            "plan": vars(image.plan),
            "tiles": tiles,
            "tiles_skipped": skipped,
            "tiles_skipped_because": why,
            "seconds_saved": saved,
            "warnings": warnings,
        }
    )


def _tell_skipped(image: Image, tiles: int, why: Mapping[str, int], saved: float | None) -> None:
    """Log the share of tiles that the network did not see, why, and about how long that would take."""
    skipped = sum(why.values())
    if not skipped:
        return
    words = {"empty": "hold nothing", "glass": "are bare glass", "masked": "are outside the mask"}
    parts = [
        f"{100 * count / tiles:.1f} % of {tiles} tiles {words[key]}"
        for key, count in why.items()
        if count
    ]
    spared = "" if saved is None else f", some {saved:.0f} s spared"
    log.info("%s: infer: %s: skipped%s", image.name, "; ".join(parts), spared)


def mask_in(image: Image, box: Box) -> Array:
    """Which pixels of a box are inside the user's mask: (h, w) bool."""
    if image.mask is None:
        return np.ones(box.shape, bool)
    return image.mask.inside(box, image.scale, image.layout.full_shape)


def _create(image: Image) -> None:
    remove(image.probabilities)
    planes = (len(image.model.card.outputs),)
    create_array(image.probabilities, planes, image.grid, np.dtype(np.uint8))


def translate_networks(images: Iterable[Image]) -> None:
    """Have the networks of images translated for the CPU once, before many processes load them.

    What is wrong with one is told by whoever infers with it.
    """
    asked = {
        (image.model.path, image.model.hash, image.model.halo, image.plan.batch)
        for image in images
        if _backend_of(image) == OPENVINO
    }
    if not asked:
        return
    try:
        choose_backend(OPENVINO, on_gpu=False)
    except SettingsError:
        return
    from segpipe.segmenter.openvino import graph_is_kept, keep_graph

    for path, identity, halo, batch in sorted(asked):
        if not graph_is_kept(identity, halo=halo, batch=batch):
            log.info("translating the network of %s for the CPU", path.stem)
        with contextlib.suppress(SettingsError, ModelError):
            if not keep_graph(path, halo=halo, batch=batch):
                log.warning(
                    "the network of %s cannot be kept translated, so each process translates it; set "
                    "SEGPIPE_CACHE to a folder with room",
                    path.stem,
                )


def _backend_of(image: Image) -> str:
    """What runs the network of an image: a GPU may go on with what a CPU began."""
    infer = image.settings.infer
    goes_on = infer.backend == AUTO and device_type(infer.device) != "cpu"
    return EAGER if goes_on else image.plan.backend


def segmenter_of(image: Image) -> Segmenter:
    """The network of an image, loaded once per process."""
    device = device_type(image.settings.infer.device)
    device = f"cuda:{gpu_index()}" if device == "cuda" else device
    return _segmenter(image.model.path, image.model.hash, device, _backend_of(image), image.plan)


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
    grid, args = image.tiles, work.args
    tiles = list(grid.meeting(region.box))
    seen = {tile.index for tile in tiles if args.seen(image, tile)}
    masked = sum(
        tile.index not in seen
        and not args.empty[tile.index]
        and region.box.contains(Box(tile.keep.y0, tile.keep.x0, tile.keep.y0 + 1, tile.keep.x0 + 1))
        for tile in tiles
    )
    if not seen:
        shard = clear_shard(image.probabilities, region.box)
        return work.records.add(name, shard, made_by=None, masked=masked)
    segmenter = segmenter_of(image)
    box = read_box_of(grid, region.box)
    block = pixels_in(image, box, image.layout.channels)
    probabilities = predict_region(
        block,
        box,
        grid,
        region.box,
        work.args.ranges,
        segmenter,
        skip=lambda tile: tile.index not in seen,
    )
    if image.mask is not None:
        probabilities[:, ~mask_in(image, region.box)] = 0
    shard = write_shard(image.probabilities, region.box, probabilities)
    return work.records.add(name, shard, made_by=segmenter.made_by, masked=masked)
