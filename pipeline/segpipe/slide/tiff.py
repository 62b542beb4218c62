"""TIFF files: which scenes they hold, and a Source of one plane of one."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tifffile import TiffFile

from segpipe.geometry import Box
from segpipe.slide.planes import Place
from segpipe.slide.segments import SegmentCache
from segpipe.slide.source import Header, printable, reading
from segpipe.slide.tiff_level import OpenBytes, TiffLevel
from segpipe.slide.tiff_pages import Layout, read_layouts
from segpipe.slide.tiff_series import find_scenes

logger = logging.getLogger(__name__)

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
    with _quiet() as said, reading(path, "is damaged, or no TIFF that can be read", _REMEDY):
        yield
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
            header, layouts = read_layouts(self._found[place.scene], self._tiff, place)
        return TiffSource(self._path, header, layouts)

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
    """An open TIFF."""

    def __init__(self, path: Path, header: Header, layouts: tuple[Layout, ...]) -> None:
        self.header = header
        self._cache = SegmentCache()
        self._file = OpenBytes(path)
        self._levels = tuple(
            TiffLevel(self._file, layout, self._cache, number)
            for number, layout in enumerate(layouts)
        )

    def close(self) -> None:
        """Close the file and forget the decoded segments."""
        self._file.close()
        self._cache.clear()

    def read(self, box: Box, channels: tuple[int, ...], level: int) -> NDArray[Any]:
        """(channels, height, width) in the file's dtype.

        Raises
        ------
        InputError
            When a segment is missing, cut off, or does not decode to its size.
        """
        return self._levels[level].read(box, channels)
