"""`segpipe evaluate PREDICTED TRUTH`: label files are paired by name, scored, told.

What cannot be scored is named and does not stop the others. Memory: bands of rows of the two label
images of a pair (about 4 million pixels each), and their objects; a PNG is decoded whole.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from segpipe.errors import InputError, SettingsError
from segpipe.evaluate import Scores
from segpipe.image_scores import ImageScores
from segpipe.labels import LabelFile, LabelImage, find_images, find_labels, last_part
from segpipe.mistakes import Mistakes
from segpipe.overlaps import Overlaps
from segpipe.records import write_json, write_text
from segpipe.scores_text import csv_text, scores_json, table_lines
from segpipe.worst_cases import Scored, write_worst

log = logging.getLogger(__name__)

_LISTED = 3


@dataclass(frozen=True)
class Pairing:
    """What belongs together, and what has no partner."""

    pairs: tuple[tuple[LabelFile, LabelFile], ...]
    """(truth, predicted)."""
    without_truth: tuple[str, ...]
    without_prediction: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """What came of it."""

    scored: tuple[Scored, ...]
    failed: dict[str, str] = field(default_factory=dict)
    """Name -> why it has no scores."""

    @property
    def scores(self) -> Scores:
        """Those of the images that could be scored, of which there is one at least."""
        return Scores(tuple(one.scores for one in self.scored))


def run_evaluation(
    predicted: Path,
    truth: Path,
    out: Path | None,
    images: Path | None,
    told: Callable[[str], None],
) -> int:
    """Score, tell, and write `per_image.csv`, `scores.json` and `worst.png`; the exit code.

    Raises
    ------
    SettingsError
        When a path does not exist or holds no label images, no two names agree, or `out` cannot be
        written.
    InputError
        When none of the pairs can be scored.
    """
    pairing = pair_labels(find_labels(predicted, out), find_labels(truth, out))
    shown = {} if images is None else find_images(images)
    if out is not None:
        _make(out)
    for names, lack in (
        (pairing.without_truth, f"no truth in {truth}"),
        (pairing.without_prediction, f"no prediction in {predicted}"),
    ):
        if names:
            log.error("%s: %s", lack, _listed(names))
    found = evaluate(pairing)
    if not found.scored:
        raise InputError(f"none of the {len(pairing.pairs):,} pairs can be scored")
    for line in table_lines(found.scores, [one.name for one in found.scored]):
        told(line)
    if out is not None:
        write_text(out / "per_image.csv", csv_text(found.scored))
        write_json(out / "scores.json", scores_json(found.scores, found.failed, predicted, truth))
        write_worst(out / "worst.png", found.scored, found.scores, shown)
        told(f"written: {out / 'per_image.csv'}, scores.json, worst.png")
    return 1 if found.failed else 0


def pair_labels(predicted: Sequence[LabelFile], truth: Sequence[LabelFile]) -> Pairing:
    """Files of the same name; of what is left, those of the same name without its folders; and if
    there is one on either side, these two whatever their names.

    Raises
    ------
    SettingsError
        When nothing belongs together.
    """
    if len(predicted) == len(truth) == 1:
        return Pairing(((truth[0], predicted[0]),), (), ())
    pairs: list[tuple[LabelFile, LabelFile]] = []
    left, wanted = list(predicted), list(truth)
    for key in (str, last_part):
        ours, theirs = _unique(left, key), _unique(wanted, key)
        same = ours.keys() & theirs.keys()
        pairs += [(theirs[name], ours[name]) for name in same]
        left = [
            one for one in left if ours.get(key(one.name)) is not one or key(one.name) not in same
        ]
        wanted = [
            one
            for one in wanted
            if theirs.get(key(one.name)) is not one or key(one.name) not in same
        ]
    if not pairs:
        raise SettingsError(
            f"no name agrees: PREDICTED has {_listed([one.name for one in predicted])}; "
            f"TRUTH has {_listed([one.name for one in truth])}; name them alike"
        )
    pairs.sort(key=lambda pair: pair[0].name)
    return Pairing(
        tuple(pairs),
        tuple(one.name for one in left),
        tuple(one.name for one in wanted),
    )


def evaluate(pairing: Pairing) -> Evaluation:
    """The scores of all pairs, in the order of names; those that fail are logged and kept apart."""
    failed = dict.fromkeys(pairing.without_truth, "no truth")
    failed |= dict.fromkeys(pairing.without_prediction, "no prediction")
    scored = []
    bar = tqdm(pairing.pairs, unit="image", disable=not sys.stderr.isatty(), leave=False)
    for truth, predicted in bar:
        try:
            scored.append(score_files(truth, predicted))
        except InputError as error:
            failed[truth.name] = str(error)
            log.error("%s", error)
    return Evaluation(tuple(scored), failed)


def score_files(truth: LabelFile, predicted: LabelFile) -> Scored:
    """The scores of a pair; a mask of one number in several pieces is warned about.

    Raises
    ------
    InputError
        When one of them is no label image, or their sizes differ.
    """
    truth, predicted = at_one_scale(truth, predicted)
    with LabelImage(truth) as wanted, LabelImage(predicted) as found:
        pairs = Overlaps.of_parts((wanted.read(box), found.read(box)) for box in wanted.bands())
        for image, ids in ((wanted, pairs.first_ids), (found, pairs.second_ids)):
            if len(ids) == 1 and image.count_pieces() > 1:
                log.warning(
                    "%s: one number, %d, in several pieces, counts as one object; if it is a binary "
                    "mask, give each object a number of its own",
                    image.file.path.name,
                    ids[0],
                )
    scores = ImageScores.of(pairs)
    return Scored(truth.name, truth, predicted, scores, Mistakes.of(pairs), _diameter(pairs))


def at_one_scale(truth: LabelFile, predicted: LabelFile) -> tuple[LabelFile, LabelFile]:
    """The pair, read at one resolution: as they are where their sizes agree; else that of the truth,
    where the prediction is of a run that worked at another one; or the truth, or both.

    Raises
    ------
    InputError
        When no such reading makes them agree, or one cannot be opened.
    """
    fulls = truth.at_full_resolution(), predicted.at_full_resolution()
    for pair in ((truth, predicted), (truth, fulls[1]), (fulls[0], predicted), fulls):
        with LabelImage(pair[0]) as wanted, LabelImage(pair[1]) as found:
            if wanted.shape == found.shape:
                return pair
    with LabelImage(truth) as wanted, LabelImage(predicted) as found:
        sizes = (f"{one.shape[0]} x {one.shape[1]}" for one in (wanted, found))
        raise InputError(
            "{}: truth has {} pixels, prediction {}; give both at one scale, or as PREDICTED the OUT "
            "of the run that made them (it knows its scale)".format(truth.name, *sizes)
        )


def _diameter(pairs: Overlaps) -> float:
    """Median diameter of the objects as discs, in pixels; of those predicted where there are none."""
    areas = pairs.first_areas if len(pairs.first_areas) else pairs.second_areas
    if not len(areas):
        return 0.0
    return float(2 * (sorted(areas.tolist())[len(areas) // 2] / 3.14159) ** 0.5)


def _unique(files: Sequence[LabelFile], key: Callable[[str], str]) -> dict[str, LabelFile]:
    counts = Counter(key(one.name) for one in files)
    return {key(one.name): one for one in files if counts[key(one.name)] == 1}


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot write into {out}: {error.strerror}") from error


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more:,} more" if more > 0 else "")
