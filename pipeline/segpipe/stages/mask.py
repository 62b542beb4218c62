"""A user's mask: where objects are looked for, and the tiles that have none of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segpipe.errors import InputError, SettingsError
from segpipe.geometry import Box
from segpipe.mask_polygons import Polygons, parse_geojson
from segpipe.resampling import to_full
from segpipe.slide import IMAGE_SUFFIXES, input_fingerprint, open_slide
from segpipe.slide.source import printable

Array = np.ndarray[Any, np.dtype[Any]]
POLYGONS = frozenset({".geojson", ".json"})
MOST_BYTES = 2**28
"""Of a GeoJSON file: some five million points."""
MOST_PIXELS, STRIP = 2**28, 1024
"""Of a mask that is an image; rows of it that are read at once."""


@dataclass(frozen=True)
class Mask:
    """A mask's file, and what changes when it does."""

    path: Path
    fingerprint: str

    def inside(
        self, box: Box, scale: float, full_shape: tuple[int, int], step: int = 1
    ) -> NDArray[np.bool_]:
        """(h, w): which working pixels of a box, or every `step`-th, are inside: by their centres.

        Parameters
        ----------
        scale, full_shape
            Full-resolution pixels a working pixel; (Y, X) of the full resolution.

        Raises
        ------
        InputError
            When the mask cannot be read.
        """
        opened = _opened(self.path, self.fingerprint)
        rows, columns = (
            to_full(np.arange(start, stop, step, dtype=np.float64), scale)
            for start, stop in ((box.y0, box.y1), (box.x0, box.x1))
        )
        if isinstance(opened, Polygons):
            return opened.inside(rows + 0.5, columns + 0.5)  # corners of pixels at whole numbers
        return _stretched(opened, rows, columns, full_shape)


def find_mask(setting: Path, name: str) -> Mask:
    """The mask of an image: the file, or in a folder the one of the image's name; it is read.

    Raises
    ------
    InputError
        When the folder has no mask for this image, or several; when it cannot be used.
    """
    if not setting.is_dir() or setting.suffix.lower() == ".zarr":
        return _checked(setting)
    parent = (setting / name).parent
    stem = Path(name).name
    suffixes = POLYGONS | IMAGE_SUFFIXES
    found = (
        [
            path
            for path in sorted(parent.iterdir())
            if path.suffix.lower() in suffixes and path.name == stem + path.suffix
        ]
        if parent.is_dir()
        else []
    )
    if len(found) != 1:
        what = f"{len(found)} masks" if found else "no mask"
        raise InputError(
            f"{name}: {what} for it in tile.mask {setting}; expected one {stem}.geojson, or an image "
            f"such as {stem}.png"
        )
    return _checked(found[0])


def _checked(path: Path) -> Mask:
    mask = Mask(path.resolve(), input_fingerprint(path))
    _opened(mask.path, mask.fingerprint)
    return mask


def mask_fingerprint(setting: Path | None) -> str | None:
    """Changes when the mask, or one of a folder, does; None: there is none.

    Raises
    ------
    SettingsError
        When there is no such file or folder.
    """
    if setting is None:
        return None
    try:
        return input_fingerprint(setting)
    except InputError as error:
        raise SettingsError(f"tile.mask: {error}") from None


@functools.lru_cache(maxsize=4)
def _opened(path: Path, _fingerprint: str) -> Polygons | NDArray[np.bool_]:
    """What is in the file: polygons, or (Y, X); kept by each process."""
    if path.suffix.lower() not in POLYGONS:
        return _picture(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"is larger than {MOST_BYTES / 1e6:.0f} MB; simplify its outlines")
        return parse_geojson(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or printable(error)
        raise InputError(f"tile.mask {printable(path.name)}: {reason}") from error


def _picture(path: Path) -> NDArray[np.bool_]:
    """(Y, X): where an image is not 0 in any channel."""
    with open_slide(path) as slide:
        height, width = slide.shape[1:]
        if height * width > MOST_PIXELS:
            raise InputError(
                f"tile.mask {printable(path.name)}: {width} x {height} px; expected at most "
                f"{MOST_PIXELS / 1e6:.0f} megapixels: it is stretched over the image, make it smaller"
            )
        inside = np.empty((height, width), bool)
        for y in range(0, height, STRIP):
            strip = Box(y, 0, min(y + STRIP, height), width)
            inside[strip.slices] = (slide.read(strip) != 0).any(axis=0)
        return inside


def _stretched(
    picture: NDArray[np.bool_], rows: Array, columns: Array, full_shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """The nearest pixels of a picture that is stretched over the slide."""
    y, x = (
        np.clip(((line + 0.5) * (size / full)).astype(np.int64), 0, size - 1)
        for line, size, full in zip((rows, columns), picture.shape, full_shape, strict=True)
    )
    found: NDArray[np.bool_] = picture[np.ix_(y, x)]
    return found
