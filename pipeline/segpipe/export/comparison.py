"""The picture of the worst cases: the bare image beside the outlines of truth and prediction.

    +------------------------------------------------+
    | title                                          |
    | facts                                          |
    | legend of colours and marks                    |
    | name, place, counts    | name, place, counts   |
    | +-------++-----------+ | +-------++----------+ |
    | | image || outlines  | | | image || outlines | |
    | +-------++-----------+ | +-------++----------+ |
    | ...                                            |
    +------------------------------------------------+

Pure drawing on arrays; whoever calls it reads them. Blue, orange and white are told apart with every
colour vision (Okabe and Ito 2008), and marks differ in their sign too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from segpipe.export.drawing import Picture, outline
from segpipe.export.lettering import load_font, text_length, write_line
from segpipe.geometry import Box

TRUTH, PREDICTED, BOTH = (86, 180, 233), (230, 159, 0), (255, 255, 255)

PANEL = 384
"""Pixels of the longer side of a panel at most."""

_COLUMNS = 2
_MARGIN, _GAP, _CAPTION, _HEAD, _LINE = 16, 8, 24, 48, 30
_LARGE, _MEDIUM, _SMALL = 24, 16, 14
_GROUND, _PALE, _BRIGHT = (22, 24, 29), (154, 160, 170), (240, 242, 245)
_DIMMED = 0.45  # of the colour of objects that are right
_RADIUS = 8  # of a mark


_STROKES: dict[str, Sequence[tuple[float, float, float, float]]] = {
    "-": [(-1, 0, 1, 0)],
    "+": [(-1, 0, 1, 0), (0, -1, 0, 1)],
    "/": [(-0.7, 0.9, 0.7, -0.9)],
    "=": [(-0.9, -0.45, 0.9, -0.45), (-0.9, 0.45, 0.9, 0.45)],
}
"""Lines (x0, y0, x1, y1) of a sign, in parts of the mark's reach."""


@dataclass(frozen=True)
class Mark:
    """How a kind of mistake is shown."""

    word: str
    sign: str
    colour: tuple[int, int, int]
    of_truth: bool


MARKS = {
    "missed": Mark("missed", "-", TRUTH, True),
    "false": Mark("false", "+", PREDICTED, False),
    "split": Mark("split", "/", TRUTH, True),
    "fused": Mark("fused", "=", PREDICTED, False),
}


@dataclass(frozen=True)
class Case:
    """A part of an image, and what went wrong in it.

    display
        (h, w, 3) uint8, see `contrast`.
    truth, predicted
        (h, w) ids, 0 is background.
    mistakes
        Ids by kind, a key of `MARKS`.
    """

    name: str
    facts: str
    box: Box
    display: Picture
    truth: NDArray[Any]
    predicted: NDArray[Any]
    mistakes: dict[str, NDArray[Any]]

    def __post_init__(self) -> None:
        shapes = {self.truth.shape, self.predicted.shape, self.display.shape[:2], self.box.shape}
        if len(shapes) != 1:
            raise ValueError(f"parts of {sorted(shapes)} pixels do not match")


