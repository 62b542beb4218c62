"""Whether a JPEG stream is whole: libjpeg makes grey of what is missing, and says so to nobody.

A stream that ends where it should is believed. One that does not may still be whole (some writers
leave the end marker away, some pad), so it is decoded twice with different bytes behind its end: what
differs has been read from there. Bytes that were changed inside a stream of right length are not
found so.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BASELINE = frozenset({0xC0, 0xC1})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset(range(0xD0, 0xD9)) | {0x01}
_END = b"\xff\xd9"
_BEHIND = 4096


def decode_whole(
    data: bytes, decode: Callable[[bytes], NDArray[Any]], *, headless: bool = False
) -> NDArray[Any]:
    """What `decode` makes of a baseline JPEG stream; of other kinds whatever it makes.

    Parameters
    ----------
    headless
        The stream is entropy-coded data alone, as between the restart markers of an NDPI.

    Raises
    ------
    ValueError
        When the stream ends before the picture does.
    """
    start = 0 if headless else scan_start(data)
    if start is None:
        return decode(data)
    end = scan_end(data, start)
    if _is_end(data, end, headless):
        return decode(data)
    first, second = (decode(data[:end] + bytes([value]) * _BEHIND + _END) for value in (0x55, 0xAA))
    if not np.array_equal(first, second):
        raise ValueError(f"its JPEG stream ends after {end:,} of {len(data):,} bytes")
    return first


def scan_start(data: bytes) -> int | None:
    """Where the entropy-coded data of a baseline JPEG of one scan begin; None of another stream."""
    place, baseline = 2, False
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker in _ALONE or marker == 0xFF:
            place += 1 if marker == 0xFF else 2
            continue
        place += 2 + int(struct.unpack_from(">H", data, place + 2)[0])
        if marker in _FRAMES:
            baseline = marker in _BASELINE
        if marker == 0xDA:
            return place if baseline else None
    return None


def scan_end(data: bytes, start: int) -> int:
    """Where entropy-coded data end: at the first marker that is no restart, or before what pads."""
    codes = np.frombuffer(data, np.uint8)[start:]
    at = np.flatnonzero(codes[:-1] == 0xFF)
    following = codes[at + 1]
    inside = (following == 0) | (following == 0xFF) | ((following >= 0xD0) & (following <= 0xD7))
    stray = at[~inside]
    return start + int(stray[0]) if stray.size else len(data.rstrip(b"\0"))


def _is_end(data: bytes, end: int, headless: bool) -> bool:
    """Whether the stream ends there as it should, but for bytes that pad it."""
    if data[end : end + 2] == _END:
        return not data[end + 2 :].strip(b"\0\xff")
    return headless and data[end - 2] == 0xFF and 0xD0 <= data[end - 1] <= 0xD7
