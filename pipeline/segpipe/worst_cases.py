"""Which parts of which images are shown as the worst, read from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segpipe.evaluate import Scores
from segpipe.export.comparison import Case, compose_cases
from segpipe.export.drawing import Picture, contrast
from segpipe.export.png import write_png
from segpipe.geometry import Box
from segpipe.image_scores import ImageScores
from segpipe.labels import LabelFile, LabelImage, last_part, read_image
from segpipe.mistakes import WINDOW, Mistakes, add_density, densest_boxes

CASES = 6
_DIAMETERS = 8  # objects across a part
_CELLS = (24, 32, 48, 96, 192, 384)
"""Pixels of a quarter of a part: the panel is then 4, 3, 2, 1 times as large, or smaller."""

_NO_IMAGE, _OBJECT = 40, 70  # greys that stand for an image that is not known


@dataclass(frozen=True)
class Scored:
    """A pair that was scored. `diameter` is that of its objects, the median, in pixels."""

    name: str
    truth: LabelFile
    predicted: LabelFile
    scores: ImageScores
    mistakes: Mistakes
    diameter: float


def write_worst(
    path: Path, scored: Sequence[Scored], scores: Scores, images: Mapping[str, Path]
) -> None:
    """Write the picture of the worst cases.

    Parameters
    ----------
    images
        What was segmented, by name, where the labels do not tell.
    """
    worst = rank(scored)[:CASES]
    cases = []
    for number, one in enumerate(worst):
        share = CASES // len(worst) + (number < CASES % len(worst))
        cases += _cases(one, share, images)
    of = "1 image" if len(scored) == 1 else f"{len(scored):,} images"
    facts = (
        f"all, pooled: AP at IoU .50 {scores.ap(0.5):.3f}, mean .50 to .90 {scores.mean_ap():.3f}, "
        f"PQ {scores.pq:.3f}, AJI {scores.aji:.3f}"
    )
    write_png(path, compose_cases(f"The worst cases of {of}", facts, cases))


def rank(scored: Sequence[Scored]) -> list[Scored]:
    """The worst first: by mean AP, then by the number of mistakes. Nothing is wrong with an image
    without objects in which none were found: these come last."""
    return sorted(
        scored,
        key=lambda one: (
            one.scores.empty,
            one.scores.mean_ap(high=0.95),
            -(one.scores.missed + one.scores.false),
        ),
    )


def _cases(one: Scored, count: int, images: Mapping[str, Path]) -> list[Case]:
    """Parts of one image that hold most of what is wrong."""
    cell = next((n for n in _CELLS if n * WINDOW >= _DIAMETERS * one.diameter), _CELLS[-1])
    with LabelImage(one.truth) as truth, LabelImage(one.predicted) as predicted:
        shape = truth.shape
        density = np.zeros((-(-shape[0] // cell), -(-shape[1] // cell)), np.int64)
        for band in truth.bands():
            for image, ids in (
                (truth, one.mistakes.true_ids),
                (predicted, one.mistakes.predicted_ids),
            ):
                add_density(density, image.read(band), (band.y0, band.x0), cell, ids)
        boxes = densest_boxes(density, cell, shape, count)
        return [
            _case(one, box, truth.read(box), predicted.read(box), _display(one, box, shape, images))
            for box in boxes
        ]


def _case(
    one: Scored,
    box: Box,
    truth: NDArray[Any],
    predicted: NDArray[Any],
    display: Picture | None,
) -> Case:
    if display is None:
        grey = np.where(truth > 0, np.uint8(_OBJECT), np.uint8(_NO_IMAGE))
        display = np.repeat(grey[..., None], 3, axis=2)
    mistakes = {
        "missed": _within(one.mistakes.missed, truth),
        "false": _within(one.mistakes.false, predicted),
        "split": _within(one.mistakes.split, truth),
        "fused": _within(one.mistakes.fused, predicted),
    }
    here = ", ".join(f"{len(ids)} {kind}" for kind, ids in mistakes.items() if len(ids))
    facts = f"image's AP .50 {one.scores.ap(0.5):.3f}, mean {one.scores.mean_ap():.3f}  \u00b7  "
    return Case(
        one.name, facts + (here or "nothing wrong here"), box, display, truth, predicted, mistakes
    )


def _within(ids: NDArray[Any], labels: NDArray[Any]) -> NDArray[Any]:
    return np.intersect1d(ids, labels)


def _display(
    one: Scored, box: Box, shape: tuple[int, int], images: Mapping[str, Path]
) -> Picture | None:
    """The part of the image that was segmented, as it is shown; None where that is not known."""
    given = images.get(one.name) or images.get(last_part(one.name))
    for file, path in (
        (one.predicted, given),
        (one.predicted, one.predicted.image),
        (one.truth, one.truth.image),
    ):
        found = None if path is None else read_image(path, file.plane, box, shape)
        if found is not None:
            rgb = len(found) == 3 and found.dtype == np.uint8
            return contrast(found, _ranges(found, rgb), rgb, gamma=1.0 if rgb else 0.7)
    return None


def _ranges(pixels: NDArray[Any], rgb: bool) -> list[tuple[float, float]]:
    if rgb:
        return [(0.0, 255.0)] * 3
    finite = [channel[np.isfinite(channel)] for channel in pixels]
    return [
        (float(np.percentile(channel, 1)), float(np.percentile(channel, 99.8)))
        if channel.size
        else (0.0, 1.0)
        for channel in finite
    ]
