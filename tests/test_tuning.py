"""Thresholds are chosen on the validation maps: each where it alone tells good from bad."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from segpipe.models.card import parse_card
from segpipe.training.judging_objects import AREAS, FOREGROUNDS, Objects, score, tune_decode

CARD = parse_card(
    {
        "name": "made",
        "architecture": {"name": "unet"},
        "channels": ["nuclei"],
        "outputs": ["foreground", "interior"],
        "normalisation": {"kind": "percentile"},
        "licence": "CC0-1.0",
        "training_data": "none",
    },
    "test",
)
TRUTH = np.zeros((60, 80), np.uint32)
TRUTH[10:30, 10:28], TRUTH[10:30, 28:46], TRUTH[35:55, 30:60] = 1, 2, 3


def maps(foreground, interior):
    return [np.round(255 * np.stack([foreground, interior])).astype(np.uint8)]


def interior(height):
    """High in each object, but for a trench where two of them touch, of 0.45 height."""
    depth = np.where(TRUTH > 0, height, 0.0)
    depth[10:30, 26:30] = 0.45 * height
    return depth


def faint():
    """Objects of which the network is never sure, on a ground that is nearly as likely."""
    return maps(np.where(TRUTH > 0, 0.34, 0.17), interior(0.9))


def speckled():
    """Specks of 36 pixels on the ground, sure of themselves."""
    foreground = np.where(TRUTH > 0, 0.9, 0.0)
    depth = interior(0.9)
    for y, x in ((2, 60), (2, 70), (50, 4), (50, 15)):
        foreground[y : y + 6, x : x + 6] = depth[y : y + 6, x : x + 6] = 0.9
    return maps(foreground, depth)


def shallow():
    """An interior that is never above .42."""
    return maps(np.where(TRUTH > 0, 0.9, 0.0), interior(0.42))


@pytest.mark.parametrize(
    ("made", "key", "fits"),
    [
        (faint, "foreground", lambda value: 0.17 < value < 0.34),
        (speckled, "min_area", lambda value: value == 40),
        (shallow, "interior", lambda value: 0.19 < value[-1] < 0.42),
    ],
)
def test_the_threshold_that_matters_is_found(made, key, fits):
    found, prepared = made(), [SimpleNamespace(sample=SimpleNamespace(labels=TRUTH))]
    before = score(found, prepared, CARD).mean_ap()
    card, scores = tune_decode(found, prepared, CARD)
    assert before < 0.8
    assert scores.mean_ap() == 1
    assert score(found, prepared, card).mean_ap() == 1
    assert fits(getattr(card.decode, key))
    changed = {name for name, value in card.decode if value != getattr(CARD.decode, name)}
    assert changed == {key}
    assert Objects().tuned(found, prepared, CARD) == card


def test_what_cannot_be_bettered_stays():
    found = maps(np.where(TRUTH > 0, 0.9, 0.0), interior(0.9))
    prepared = [SimpleNamespace(sample=SimpleNamespace(labels=TRUTH))]
    assert tune_decode(found, prepared, CARD)[0] == CARD
    assert CARD.decode.foreground in FOREGROUNDS
    assert CARD.decode.min_area in AREAS
