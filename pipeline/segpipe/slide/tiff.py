"""Boxes of a TIFF: only the segments that a box meets are read and decoded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tifffile import TiffFile

from segpipe.errors import InputError
from segpipe.geometry import Box, Region
from segpipe.slide.planes import Place
from segpipe.slide.segments import SegmentCache
from segpipe.slide.source import MAX_SEGMENT_BYTES, Header, printable, project, unusable
from segpipe.slide.tiff_coding import decode
from segpipe.slide.tiff_pages import Layout, Page, read_layout
from segpipe.slide.tiff_series import find_scenes

logger = logging.getLogger(__name__)

_SPAN = 4
"""Whole rows are read, the rest thrown away, for a box of at least 1 / `_SPAN` of the width."""

_ROWS_BYTES = 2**26
_ONE_FILE = {"_multifile": False, "is_mmstack": False, "is_ndtiff": False}
"""A hostile file may name any other; of these dialects tifffile would open what is named."""

_REMEDY = "copy or export the file again"


def open_tiff(path: Path) -> TiffContents:
    """The scenes of a TIFF file; no pixels are read yet.

    Raises
    ------
    InputError
        When it is damaged, or holds no image, or one along axes that are not known.
    """
    with _readable(path):
        tiff = TiffFile(path, **_ONE_FILE)
        try:
            return TiffContents(path, tiff)
        except BaseException:
            tiff.close()
            raise


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong in tifffile is the file's fault."""
    with _quiet() as said:
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            why = printable(str(error) or type(error).__name__)
            raise unusable(
                path, f"is damaged, or no TIFF that can be read ({why})", _REMEDY
            ) from error
    for message in said:
        logger.debug("%s: %s", printable(path.name), message)


class TiffContents:
    """An opened TIFF whose headers were read. See `Contents`."""

    def __init__(self, path: Path, tiff: Any) -> None:
        self._path = path
        self._tiff = tiff
        self._found = find_scenes(path, tiff)
        self.scenes = tuple(scene.counted for scene in self._found)

    def source(self, place: Place) -> TiffSource:
        """One plane, or a projection; no pixels are read yet.

        Raises
        ------
        InputError
            When pages of it are missing, or of a kind that would not be read right.
        """
        with _readable(self._path):
            header, layout = read_layout(self._found[place.scene], self._tiff, place)
        return TiffSource(self._path, header, layout)

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Collect what tifffile logs in this thread: its errors are ours to tell, in one line."""
    said: list[str] = []
    thread = threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        if record.thread != thread:
            return True
        said.append(printable(record.getMessage()))
        return False

    tifffile_logger = logging.getLogger("tifffile")
    tifffile_logger.addFilter(keep)
    try:
        yield said
    finally:
        tifffile_logger.removeFilter(keep)


class TiffSource:
    """An open TIFF. See `Layout` for where its pixels are.

    Uncompressed pixels are read from their place, not mapped: a mapped file that is cut short, or a
    network file system that fails, kills the process (SIGBUS) where a read raises an error.
    """

    def __init__(self, path: Path, header: Header, layout: Layout) -> None:
        self.header = header
        self._path = path
        self._layout = layout
        self._stored = np.dtype(layout.keyframe.dtype).newbyteorder("=")
        self._size = path.stat().st_size
        self._cache = SegmentCache()
        self._lock = threading.Lock()
        self._file = path.open("rb")

    def close(self) -> None:
        """Close the file and forget the decoded segments."""
        self._file.close()
        self._cache.clear()

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
        _, height, width = self.header.shape
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
        row_bytes = self.header.shape[2] * pixel_bytes
        whole = _SPAN * width >= self.header.shape[2]
        x0, columns = (0, self.header.shape[2]) if whole else (box.x0, width)
        step = max(1, _ROWS_BYTES // row_bytes) if whole else 1
        dtype = self._stored.newbyteorder(self._layout.byte_order)
        for y0 in range(0, height, step):
            rows = min(step, height - y0)
            size = rows * columns * pixel_bytes
            data = self._read(start + (box.y0 + y0) * row_bytes + x0 * pixel_bytes, size)
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
        for region in layout.grid.meeting(box):
            part = region.box.intersect(box)
            source, target = part.within(region.box).slices, part.within(box).slices
            for out, sample in picked:
                plane, inner = (0, sample) if layout.interleaved else (sample, 0)
                row, column = region.index
                index = plane * len(layout.grid) + row * columns + column
                if page.byte_counts[index] == 0:
                    out[target] = 0
                    continue
                segment = self._segment(number, page, index, region, box)
                out[target] = segment[(*source, inner)]

    def _segment(
        self, number: int, page: Page, index: int, region: Region, box: Box
    ) -> NDArray[Any]:
        """(rows, columns, samples) of one segment; it covers at least the region's pixels."""
        return self._cache.get(
            (number, index), lambda: self._decode_segment(page, index, region, box)
        )

    def _decode_segment(self, page: Page, index: int, region: Region, box: Box) -> NDArray[Any]:
        layout = self._layout
        what = f"{'tile' if layout.keyframe.is_tiled else 'strip'} {index} {region.box}"
        offset, size = int(page.offsets[index]), int(page.byte_counts[index])
        if not (offset > 0 and 0 < size <= MAX_SEGMENT_BYTES and offset + size <= self._size):
            raise self._unreadable(
                f"ends at byte {self._size:,}, before its {what} (byte {offset:,} +{size:,})", box
            )
        data = self._read(offset, size)
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

    def _read(self, offset: int, size: int) -> bytes:
        try:
            with self._lock:
                self._file.seek(offset)
                return self._file.read(size)
        except OSError as error:
            raise self._unreadable(f"cannot be read ({printable(error)})", None) from error

    def _unreadable(self, what: str, box: Box | None) -> InputError:
        wanted = f", needed for {box}" if box is not None else ""
        return unusable(self._path, f"{what}{wanted}", _REMEDY)
