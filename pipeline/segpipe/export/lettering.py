"""Lines of text in pictures, in Pillow's own font."""

from __future__ import annotations

import functools
import unicodedata

from PIL import ImageDraw, ImageFont


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


def text_length(text: str, size: int) -> int:
    """Width of a line, in pixels."""
    return int(load_font(size).getlength(plain_text(text))) + 1


def write_line(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    style: tuple[int, tuple[int, int, int]],
    room: int,
) -> None:
    """Draw one line at (y, x) in (size, colour); beyond `room` pixels it loses its middle."""
    size, colour = style
    font = load_font(size)
    text = shown = plain_text(text if len(text) <= 400 else text[:200] + text[-200:])
    while len(text) > 4 and draw.textlength(shown, font=font) > room:
        middle = len(text) // 2
        text = text[: middle - 1] + text[middle + 1 :]
        shown = text[: middle - 1] + "\u2026" + text[middle - 1 :]
    draw.text(corner[::-1], shown, font=font, fill=colour)
