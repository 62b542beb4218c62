"""Boxes of one level of a TIFF: only the segments that a box meets are read and decoded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segpipe.errors import InputError
from segpipe.geometry import Box, Region
from segpipe.slide.segments import SegmentCache
from segpipe.slide.source import MAX_SEGMENT_BYTES, printable, project, unusable
from segpipe.slide.tiff_coding import decode
from segpipe.slide.tiff_pages import Layout, Page

_SPAN = 4
"""Whole rows are read, the rest thrown away, for a box of at least 1 / `_SPAN` of the width."""

_ROWS_BYTES = 2**26
_REMEDY = "copy or export the file again"


class OpenBytes:
    """The bytes of a file, for several threads at once.

    They are read, not mapped: a mapped file that is cut short, or a network file system that fails,
    kills the process (SIGBUS) where a read raises an error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        self._lock = threading.Lock()
        self._file = path.open("rb")

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from there on; fewer where the file ends.

        Raises
        ------
        InputError
            When the file system fails.
        """
        try:
            with self._lock:
                self._file.seek(offset)
                return self._file.read(size)
        except OSError as error:
            raise unusable(self.path, f"cannot be read ({printable(error)})", _REMEDY) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TiffLevel:
    """One level of an open TIFF. See `Layout` for where its pixels are."""

    def __init__(self, file: OpenBytes, layout: Layout, cache: SegmentCache, number: int) -> None:
        self._file = file
        self._layout = layout
        self._cache = cache
        self._number = number
        self._stored = np.dtype(layout.keyframe.dtype).newbyteorder("=")

    def read(self, box: Box, channels: tuple[int, ...]) -> NDArray[Any]:
        """(channels, height, width) in the file's dtype.

        Raises
        ------
        InputError
            When a segment is missing, cut off, or does not decode to its size.
        """
        return project(self._plane(plane, box, channels) for plane in self._layout.stack)

    def _plane(
        self, plane: tuple[tuple[int, int], ...], box: Box, channels: tuple[int, ...]
    ) -> NDArray[Any]:
        layout = self._layout
        if layout.colours is not None:
            indices = self._samples(box, plane)[0]
            return np.stack([layout.colours[channel][indices] for channel in channels])
        pixels = self._samples(box, tuple(plane[channel] for channel in channels))
        if layout.inverted and self._stored.kind == "b":
            return ~pixels
        if layout.inverted:
            white = self._stored.type(2**layout.keyframe.bitspersample - 1)
            return np.asarray(white - pixels, self._stored)
        return pixels

    def _samples(self, box: Box, wanted: tuple[tuple[int, int], ...]) -> NDArray[Any]:
        out = np.empty((len(wanted), *box.shape), self._stored)
        for number in dict.fromkeys(number for number, _ in wanted):
            page = self._layout.pages[number]
            picked = [(out[k], sample) for k, (n, sample) in enumerate(wanted) if n == number]
            if page.start is not None:
                self._fill_from_rows(page.start, box, picked)
            else:
                self._fill_from_segments(number, page, box, picked)
        return out

    def _fill_from_rows(self, start: int, box: Box, picked: list[tuple[NDArray[Any], int]]) -> None:
        samples = self._layout.samples
        if self._layout.interleaved:
            rows = self._rows(start, box, samples)
            for y0, pixels in rows:
                for out, sample in picked:
                    out[y0 : y0 + len(pixels)] = pixels[..., sample]
            return
        height, width = self._layout.grid.shape
        plane_bytes = height * width * self._stored.itemsize
        for out, sample in picked:
            for y0, pixels in self._rows(start + sample * plane_bytes, box, 1):
                out[y0 : y0 + len(pixels)] = pixels[..., 0]

    def _rows(self, start: int, box: Box, samples: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first row in the box, (rows, width, samples)) for the uncompressed rows of a box."""
        height, width = box.shape
        if box.area == 0:
            return
        pixel_bytes = samples * self._stored.itemsize
        row_bytes = self._layout.grid.shape[1] * pixel_bytes
        whole = _SPAN * width >= self._layout.grid.shape[1]
        x0, columns = (0, self._layout.grid.shape[1]) if whole else (box.x0, width)
        step = max(1, _ROWS_BYTES // row_bytes) if whole else 1
        dtype = self._stored.newbyteorder(self._layout.byte_order)
        for y0 in range(0, height, step):
            rows = min(step, height - y0)
            size = rows * columns * pixel_bytes
            data = self._file.read(start + (box.y0 + y0) * row_bytes + x0 * pixel_bytes, size)
            if len(data) != size:
                row = box.y0 + y0
                raise self._unreadable(f"ends before row {row} (+{rows})", box)
            pixels = np.frombuffer(data, dtype).reshape(rows, columns, samples)
            yield y0, pixels[:, box.x0 - x0 : box.x0 - x0 + width]

    def _fill_from_segments(
        self, number: int, page: Page, box: Box, picked: list[tuple[NDArray[Any], int]]
    ) -> None:
        layout = self._layout
        columns = layout.grid.count[1]
        damage: dict[int, InputError] = {}
        for region in layout.grid.meeting(box):
            part = region.box.intersect(box)
            source, target = part.within(region.box).slices, part.within(box).slices
            for out, sample in picked:
                plane, inner = (0, sample) if layout.interleaved else (sample, 0)
                row, column = region.index
                index = plane * len(layout.grid) + row * columns + column
                if page.byte_counts[index] == 0:
                    out[target] = layout.absent
                    continue
                if index in damage:
                    continue
                try:
                    segment = self._segment(number, page, index, region, box)
                except InputError as error:
                    damage[index] = error
                    continue
                out[target] = segment[(*source, inner)]
        if damage:
            first, *others = damage.values()
            raise first if not others else _counted(first, len(others))

    def _segment(
        self, number: int, page: Page, index: int, region: Region, box: Box
    ) -> NDArray[Any]:
        """(rows, columns, samples) of one segment; it covers at least the region's pixels."""
        return self._cache.get(
            (self._number, number, index), lambda: self._decode_segment(page, index, region, box)
        )

    def _decode_segment(self, page: Page, index: int, region: Region, box: Box) -> NDArray[Any]:
        layout = self._layout
        what = f"{'tile' if layout.keyframe.is_tiled else 'strip'} {index} {region.box}"
        offset, size = int(page.offsets[index]), int(page.byte_counts[index])
        if not (offset > 0 and 0 < size <= MAX_SEGMENT_BYTES and offset + size <= self._file.size):
            raise self._unreadable(
                f"ends at byte {self._file.size:,}, before its {what} (byte {offset:,} +{size:,})",
                box,
            )
        data = self._file.read(offset, size)
        try:
            pixels = decode(layout.keyframe, data, index, layout.grid.cell, page.jpeg_tables)
        except Exception as error:
            why = printable(str(error) or type(error).__name__)
            raise self._unreadable(f"has a {what} that cannot be decoded ({why})", box) from error
        height, width = region.box.shape
        samples = layout.samples if layout.interleaved else 1
        fits = pixels.shape[0] >= height and pixels.shape[1] >= width
        if not fits or pixels.shape[2] != samples or pixels.dtype != self._stored:
            raise self._unreadable(
                f"has a {what} that decodes to {pixels.shape} {pixels.dtype}", box
            )
        return pixels

    def _unreadable(self, what: str, box: Box | None) -> InputError:
        wanted = f", needed for {box}" if box is not None else ""
        return unusable(self._file.path, f"{what}{wanted}", _REMEDY)


def _counted(first: InputError, others: int) -> InputError:
    """The error about one segment, and how many more there are like it in the box."""
    return InputError(f"{first}; {others} more like it in this box")