def compose_cases(title: str, facts: str, cases: Sequence[Case]) -> Picture:
    """The finished picture, (h, w, 3) uint8, 1600 wide."""
    width = 2 * _MARGIN + _COLUMNS * (2 * PANEL + _GAP) + (_COLUMNS - 1) * _MARGIN
    drawn = [(_enlarged(case.display, case.box.shape), _overlaid(case)) for case in cases]
    top = _MARGIN // 2 + _HEAD + _LINE + _GAP
    places, y = [], top
    for first in range(0, len(drawn), _COLUMNS):
        row = drawn[first : first + _COLUMNS]
        for column, _ in enumerate(row):
            places.append((y, _MARGIN + column * (2 * PANEL + _GAP + _MARGIN)))
        y += _CAPTION + max(panel.shape[0] for panel, _ in row) + _MARGIN // 2
    canvas = Image.new("RGB", (width, y + _MARGIN // 2), _GROUND)
    draw = ImageDraw.Draw(canvas)
    write_line(draw, (_MARGIN // 2, _MARGIN), title, (_LARGE, _BRIGHT), width - 2 * _MARGIN)
    write_line(draw, (_MARGIN // 2 + 32, _MARGIN), facts, (_MEDIUM, _PALE), width - 2 * _MARGIN)
    _draw_legend(draw, _MARGIN // 2 + _HEAD + _LINE // 2 + 6)
    for case, (bare, overlay), (y, x) in zip(cases, drawn, places, strict=True):
        _write_caption(draw, (y, x), case)
        canvas.paste(Image.fromarray(bare), (x, y + _CAPTION))
        canvas.paste(Image.fromarray(overlay), (x + bare.shape[1] + _GAP, y + _CAPTION))
    return np.asarray(canvas)


def _scale(shape: tuple[int, int]) -> tuple[int, int]:
    """The display size; from twice as large on, a whole factor."""
    factor = PANEL / max(shape)
    factor = int(factor) if factor >= 2 else factor
    return max(round(shape[0] * factor), 1), max(round(shape[1] * factor), 1)


def _enlarged(display: Picture, shape: tuple[int, int]) -> Picture:
    return np.asarray(Image.fromarray(display).resize(_scale(shape)[::-1], Image.Resampling.BOX))


def _nearest(labels: NDArray[Any]) -> NDArray[Any]:
    rows, columns = (
        (np.arange(n) * 2 + 1) * m // (2 * n)
        for n, m in zip(_scale((labels.shape[0], labels.shape[1])), labels.shape, strict=True)
    )
    nearest: NDArray[Any] = labels[rows[:, None], columns]
    return nearest


def _overlaid(case: Case) -> Picture:
    """The image with outlines, those of objects that are right dimmed, and marks on mistakes."""
    picture = _enlarged(case.display, case.box.shape)
    truth, predicted = _nearest(case.truth), _nearest(case.predicted)
    wrong = _any_of(truth, case, of_truth=True) | _any_of(predicted, case, of_truth=False)
    for width, here, strength in ((1, ~wrong, _DIMMED), (2, wrong, 1.0)):
        edges = _edges(truth, width) & here, _edges(predicted, width) & here
        picture = _coloured(picture, *edges, strength)
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    for kind, mark in MARKS.items():
        labels = truth if mark.of_truth else predicted
        for number in case.mistakes[kind]:
            place = _place_mark(labels == number)
            if place is not None:
                _draw_mark(draw, place, mark)
    return np.asarray(canvas)


def compare_outlines(display: Picture, truth: NDArray[Any], predicted: NDArray[Any]) -> Picture:
    """A copy of `display`, (h, w, 3), with the outlines of truth and prediction, (h, w) ids each."""
    return _coloured(display, outline(truth), outline(predicted))


def _coloured(
    display: Picture, truth: NDArray[np.bool_], found: NDArray[np.bool_], strength: float = 1.0
) -> Picture:
    """A copy with the colours of edges mixed in."""
    picture = display.copy()
    for edge, colour in (
        (truth & ~found, TRUTH),
        (found & ~truth, PREDICTED),
        (truth & found, BOTH),
    ):
        mixed = picture[edge] * (1 - strength) + np.array(colour) * strength
        picture[edge] = (mixed + 0.5).astype(np.uint8)
    return picture


def _edges(labels: NDArray[Any], width: int) -> NDArray[np.bool_]:
    """Pixels of objects within `width` of their edge."""
    edges = np.zeros(labels.shape, np.bool_)
    for _ in range(width):
        edges |= outline(np.where(edges, 0, labels))
    return edges


def _place_mark(pixels: NDArray[np.bool_]) -> tuple[int, int] | None:
    """Where the mark of an object goes: on it, or above it where it would hide it; all in the panel."""
    ys, xs = np.nonzero(pixels)
    if not len(ys):
        return None
    nearest = np.argmin((ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2)
    y, x = int(ys[nearest]), int(xs[nearest])
    if len(ys) < (4 * _RADIUS) ** 2:
        y = int(ys.min()) - _RADIUS - 2
    low, (high_y, high_x) = _RADIUS + 1, (n - _RADIUS - 2 for n in pixels.shape)
    return max(low, min(y, high_y)), max(low, min(x, high_x))


def _any_of(labels: NDArray[Any], case: Case, *, of_truth: bool) -> NDArray[np.bool_]:
    ids = [case.mistakes[kind] for kind, mark in MARKS.items() if mark.of_truth == of_truth]
    return np.isin(labels, np.concatenate(ids))


def _draw_mark(draw: ImageDraw.ImageDraw, centre: tuple[int, int], mark: Mark) -> None:
    """A disc with the sign of the mistake, whose rim has the colour of whose object it is."""
    y, x = centre
    around = (x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS)
    draw.ellipse(around, fill=_GROUND, outline=mark.colour, width=2)
    reach = _RADIUS - 4
    for x0, y0, x1, y1 in _STROKES[mark.sign]:
        ends = (x + x0 * reach, y + y0 * reach, x + x1 * reach, y + y1 * reach)
        draw.line(ends, fill=_BRIGHT, width=2)


def _draw_legend(draw: ImageDraw.ImageDraw, y: int) -> None:
    x = _MARGIN
    for word, colour in (("truth", TRUTH), ("predicted", PREDICTED), ("both", BOTH)):
        draw.line((x, y, x + 26, y), fill=colour, width=3)
        x = _write_word(draw, (y, x + 32), word)
    for mark in MARKS.values():
        _draw_mark(draw, (y, x + _RADIUS), mark)
        x = _write_word(draw, (y, x + 2 * _RADIUS + 6), mark.word)
    _write_word(draw, (y, x), "outlines of objects that match at IoU .50 are dimmed")


def _write_word(draw: ImageDraw.ImageDraw, place: tuple[int, int], word: str) -> int:
    """Write it in the middle of the line at y; where the next thing begins."""
    y, x = place
    draw.text((x, y), word, font=load_font(_SMALL), fill=_PALE, anchor="lm")
    return x + text_length(word, _SMALL) + 24


def _write_caption(draw: ImageDraw.ImageDraw, place: tuple[int, int], case: Case) -> None:
    y, x = place
    facts = f"at y {case.box.y0:,}, x {case.box.x0:,}  \u00b7  {case.facts}"
    end = x + 2 * PANEL + _GAP
    start = end - text_length(facts, _SMALL)
    write_line(draw, (y + 3, x), case.name, (_SMALL, _BRIGHT), start - x - 2 * _GAP)
    write_line(draw, (y + 3, start), facts, (_SMALL, _PALE), end - start + 2)
