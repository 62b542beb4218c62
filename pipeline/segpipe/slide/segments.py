"""Segments of a file (strips, tiles): what they claim to decode to, and those decoded last."""

from __future__ import annotations

import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

CACHE_BYTES = 256 * 2**20

_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_ALONE = frozenset(range(0xD0, 0xD9)) | {0x01}


class SegmentCache:
    """Decoded segments, bounded in bytes; the one used least recently goes first.

    However many threads ask for a segment at once, one decodes it and the others wait. The segment
    decoded last is kept even if it alone is above the bound: a file that is one large strip would
    otherwise be decoded again for every box.
    """

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self._limit = limit_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, Future[NDArray[Any]]] = OrderedDict()

    def get(self, key: Hashable, decode: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The segment, from memory or from `decode`, whose error is raised and not remembered."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                mine = False
            else:
                mine = True
                entry = self._entries[key] = Future()
        if not mine:
            return entry.result()
        try:
            segment = decode()
        except BaseException as error:
            with self._lock:
                del self._entries[key]
            entry.set_exception(error)
            raise
        with self._lock:
            entry.set_result(segment)
            self._entries.move_to_end(key)
            self._bytes += segment.nbytes
            self._shrink(key)
        return segment

    def _shrink(self, newest: Hashable) -> None:
        for key in list(self._entries):
            if self._bytes <= self._limit:
                return
            entry = self._entries[key]
            if key != newest and entry.done():
                self._bytes -= entry.result().nbytes
                del self._entries[key]

    def clear(self) -> None:
        """Forget all segments; call it when no thread is reading."""
        with self._lock:
            self._entries.clear()
            self._bytes = 0


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width in the frame header of a JPEG stream; None when it has none."""
    position = 2
    while position + 9 <= len(data):
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker in _JPEG_ALONE or marker == 0xFF:
            position += 1 if marker == 0xFF else 2
            continue
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return height, width
        if marker in (0xD9, 0xDA):
            return None
        position += 2 + int(struct.unpack_from(">H", data, position + 2)[0])
    return None


def jpeg2000_size(data: bytes) -> tuple[int, int, bool] | None:
    """Height, width, and whether a component is subsampled, from a JPEG 2000 code stream."""
    start = data.find(b"\xff\x4f\xff\x51", 0, 2**16)
    if start < 0 or len(data) < start + 42:
        return None
    right, bottom, left, top = struct.unpack_from(">IIII", data, start + 8)
    (components,) = struct.unpack_from(">H", data, start + 40)
    steps = data[start + 42 : start + 42 + 3 * components]
    subsampled = any(step != 1 for step in steps[1::3] + steps[2::3])
    return bottom - top, right - left, subsampled


def rgb_of_ycbcr(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(..., 3) uint8 red, green, blue of (..., 3) uint8 full-range YCbCr (JFIF 1.02, page 3)."""
    luma = pixels[..., 0].astype(np.float32)
    blue, red = (pixels[..., i].astype(np.float32) - 128 for i in (1, 2))
    colours = np.stack(
        [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], axis=-1
    )
    return np.asarray(np.clip(np.rint(colours), 0, 255), np.uint8)
