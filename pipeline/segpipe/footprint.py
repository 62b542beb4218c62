"""Memory that the processes of a job will take, from what they hold, and how many there may be.

    worker   libraries, the network's activations, and arrays of one region
    client   libraries, the scheduler, and some bands of the table; without workers it does their part

Memory grows with regions, windows and channels, and not with images. `tests/benchmarks/plan.py`
compares it with what jobs take: within 20 %.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segpipe.backend import EAGER, OPENVINO
from segpipe.machine import default_workers, usable_cores, usable_memory_bytes
from segpipe.models.memory import network_memory
from segpipe.segmenter import gpu_count, gpu_is_possible
from segpipe.segmenter.openvino import graph_is_kept
from segpipe.settings import Settings
from segpipe.stages.image import STAGES, Image
from segpipe.stages.reading import MOST_PIXELS

WORKER_BYTES = {OPENVINO: 210_000_000, EAGER: 430_000_000}
"""Of a worker that has run all stages, besides arrays: interpreter, libraries (torch among them for
eager alone), compiled loops. Fitted, as the other constants here, to peaks such as
`tests/benchmarks/plan.py` prints."""
TORCH_BYTES = 150_000_000
"""Of torch, where a process needs it besides: to translate a network that could not be kept, or to ask
whether a GPU that may be there is one."""
CLIENT_BYTES = 190_000_000
CLIENT_ALONE_BYTES = 60_000_000
"""What a process without workers holds besides what a worker does."""
ACTIVATION_SHARE = {OPENVINO: 0.8, EAGER: 1.75}
"""Memory that a backend takes for activations, of what they are: OpenVINO joins arrays in place,
torch leaves gaps between those that it frees."""
WEIGHTS_SHARE = {OPENVINO: 3.5, EAGER: 2}
"""Copies of the weights that are held at once: as kept, as read, as compiled."""
STITCH_BYTES_PER_PIXEL = 5.3
"""Of a region with its halo: labels and probabilities."""
COPIES = 3.5
"""Of a region's pixels: as they are read, as the pyramid is made of them, encoded."""
SMALL_JOB_PIXELS = 6_000_000
"""Below this, starting processes takes longer than the work."""
ROOMY_BYTES_PER_PIXEL = 5000
"""Of a window: more than any network of ours takes. Where there is as much for each core, what it takes
exactly does not matter, and the first time asking torch would be more than a second."""
EXPORT_BYTES = {"geojson": 280, "geoparquet": 210, "csv": 420, "anndata": 120, "tiff": 150}
"""On disk, an object, as `tests/benchmarks/exports.py` prints it: nuclei, all features of one channel.
Larger objects and more channels take more. Memory: 332 MB for 58,190 objects, 420 MB for 981,424."""
DECODED_WHOLE = frozenset({".png", ".jpg", ".jpeg"})


def network_bytes(image: Image) -> float:
    """Memory of the network and of its activations on a batch of windows."""
    model, plan = image.model, image.plan
    window = image.tiles.window_shape
    return _network_bytes(model.path, model.hash, window, model.halo, plan.batch, plan.backend)


@functools.lru_cache(maxsize=256)
def _network_bytes(
    path: Path, _hash: str, window: tuple[int, int], halo: int, batch: int, backend: str
) -> float:
    live, weights = network_memory(path, window, halo, batch, folded=backend == OPENVINO)
    return ACTIVATION_SHARE[backend] * live + WEIGHTS_SHARE[backend] * weights


