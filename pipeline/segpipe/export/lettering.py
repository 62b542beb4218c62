"""Lines of text in pictures, in Pillow's own font."""

from __future__ import annotations

import functools
import math
import unicodedata

from PIL import Image, ImageDraw, ImageFont

_AROUND = 2  # pixels beside a word that its letters may reach into


@functools.lru_cache(maxsize=64)
def plain_text(text: str) -> str:
    """`text` in the characters that Pillow's own font has: ASCII, and few others."""
    if text.isascii() and text.isprintable():
        return text
    parts = unicodedata.normalize("NFKD", text)
    kept = (c for c in parts if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" or c in "\u00b7\u2026" else "?" for c in kept)


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font at this height, in pixels."""
    return ImageFont.load_default(size)


@functools.lru_cache(maxsize=512)
def _word(word: str, size: int) -> tuple[float, Image.Image]:
    """How far a word reaches, in pixels, and its shape, `_AROUND` pixels to the right: of many small
    pictures most words are the same, and it takes FreeType half of their time to draw them."""
    font = load_font(size)
    length = font.getlength(word)
    shape = Image.new("L", (math.ceil(length) + 2 * _AROUND, 2 * size))
    ImageDraw.Draw(shape).text((_AROUND, 0), word, font=font, fill=255)
    return length, shape


def _length(text: str, size: int) -> float:
    words = text.split(" ")
    spaces = (len(words) - 1) * _word(" ", size)[0]
    return spaces + sum(_word(word, size)[0] for word in words)


def text_length(text: str, size: int) -> int:
    """Width of a line, in pixels."""
    return int(_length(plain_text(text), size)) + 1


def write_line(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    style: tuple[int, tuple[int, int, int]],
    room: int,
) -> None:
    """Draw one line at (y, x) in (size, colour); beyond `room` pixels it loses its middle."""
    size, colour = style
    text = shown = plain_text(text if len(text) <= 400 else text[:200] + text[-200:])
    if _length(text, size) > room:
        font = load_font(size)
        while len(text) > 4 and font.getlength(shown) > room:
            middle = len(text) // 2
            text = text[: middle - 1] + text[middle + 1 :]
            shown = text[: middle - 1] + "\u2026" + text[middle - 1 :]
    y, x = corner[0], float(corner[1])
    for word in shown.split(" "):
        length, shape = _word(word, size)
        if word:
            draw.bitmap((round(x) - _AROUND, y), shape, fill=colour)
        x += length + _word(" ", size)[0]
