"""The decode against scikit-image's seeded watershed, and what test-time augmentation adds.

    python tests/benchmarks/decode.py CONFIG MODEL

CONFIG is the YAML of a training, MODEL the file that came of it. On its validation images, from the same
quantised probabilities and the same thresholds:

    segpipe              components and bounded growth, `segpipe.memory.label_instances`
    watershed            the same seeds, then skimage.segmentation.watershed in the foreground
    foreground alone     4-connected components of the foreground, of min_area pixels and more
    segpipe, --tta       the first, on the mean over eight views
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from skimage.segmentation import watershed

from segpipe.components import Decode
from segpipe.evaluate import score_images
from segpipe.geometry import Box, TileGrid, ceil_to
from segpipe.inference import predict_region
from segpipe.memory import label_instances
from segpipe.models.card import ModelCard
from segpipe.models.modelfile import read_card
from segpipe.segmenter import load_segmenter
from segpipe.settings import Settings
from segpipe.stages.image import decode_of
from segpipe.training.batches import Prepared
from segpipe.training.dataset import load_samples, split_samples
from segpipe.training.settings import load_train_settings
from segpipe.training.weights import Weighing

Array = np.ndarray[Any, np.dtype[Any]]
CORE = 1024


def seeds_of(foreground: Array, interior: Array, decode: Decode) -> Array:
    """Seeds as the design says it, word by word; shares no code with segpipe."""
    mask = foreground >= decode.foreground
    seeds = np.zeros(mask.shape, np.int64)
    count = 0
    for level in (*decode.interior, None):
        components, found = ndimage.label(mask if level is None else mask & (interior >= level))
        holds_seed = np.zeros(found + 1, bool)
        np.logical_or.at(holds_seed, components.ravel(), seeds.ravel() > 0)
        areas = np.bincount(components.ravel(), minlength=found + 1)
        chosen = (areas >= decode.min_area) & ~holds_seed
        chosen[0] = False
        ids = np.zeros(found + 1, np.int64)
        ids[chosen] = count + 1 + np.arange(chosen.sum())
        count += int(chosen.sum())
        seeds = np.where(seeds > 0, seeds, ids[components])
    return seeds


def flooded(foreground: Array, interior: Array, decode: Decode) -> Array:
    """scikit-image's watershed from those seeds."""
    markers = seeds_of(foreground, interior, decode)
    mask = foreground >= decode.foreground
    labels: Array = watershed(-interior.astype(np.int16), markers, mask=mask)
    return labels


def components(foreground: Array, _interior: Array, decode: Decode) -> Array:
    """Connected components alone."""
    labels, count = ndimage.label(foreground >= decode.foreground)
    small = np.bincount(labels.ravel(), minlength=count + 1) < decode.min_area
    small[0] = True
    kept: Array = np.where(small[labels], 0, labels)
    return kept


def maps_of(model: Path, prepared: list[Prepared], *, tta: bool) -> list[Array]:
    """Quantised probabilities of each image, as `predict` writes them."""
    segmenter = load_segmenter(model, "cpu", threads=2, core_only=True, tta=tta)
    maps = []
    for one in prepared:
        shape = one.sample.labels.shape
        box = Box(0, 0, *shape)
        core = ceil_to(CORE, segmenter.stride)
        grid = TileGrid((shape[0], shape[1]), core, segmenter.halo, segmenter.stride)
        maps.append(predict_region(one.sample.pixels, box, grid, box, one.ranges, segmenter))
    return maps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("model", type=Path)
    arguments = parser.parse_args()
    settings = load_train_settings(arguments.config)
    card: ModelCard = read_card(arguments.model)
    samples = load_samples(settings.data, len(card.channels))
    split = split_samples(samples, settings.data.validation, settings.seed)
    prepared = [Prepared.of(sample, card, Weighing()) for sample in split.validation]
    decode = decode_of(Settings(), card)
    print(f"{len(prepared)} validation images of split {split.digest}; {decode}")
    plain, mean = (maps_of(arguments.model, prepared, tta=tta) for tta in (False, True))
    ways: dict[str, tuple[list[Array], Callable[[Array, Array, Decode], Array]]] = {
        "segpipe": (plain, label_instances),
        "watershed": (plain, flooded),
        "foreground alone": (plain, components),
        "segpipe, --tta": (mean, label_instances),
    }
    print("| | AP .50 | AP .75 | AP .90 | mean .50 to .90 | AP .50 by image | PQ | AJI | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (maps, way) in ways.items():
        start = time.process_time()
        found = [way(one[0], one[-1], decode) for one in maps]
        seconds = time.process_time() - start
        scores = score_images(
            (one.sample.labels, labels) for one, labels in zip(prepared, found, strict=True)
        )
        print(
            f"| {name} | {scores.ap(0.5):.4f} | {scores.ap(0.75):.4f} | {scores.ap(0.9):.4f} "
            f"| {scores.mean_ap():.4f} | {scores.ap_by_image(0.5):.4f} | {scores.pq:.4f} "
            f"| {scores.aji:.4f} | {seconds:.2f} |"
        )


if __name__ == "__main__":
    main()
