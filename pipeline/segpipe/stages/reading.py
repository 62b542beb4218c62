"""Pixels of the file at the working resolution; a process keeps the file open that it reads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.geometry import Box
from segpipe.resampling import SAME, Resolution, resample, source_box
from segpipe.slide import OpenFile, Plane, Slide, open_file
from segpipe.stages.image import Image
from segpipe.store import read_box

Array = np.ndarray[Any, np.dtype[Any]]
MOST_PIXELS = 2**25
"""Of the file, that are held at once to be resampled: a region of a slide without a pyramid may be
made of several hundred megapixels."""


class Reader:
    """The file that this process has open, and the plane of it that is being read.

    The file stays open from one of its planes to the next: the headers of a thousand pages take as
    long as some of the planes.
    """

    def __init__(self) -> None:
        self._file: tuple[Path, str, OpenFile] | None = None
        self._slide: tuple[Plane, Slide] | None = None

    def slide(self, image: Image) -> Slide:
        """The image's plane, opened anew when the process had another one."""
        wanted = image.source, image.layout.source_fingerprint
        if self._file is None or self._file[:2] != wanted:
            self.close()
            self._file = (*wanted, open_file(image.source))
        if self._slide is None or self._slide[0] != image.plane:
            self.close_slide()
            self._slide = image.plane, self._file[2].slide(image.plane)
        return self._slide[1]

    def close_slide(self) -> None:
        """Forget what was decoded."""
        if self._slide is not None:
            self._slide[1].close()
        self._slide = None

    def close(self) -> None:
        """Close plane and file."""
        self.close_slide()
        if self._file is not None:
            self._file[2].close()
        self._file = None


@functools.cache
def reader() -> Reader:
    """The one of this process."""
    return Reader()


@contextlib.contextmanager
def closing_input() -> Iterator[None]:
    """Close the file that this process has open, if any, in the end."""
    try:
        yield
    finally:
        reader().close()


def pixels_in(image: Image, box: Box, channels: Sequence[int] | None = None) -> Array:
    """(channels, h, w) of a box of working pixels: from OUT where it holds them, else from the file.

    Raises
    ------
    InputError, SegpipeError
        When the file, or the array, is damaged.
    """
    if image.layout.copied:
        return read_box(image.zarr / "0", box, channels)
    return read_working(reader().slide(image), image.layout.resolution, box, channels)


def read_coarse(image: Image, level: int, box: Box) -> Array:
    """(C, h, w) of a box of a pyramid level of the working image, from the file.

    The file's own pyramid is used: its nearest finer level, or one as coarse. Where none is, all of
    the box is read at full resolution, in strips.
    """
    slide = reader().slide(image)
    wanted = image.scale * 2**level
    levels = list(enumerate(slide.levels))
    fine = [(number, one) for number, one in levels if one.downsample <= wanted * (1 + SAME)]
    number, found = max(fine or levels[:1], key=lambda pair: pair[1].downsample)
    resolution = Resolution(image.grid.levels[level], wanted, number, found.downsample)
    return _resampled(slide, resolution, box, None)


def read_working(
    slide: Slide, resolution: Resolution, box: Box, channels: Sequence[int] | None = None
) -> Array:
    """(channels, h, w) of a box of working pixels, in the slide's dtype; None gives all channels.

    Raises
    ------
    InputError
        As `Slide.read`.
    """
    if not resolution.resampled:
        return slide.read(box, channels, resolution.level)
    return _resampled(slide, resolution, box, channels)


def _resampled(
    slide: Slide, resolution: Resolution, box: Box, channels: Sequence[int] | None
) -> Array:
    level, ratio = resolution.level, resolution.ratio
    shape = slide.levels[level].shape
    count = slide.shape[0] if channels is None else len(channels)
    result = np.empty((count, *box.shape), slide.dtype)
    rows = max(1, int(MOST_PIXELS / (box.shape[1] * max(ratio, 1.0) ** 2)))
    for y in range(box.y0, box.y1, rows):
        strip = Box(y, box.x0, min(y + rows, box.y1), box.x1)
        at = source_box(strip, ratio, shape)
        pixels = slide.read(at, channels, level)
        result[(slice(None), *strip.within(box).slices)] = resample(pixels, at, strip, ratio, shape)
    return result
