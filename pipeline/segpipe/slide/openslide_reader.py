"""Slides that OpenSlide reads: MIRAX, Hamamatsu VMS and VMU, Sakura, Ventana, DICOM.

Only importer of openslide, which the extra `wsi` installs. OpenSlide gives colours of 8 bits with
alpha; where a slide has no pixels (glass that was not scanned) it gets the slide's background.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from numpy.typing import NDArray

from segpipe.errors import InputError
from segpipe.geometry import Box, Lattice, Region
from segpipe.slide.cells import CELL, assemble
from segpipe.slide.pixel_size import number, stated_pixel
from segpipe.slide.planes import Place, Scene
from segpipe.slide.segments import SegmentCache
from segpipe.slide.source import (
    Header,
    Level,
    check_size,
    downsample_of,
    left_out,
    printable,
    unusable,
)

_REMEDY = "copy or export the file again, with the folder that belongs to it if it has one"
_WHITE = "FFFFFF"


def open_openslide(path: Path) -> OpenSlideContents:
    """The slide in a file; no pixels are read yet.

    Raises
    ------
    InputError
        When OpenSlide cannot read it.
    """
    return OpenSlideContents(path)


class OpenSlideContents:
    """A slide, which is one scene. See `Contents`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _opened(path) as slide:
            self._header = _header(path, slide)
        self.scenes: tuple[Scene, ...] = (Scene(path.name, self._header.shape[1:]),)

    def source(self, place: Place) -> OpenSlideSource:
        """The slide, opened anew."""
        return OpenSlideSource(self._path, self._header)

    def close(self) -> None:
        """Nothing is kept open."""


def _opened(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(path)
    except (openslide.OpenSlideError, OSError) as error:
        why = printable(str(error) or type(error).__name__)
        raise unusable(path, f"cannot be opened by OpenSlide ({why})", _REMEDY) from error


def _header(path: Path, slide: Any) -> Header:
    width, height = slide.dimensions
    check_size(path, (3, height, width), 1, None)
    levels, warnings = [Level((height, width), 1.0)], []
    for found, (level_width, level_height) in enumerate(slide.level_dimensions[1:], start=1):
        shape = (level_height, level_width)
        factor = downsample_of((height, width), shape)
        if factor is None or len(levels) != found:
            error = ValueError(f"{level_height} x {level_width} is no smaller copy of the image")
            warnings.append(left_out(path, found, error))
            continue
        levels.append(Level(shape, factor))
    y_um, x_um = (number(slide.properties.get(f"openslide.mpp-{axis}")) for axis in "yx")
    vendor = printable(slide.properties.get("openslide.vendor", "unknown"), 40)
    return Header(
        shape=(3, height, width),
        dtype=np.dtype(np.uint8),
        channel_names=("red", "green", "blue"),
        rgb=True,
        pixel_size=stated_pixel(path, y_um, x_um, "OpenSlide's mpp"),
        levels=tuple(levels),
        reader=f"openslide/{vendor}",
        compression="vendor's",
        warnings=tuple(warnings),
        left_out=tuple(printable(name, 60) for name in slide.associated_images),
    )


class OpenSlideSource:
    """An open slide.

    A level whose factor is not whole would be moved by a fraction of a pixel when a box starts
    between two of its pixels; cells of a fixed lattice keep that the same for every box. After an
    error OpenSlide refuses all that follows, so the slide is then opened anew.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.header = header
        self._path = path
        self._lock = threading.Lock()
        self._slide = _opened(path)
        self._factors = self._slide.level_downsamples
        colour = self._slide.properties.get("openslide.background-color", _WHITE)
        self._background = np.frombuffer(bytes.fromhex(colour), np.uint8).astype(np.uint16)
        self._cache = SegmentCache()

    def close(self) -> None:
        """Close the slide and forget what was decoded."""
        self._slide.close()
        self._cache.clear()

    def read(self, box: Box, channels: tuple[int, ...], level: int) -> NDArray[Any]:
        """(channels, height, width) uint8.

        Raises
        ------
        InputError
            When OpenSlide cannot decode a part of it.
        """
        lattice = Lattice(self.header.levels[level].shape, (CELL, CELL))
        pixels = assemble(
            box,
            lattice,
            (3, self.header.dtype),
            lambda region: self._cache.get(
                (level, region.index), lambda: self._cell(region, level)
            ),
        )
        return pixels[list(channels)]

    def _cell(self, region: Region, level: int) -> NDArray[np.uint8]:
        box, factor = region.box, self._factors[level]
        place = (round(box.x0 * factor), round(box.y0 * factor))
        height, width = box.shape
        slide = self._slide
        try:
            picture = np.asarray(slide.read_region(place, level, (width, height)))
        except openslide.OpenSlideError as error:
            self._reopen(slide)
            why = printable(str(error) or type(error).__name__)
            at = "" if level == 0 else f" of level {level}"
            raise unusable(
                self._path, f"cannot be decoded in {box}{at} ({why})", _REMEDY
            ) from error
        colours, alpha = picture[..., :3].astype(np.uint16), picture[..., 3:].astype(np.uint16)
        shown = (colours * alpha + self._background * (255 - alpha) + 127) // 255
        return np.ascontiguousarray(np.moveaxis(shown.astype(np.uint8), -1, 0))

    def _reopen(self, broken: Any) -> None:
        """Open the slide anew, once for all threads that met the error."""
        with self._lock:
            if self._slide is broken:
                try:
                    self._slide = _opened(self._path)
                except InputError:
                    return  # the next read says so
