"""The picture that a person looks at first: the whole image, and a detail, with their objects.

    +---------------------------------------------------+
    | name                                              |
    | objects · size · pixel size · ...                 |
    | +---------------------+   +---------------------+ |   very wide images: one above the other
    | | whole image, shrunk |   | detail, full        | |
    | |      [box]          |   | resolution or more  | |
    | |              |---|  |   |              |---|  | |
    | +---------------------+   +---------------------+ |
    +---------------------------------------------------+

Pure drawing on arrays; whoever calls it reads them. `Plan` says what to read, `choose_detail` where.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from segpipe.export.drawing import Picture, draw_outlines, draw_overview, outline
from segpipe.export.lettering import load_font, text_length, write_line
from segpipe.geometry import Box

WIDTH, HEIGHT = 1600, 900
"""Pixels of the finished picture at most."""

THUMBNAIL = (800, 450)
"""Width and height of its small copy at most."""

_MARGIN, _HEAD, _FOOT = 20, 74, 26  # pixels: around panels, title and facts, line under a panel
_PANEL = (770, 770)  # two of them beside each other fill the picture
_THIN = 16  # pixels: an overview is stretched to at least this
_ENLARGED = 300  # pixels: no whole image is enlarged past this; there may be thousands
_CLOSER = 2  # times that a detail of a larger image is enlarged, where it fits
_ENLARGE = 64  # display pixels per image pixel at most
_FRAME = 8
_INSET = 10  # pixels: of the scale bar, from a panel's corner
_LARGE, _MEDIUM, _SMALL = 26, 16, 14  # heights of letters
_GROUND, _PALE, _BRIGHT = (22, 24, 29), (154, 160, 170), (240, 242, 245)


@dataclass(frozen=True)
class View:
    """A part of the image as it is shown.

    Parameters
    ----------
    display
        (h, w, 3) uint8, see `contrast`; at any scale.
    labels
        (h, w) integers at the same scale, 0 is background.
    box
        What of the image it shows, in pixels of full resolution.
    """

    display: Picture
    labels: NDArray[Any]
    box: Box

    def __post_init__(self) -> None:
        if self.display.shape != (*self.labels.shape, 3) or not self.labels.size:
            raise ValueError(
                f"display {self.display.shape} and labels {self.labels.shape} do not match"
            )


@dataclass(frozen=True)
class Caption:
    """What is written above the panels: the image's name, its objects, and what else is known.

    classes
        Whether they are classes.
    """

    title: str
    objects: int
    pixel_size_um: float | None = None
    facts: Sequence[str] = ()
    classes: bool = False


@dataclass(frozen=True)
class Plan:
    """What to read for the picture of an image: which level of the pyramid, how large a detail."""

    step: int
    """Image pixels per pixel of the coarsest overview that is fine enough, a power of two."""
    detail: tuple[int, int]
    """Height and width of the detail in image pixels; the image's own when it is small."""

    @classmethod
    def of(cls, shape: tuple[int, int]) -> Plan:
        """The plan for an image of this height and width."""
        overview, detail = _panels(shape)
        height, width = _fit(shape, overview)
        step = 1
        while min(shape[0] // height, shape[1] // width) >= 2 * step or (
            max(shape[0] // height, shape[1] // width) >= 16 * step  # a strip, stretched to be seen
        ):
            step *= 2
        return cls(step, (min(shape[0], detail[0] // 2), min(shape[1], detail[1] // 2)))


def _panels(shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The largest height and width of overview and detail, for an image of this shape."""
    if shape[1] < 4 * shape[0]:
        return _PANEL, _PANEL
    width = WIDTH - 2 * _MARGIN
    height = max(width * shape[0] // shape[1], _THIN)
    return (height, width), (_PANEL[0] - height - _FOOT, width)


def _fit(shape: tuple[int, int], limit: tuple[int, int], least: int = 1) -> tuple[int, int]:
    """The display size of `shape` within `limit`: a whole factor larger, `least` where there is room,
    or smaller; never thin."""
    factor = min(limit[0] / shape[0], limit[1] / shape[1])
    if factor >= 1:
        factor = min(int(factor), max(_ENLARGED // max(shape), least), _ENLARGE)
    height, width = (
        min(max(round(n * factor), _THIN), m) for n, m in zip(shape, limit, strict=True)
    )
    return height, width


def choose_detail(labels: NDArray[Any], shape: tuple[int, int], detail: tuple[int, int]) -> Box:
    """The box of `detail` pixels that holds most outlines; of equals, the nearest to the middle.

    `labels` is the overview's (h, w), of an image of `shape`.
    """
    edges = outline(labels)
    scale = [n / m for n, m in zip(labels.shape, shape, strict=True)]
    window = [
        min(max(round(d * s), 1), n) for d, s, n in zip(detail, scale, edges.shape, strict=True)
    ]
    sums = np.zeros((edges.shape[0] + 1, edges.shape[1] + 1), np.int64)
    sums[1:, 1:] = edges.cumsum(0, dtype=np.int64).cumsum(1)
    inside = sums[window[0] :] - sums[: -window[0]]
    inside = inside[:, window[1] :] - inside[:, : -window[1]]
    ys, xs = np.nonzero(inside == inside.max())
    middle = [(n - 1) / 2 for n in inside.shape]
    best = np.argmin((ys - middle[0]) ** 2 + (xs - middle[1]) ** 2)
    y, x = (
        min(max(round((p + w / 2) / s - d / 2), 0), n - d)
        for p, w, s, d, n in zip((ys[best], xs[best]), window, scale, detail, shape, strict=True)
    )
    return Box(y, x, y + detail[0], x + detail[1])


def compose(overview: View, detail: View, caption: Caption) -> Picture:
    """The finished picture, (h, w, 3) uint8, at most 900 high and 1600 wide.

    `overview` shows the whole image, at about the scale of `Plan.step`; `detail` a part of it. A
    detail that shows all of it is set beside the bare image.
    """
    shape = overview.box.shape
    limits = _panels(shape)
    left, left_labels = bare = _resized(overview, _fit(shape, limits[0]))
    apart = detail.box != overview.box
    alone = detail is overview and limits[0] == limits[1]
    size = _fit(detail.box.shape, limits[1], _CLOSER if apart else 1)
    right, right_labels = bare if alone else _resized(detail, size)
    if apart:
        left = draw_overview(left, left_labels)
    right = draw_outlines(right, right_labels, width=2 if right.size > detail.display.size else 1)
    names = ("whole image", f"detail at y {detail.box.y0:,}, x {detail.box.x0:,}")
    notes = [
        name + _scaling(view.box.shape, panel)
        for name, view, panel in zip(
            names if apart else ("image", "objects"), (overview, detail), (left, right), strict=True
        )
    ]
    facts = "  \u00b7  ".join(_facts(shape, caption))

    first = _at(_HEAD, _MARGIN, left)
    if limits[0] == limits[1]:
        column = max(first.x1, _MARGIN + text_length(notes[0], _SMALL))  # a strip has a longer note
        second = _at(_HEAD, column + _MARGIN, right)
    else:
        second = _at(first.y1 + _FOOT, _MARGIN, right)
    ends = (_MARGIN + text_length(facts, _MEDIUM), second.x0 + text_length(notes[1], _SMALL), 640)
    width = min(max(first.x1, second.x1, *ends) + _MARGIN, WIDTH)
    height = max(first.y1, second.y1) + _FOOT + _MARGIN // 2
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = np.full((width, 3), _GROUND, np.uint8)  # row by row: ten times as fast
    with _drawing_on(canvas, Box(0, 0, _HEAD, width)) as draw:
        write_line(draw, (10, _MARGIN), caption.title, (_LARGE, _BRIGHT), width - 2 * _MARGIN)
        write_line(draw, (46, _MARGIN), facts, (_MEDIUM, _PALE), width - 2 * _MARGIN)
    canvas[first.slices], canvas[second.slices] = left, right
    if apart:
        around = first.grow(_FRAME).intersect(Box(0, 0, height, width))
        with _drawing_on(canvas, around) as draw:
            _draw_mark(draw, first.within(around), overview.box, detail.box)
    ends_at = second.x0 if second.x0 > first.x0 else width  # beside it the other panel may go on
    for panel, view, note, end in zip(
        (first, second), (overview, detail), notes, (ends_at, width), strict=True
    ):
        foot = Box(panel.y1, panel.x0, min(panel.y1 + _FOOT + 4, height), end)
        canvas[foot.slices] = _note(note, foot.shape)
        per_pixel = view.box.shape[1] / panel.shape[1]
        if panel.shape[0] >= 60 and panel.shape[1] >= 120:
            _set_scale_bar(canvas, panel, per_pixel, caption.pixel_size_um)
    return canvas


@functools.lru_cache(maxsize=16)
def _note(text: str, shape: tuple[int, int]) -> Picture:
    """The line under a panel, with the ground to the right border; of many small images the same."""
    strip = np.empty((*shape, 3), np.uint8)
    strip[:] = _GROUND
    with _drawing_on(strip, Box(0, 0, *shape)) as draw:
        write_line(draw, (5, 0), text, (_SMALL, _PALE), shape[1] - _MARGIN)
    return strip


@contextmanager
def _drawing_on(canvas: Picture, box: Box) -> Iterator[ImageDraw.ImageDraw]:
    """Lines and letters in a box of the canvas, counted from its corner: Pillow, which keeps pictures
    in a way of its own, is handed what it is to draw on and not the whole."""
    part = Image.fromarray(canvas[box.slices])
    yield ImageDraw.Draw(part, "RGBA")
    canvas[box.slices] = np.asarray(part)


def thumbnail_of(picture: Picture) -> Picture:
    """The panels of a finished picture, without what is written above them, small."""
    panels = picture[_HEAD - _MARGIN // 2 :]
    width, height = THUMBNAIL
    factor = max(-(-panels.shape[0] // height), -(-panels.shape[1] // width))
    # a whole factor: a fifth of the time of any other, and there may be thousands
    return np.asarray(Image.fromarray(panels).reduce(factor)) if factor > 1 else panels


def _at(y: int, x: int, panel: Picture) -> Box:
    return Box(y, x, y + panel.shape[0], x + panel.shape[1])


def _resized(view: View, shape: tuple[int, int]) -> tuple[Picture, NDArray[Any]]:
    """Display by the mean of the pixels that become one, labels by the nearest."""
    held = view.labels.shape
    if held == shape:
        return view.display, view.labels
    if not any(n % m for n, m in zip(shape, held, strict=True)):
        down, across = (n // m for n, m in zip(shape, held, strict=True))
        return _repeated(view.display, down, across), _repeated(view.labels, down, across)
    display = Image.fromarray(view.display).resize(shape[::-1], Image.Resampling.BOX)
    rows, columns = (
        (np.arange(n) * 2 + 1) * m // (2 * n) for n, m in zip(shape, held, strict=True)
    )
    return np.asarray(display), view.labels[rows[:, None], columns]


def _repeated(pixels: NDArray[Any], down: int, across: int) -> NDArray[Any]:
    """Each pixel (h, w, ...) so many times."""
    return np.repeat(np.repeat(pixels, across, axis=1), down, axis=0)


def _scaling(shape: tuple[int, int], panel: Picture) -> str:
    """How `shape` became the panel, where that is not plain to see."""
    down, across = panel.shape[0] / shape[0], panel.shape[1] / shape[1]
    words = ""
    if min(down, across) >= 2:
        words += f", enlarged {min(down, across):.0f} times"
    if max(down, across) > 1.5 * min(down, across):
        side = "height" if down > across else "width"
        words += f", {side} stretched {max(down, across) / min(down, across):,.0f} times"
    return words


def _facts(shape: tuple[int, int], caption: Caption) -> list[str]:
    one, many = ("class", "classes") if caption.classes else ("object", "objects")
    count = {0: f"no {many}", 1: f"1 {one}"}.get(caption.objects, f"{caption.objects:,} {many}")
    facts = [count, f"{shape[0]:,} x {shape[1]:,} px"]
    if caption.pixel_size_um is None:
        facts.append("pixel size not known")
    else:
        height, width = (n * caption.pixel_size_um for n in shape)
        unit, factor = ("mm", 1000) if max(height, width) >= 1000 else ("um", 1)
        facts.append(f"{height / factor:.3g} x {width / factor:.3g} {unit}")
        facts.append(f"{caption.pixel_size_um:.4g} um per pixel")
    return [*facts, *caption.facts]


def _set_scale_bar(
    canvas: Picture, panel: Box, image_pixels: float, pixel_size_um: float | None
) -> None:
    """A bar of a round length in the last corner of a panel, a quarter of its width at most;
    `image_pixels` to a panel's pixel."""
    per_pixel = image_pixels * (pixel_size_um or 1.0)
    longest = panel.shape[1] * per_pixel / 4
    step = 10.0 ** np.floor(np.log10(longest))
    length = step * max(n for n in (1, 2, 5) if n * step <= longest)
    if pixel_size_um is None:
        text = f"{length:,g} px"
    else:
        text = f"{length:g} um" if length < 1000 else f"{length / 1000:g} mm"
    bar, share = _scale_bar(text, round(length / per_pixel))
    height, width, _ = bar.shape
    y, x = panel.y1 - _INSET, panel.x1 - _INSET
    under = canvas[y - height : y, x - width : x]
    under[:] = under * (1 - share) + bar * share + 0.5


@functools.lru_cache(maxsize=16)
def _scale_bar(text: str, width: int) -> tuple[Picture, NDArray[np.float32]]:
    """A bar of so many pixels under its length, on a dark ground: (h, w, 3) uint8, and how much of it
    covers what lies under it, (h, w, 1) in [0, 1]; of many small images the same."""
    font = load_font(_SMALL)
    backing = max(width, int(font.getlength(text))) + 16
    drawn = Image.new("RGBA", (backing, 38), (0, 0, 0, 150))
    draw = ImageDraw.Draw(drawn)
    middle = backing / 2
    draw.text((middle, 24), text, font=font, fill="white", anchor="ms")
    draw.rectangle((middle - width / 2, 29, middle + width / 2, 32), fill="white")
    pixels = np.asarray(drawn)
    return pixels[..., :3], np.divide(pixels[..., 3:], 255, dtype=np.float32)


def _draw_mark(draw: ImageDraw.ImageDraw, panel: Box, image: Box, detail: Box) -> None:
    """Frame where the detail lies in the overview, large enough to be seen: less than `_FRAME` beyond
    a strip."""
    y_scale, x_scale = panel.shape[0] / image.shape[0], panel.shape[1] / image.shape[1]
    y = panel.y0 + (detail.y0 + detail.y1) / 2 * y_scale
    x = panel.x0 + (detail.x0 + detail.x1) / 2 * x_scale
    for grow, colour in ((2, "black"), (1, "white"), (0, "white"), (-1, "black")):
        half_y = max(detail.shape[0] * y_scale / 2, 5) + grow
        half_x = max(detail.shape[1] * x_scale / 2, 5) + grow
        draw.rectangle((x - half_x, y - half_y, x + half_x, y + half_y), outline=colour)
