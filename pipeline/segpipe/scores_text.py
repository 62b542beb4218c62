"""Scores as a table for people, as CSV and as JSON for machines."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segpipe import __version__
from segpipe.evaluate import Scores
from segpipe.image_scores import ImageScores

if TYPE_CHECKING:
    from segpipe.worst_cases import Scored

_LISTED = 5

INDICES: dict[str, Callable[[ImageScores], float]] = {
    "PQ": lambda one: one.pq,
    "RQ": lambda one: one.rq,
    "SQ": lambda one: one.sq,
    "AJI": lambda one: one.aji,
    "AJI+": lambda one: one.aji_plus,
    "Dice": lambda one: one.dice,
}
COUNTS: dict[str, Callable[[ImageScores], int]] = {
    "true_objects": lambda one: one.true_objects,
    "predicted_objects": lambda one: one.predicted_objects,
    "found": lambda one: one.found,
    "missed": lambda one: one.missed,
    "false": lambda one: one.false,
    "split": lambda one: one.split,
    "fused": lambda one: one.fused,
}


def table_lines(scores: Scores, names: Sequence[str]) -> Iterator[str]:
    """What is printed: AP per threshold, the other scores, counts, and the worst images."""
    pooled, images = scores.pooled, len(scores.images)
    of = "1 image" if images == 1 else f"{images:,} images"
    yield f"{of}: {pooled.true_objects:,} objects in the truth, {pooled.predicted_objects:,} predicted"
    yield (
        f"at IoU .50: {pooled.found:,} found, {pooled.missed:,} missed, {pooled.false:,} false; "
        f"{pooled.split:,} split, {pooled.fused:,} fused"
    )
    yield ""
    yield _row("AP at IoU", [*(f"{tau:.2f}" for tau in pooled.thresholds), ".50-.90", ".50-.95"])
    for name, by in _ways(scores):
        ap = [by(_ap_at(tau)) for tau in pooled.thresholds]
        ap += [by(lambda one: one.mean_ap()), by(lambda one: one.mean_ap(high=0.95))]
        yield _row(name, [f"{value:.3f}" for value in ap])
    yield ""
    yield _row("", list(INDICES))
    for name, by in _ways(scores):
        yield _row(name, [f"{by(index):.3f}" for index in INDICES.values()])
    if scores.empty:
        full = len(scores.images) - scores.empty
        other = f"{scores.ap_by_image(0.5) * images / full:.3f}" if full else "not defined"
        yield (
            f"{scores.empty:,} of {of} have no object, and none predicted: they count as 0 in means of "
            f"images, as in stardist.matching (AP .50 without them {other})"
        )
    ranked = sorted(zip(scores.images, names, strict=True), key=lambda one: one[0].mean_ap())
    ranked = [one for one in ranked if not one[0].empty]
    if len(ranked) > 1:
        yield ""
        yield "worst images: mean AP .50-.90; missed, false, split, fused"
        for one, name in ranked[:_LISTED]:
            counts = f"{one.missed}, {one.false}, {one.split}, {one.fused}"
            yield f"  {one.mean_ap():.3f}  {counts:<18}  {name}"


def csv_text(scored: Sequence[Scored]) -> str:
    """A row per image, in the order of names; scores that have nothing to count are 0."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    columns = list(_values(scored[0].scores))
    writer.writerow(["name", *COUNTS, *columns, "predicted_file", "truth_file"])
    for one in scored:
        scores = one.scores
        writer.writerow(
            [
                one.name,
                *(count(scores) for count in COUNTS.values()),
                *(f"{value:.6f}" for value in _values(scores).values()),
                one.predicted.path,
                one.truth.path,
            ]
        )
    return file.getvalue()


def scores_json(
    scores: Scores, failed: Mapping[str, str], predicted: Path, truth: Path
) -> dict[str, Any]:
    """Everything that the table says, and what has no scores and why."""
    pooled = scores.pooled
    return {
        "segpipe": __version__,
        "predicted": str(predicted.resolve()),
        "truth": str(truth.resolve()),
        "images": len(scores.images),
        "images_without_objects": scores.empty,
        "counts": {name: count(pooled) for name, count in COUNTS.items()},
        "pooled": _values(pooled),
        "mean_of_images": {
            name: sum(_values(one)[name] for one in scores.images) / len(scores.images)
            for name in _values(pooled)
        },
        "not_scored": dict(failed),
    }


def _ap_at(tau: float) -> Callable[[ImageScores], float]:
    return lambda one: one.ap(tau)


def _values(one: ImageScores) -> dict[str, float]:
    values = {f"ap_{tau * 100:.0f}": one.ap(tau) for tau in one.thresholds}
    values |= {"mean_ap_50_90": one.mean_ap(), "mean_ap_50_95": one.mean_ap(high=0.95)}
    return values | {_key(name): index(one) for name, index in INDICES.items()}


def _key(name: str) -> str:
    return name.lower().replace("+", "_plus")


def _ways(scores: Scores) -> list[tuple[str, Callable[[Callable[[ImageScores], float]], float]]]:
    """Names of the two ways to sum up, and what each makes of a score."""
    return [("pooled", lambda score: score(scores.pooled)), ("mean of images", scores.by_image)]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"{name:<15}" + "".join(f"{cell:>{max(len(cell), 5) + 2}}" for cell in cells)