def worker_bytes(image: Image, stages: Sequence[str] = STAGES) -> int:
    """Memory of a worker that does these stages of an image on the CPU, at its peak.

    The resident set without pages of files, as `segpipe.usage` measures it.
    """
    layout, plan = image.layout, image.plan
    size = np.dtype(layout.dtype).itemsize
    pixels = math.prod(image.grid.shard)
    inferring = 0.0
    if "infer" in stages:
        inferring += network_bytes(image)
        inferring += pixels * (size * len(layout.channels) + len(image.model.card.outputs))
    stitching = STITCH_BYTES_PER_PIXEL * math.prod(image.label_grid.shard)
    copy = size * layout.shape[0] * pixels
    tiling = COPIES * copy
    if image.source.suffix.lower() in DECODED_WHOLE:
        tiling += layout.shape[0] * math.prod(layout.full_shape) * size
    if layout.resolution.resampled:
        tiling += MOST_PIXELS * size * layout.shape[0]
    libraries = WORKER_BYTES[plan.backend]
    if "infer" in stages and plan.backend == OPENVINO and _asks_torch(image):
        libraries += TORCH_BYTES
    return int(libraries + max(copy + inferring + stitching, tiling))


def _asks_torch(image: Image) -> bool:
    if image.settings.infer.device == "auto" and gpu_is_possible():
        return True
    model = image.model
    return not graph_is_kept(model.hash, halo=model.halo, batch=image.plan.batch)


@dataclass(frozen=True)
class Processes:
    """Who does a job: this process alone (`serial`), or workers, and one process more per GPU."""

    kind: str
    workers: int
    gpus: int


def choose_processes(
    todo: Sequence[tuple[Image, Sequence[str]]], settings: Settings, *, in_job: bool = False
) -> Processes:
    """The processes for a job; their number cannot change a result.

    Parameters
    ----------
    todo
        Images, and which stages are to be done of each.
    in_job
        Whether this is a job of the workflow, which is told its number of cores.

    Raises
    ------
    SettingsError
        When the device is not there.
    """
    choice = settings.engine
    pixels = dict.fromkeys(STAGES, 0)
    for image, stages in todo:
        for stage in stages:
            pixels[stage] += math.prod(image.layout.plane)
    gpus = check_device(settings.infer.device) if pixels["infer"] else 0
    kind = choice.kind
    if kind == "auto":
        small = max(pixels.values()) < SMALL_JOB_PIXELS and (choice.workers is None or in_job)
        single = (choice.workers or usable_cores()) == 1
        kind = "serial" if small or single else "local"
    if kind == "serial":
        return Processes(kind, 1, gpus)
    if choice.workers is not None:
        return Processes(kind, choice.workers, gpus)
    client = CLIENT_BYTES + ("torch" in sys.modules) * TORCH_BYTES  # it measured or translated
    windows = max(image.plan.batch * math.prod(image.tiles.window_shape) for image, _ in todo)
    roomy = 2 * max(WORKER_BYTES.values()) + ROOMY_BYTES_PER_PIXEL * windows
    if usable_memory_bytes() - client > usable_cores() * roomy:
        return Processes(kind, usable_cores(), gpus)
    largest = max(worker_bytes(image, () if gpus else stages) for image, stages in distinct(todo))
    return Processes(kind, default_workers(largest, client), gpus)


def check_device(device: str) -> int:
    """How many GPUs are to be used.

    Raises
    ------
    SettingsError
        When the device is not there.
    """
    return gpu_count(device)


def distinct(todo: Sequence[tuple[Image, Sequence[str]]]) -> list[tuple[Image, Sequence[str]]]:
    """One of each kind of images that take the same memory: a folder may hold many thousands."""
    kinds = {
        (
            image.grid.shard,
            image.label_grid.shard,
            image.layout.full_shape if image.source.suffix.lower() in DECODED_WHOLE else None,
            image.layout.resolution.resampled,
            (image.layout.dtype, image.layout.shape[0], len(image.layout.channels)),
            (image.tiles.window_shape, image.model.hash),
            tuple(stages),
        ): (image, stages)
        for image, stages in todo
    }
    return list(kinds.values())


def client_bytes(todo: Sequence[tuple[Image, Sequence[str]]], kind: str) -> int:
    """Memory of the process that hands out the work, or does it all where the kind is serial."""
    if kind == "serial":
        return CLIENT_ALONE_BYTES + max(worker_bytes(*one) for one in distinct(todo))
    return CLIENT_BYTES
