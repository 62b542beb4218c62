"""Zeiss CZI files. Only importer of pylibCZIrw, which comes with bioio-czi (the extra `bioio`).

bioio's reader of CZI decodes whole planes, and a plane of a slide scanner is a hundred gigabytes;
the library below it reads boxes.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from pylibCZIrw import czi

from segpipe.geometry import Box, Lattice, Region
from segpipe.slide.cells import CELL, assemble
from segpipe.slide.pixel_size import number, stated_pixel
from segpipe.slide.planes import Place, Scene
from segpipe.slide.segments import SegmentCache
from segpipe.slide.source import (
    Header,
    Level,
    PixelSize,
    check_size,
    printable,
    project,
    reading,
    unusable,
)
from segpipe.slide.tiff_metadata import channel_names

_REMEDY = "copy or export the file again"
_DAMAGED = "is damaged, or no CZI that can be read"
_GREY = {"Gray8": np.uint8, "Gray16": np.uint16, "Gray32Float": np.float32}
_COLOUR = {"Bgr24": np.uint8, "Bgr48": np.uint16}


def open_czi(path: Path) -> CziContents:
    """The scenes of a CZI file; no pixels are read yet.

    Raises
    ------
    InputError
        When it is damaged, or has pixels or axes that are not known.
    """
    return CziContents(path)


class CziContents:
    """A CZI file whose headers were read. See `Contents`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with reading(path, _DAMAGED, _REMEDY), czi.open_czi(str(path)) as document:
            sizes = {
                axis: end - start for axis, (start, end) in document.total_bounding_box.items()
            }
            self._starts = {axis: start for axis, (start, _) in document.total_bounding_box.items()}
            extra = {axis: size for axis, size in sizes.items() if size > 1 and axis not in "TZCXY"}
            if extra:
                words = " and ".join(f"{size} of axis {axis}" for axis, size in extra.items())
                raise unusable(path, f"has {words}", "save what to segment in a file of its own")
            self._channels = sizes.get("C", 1)
            self._kinds = [document.pixel_types[number] for number in sorted(document.pixel_types)]
            scenes = document.scenes_bounding_rectangle
            self._areas = [(number, scenes[number]) for number in sorted(scenes)] or [
                (None, document.total_bounding_rectangle)
            ]
            self._names, self._size = _stated(path, document.raw_metadata)
        self.scenes = tuple(
            Scene(
                path.name if scene is None else f"scene {scene}",
                (area.h, area.w),
                sizes.get("T", 1),
                sizes.get("Z", 1),
            )
            for scene, area in self._areas
        )

    def source(self, place: Place) -> CziSource:
        """One plane, or a projection; no pixels are read yet.

        Raises
        ------
        InputError
            When its pixels are of a kind that would not be read right.
        """
        scene, area = self._areas[place.scene]
        kinds = set(self._kinds)
        kind = self._kinds[0] if len(kinds) == 1 else ""
        rgb = kind in _COLOUR and self._channels == 1
        if not rgb and kind not in _GREY:
            what = f"has pixels of type {printable(', '.join(sorted(kinds)))}"
            raise unusable(self._path, what, "convert it to OME-TIFF")
        dtype = np.dtype(_COLOUR[kind] if rgb else _GREY[kind])
        shape = (3 if rgb else self._channels, area.h, area.w)
        check_size(self._path, shape, dtype.itemsize, self._path.stat().st_size)
        colours = ("red", "green", "blue")
        header = Header(
            shape=shape,
            dtype=dtype,
            channel_names=colours if rgb else channel_names(self._names, self._channels),
            rgb=rgb,
            pixel_size=self._size,
            levels=(Level(shape[1:], 1.0),),
            reader="pylibCZIrw/czi",
            compression="CZI's",
        )
        planes = [
            {"T": place.t + self._starts.get("T", 0), "Z": z + self._starts.get("Z", 0)}
            for z in place.z
        ]
        first = self._starts.get("C", 0)
        return CziSource(self._path, header, (scene, area.x, area.y), planes, first)

    def close(self) -> None:
        """Nothing is kept open."""


def _stated(path: Path, xml: str) -> tuple[tuple[str, ...], PixelSize]:
    """Names of the channels, and the size of a pixel; Zeiss states metres."""
    if "<!ENTITY" in xml or "<!DOCTYPE" in xml:
        raise unusable(path, "has metadata that declare entities", _REMEDY)
    root = ElementTree.fromstring(xml)  # noqa: S314  entities are refused above
    named = root.findall(".//Information/Image/Dimensions/Channels/Channel")
    names = tuple(channel.attrib.get("Name", "") for channel in named)
    stated = {
        distance.attrib.get("Id"): number(distance.findtext("Value"))
        for distance in root.findall(".//Scaling/Items/Distance")
    }
    # A scale of 0 is how libCZI writes that there is none.
    y, x = (None if not stated.get(axis) else stated[axis] for axis in "YX")
    y_um, x_um = (None if metres is None else metres * 1e6 for metres in (y, x))
    return names, stated_pixel(path, y_um, x_um, "CZI's scaling")


class CziSource:
    """An open CZI file. Where no tile of a mosaic lies it is black, and white where it is RGB."""

    def __init__(
        self,
        path: Path,
        header: Header,
        origin: tuple[int | None, int, int],
        planes: list[dict[str, int]],
        first_channel: int,
    ) -> None:
        self.header = header
        self._path = path
        self._scene, self._x, self._y = origin
        self._planes = planes
        self._first = first_channel
        self._lock = threading.Lock()
        self._cache = SegmentCache()
        self._open = contextlib.ExitStack()
        with reading(path, _DAMAGED, _REMEDY):
            self._document = self._open.enter_context(czi.open_czi(str(path)))

    def close(self) -> None:
        """Close the file and forget what was decoded."""
        self._open.close()
        self._cache.clear()

    def read(self, box: Box, channels: tuple[int, ...], level: int) -> NDArray[Any]:
        """(channels, height, width) in the file's dtype.

        Raises
        ------
        InputError
            When a part of it cannot be decoded.
        """
        if self.header.rgb:
            return project(self._box(box, plane, 0) for plane in self._planes)[list(channels)]
        parts = [
            project(self._box(box, plane, channel) for plane in self._planes)
            for channel in channels
        ]
        return np.concatenate(parts)

    def _box(self, box: Box, plane: dict[str, int], channel: int) -> NDArray[Any]:
        """(samples, height, width)."""
        lattice = Lattice(self.header.shape[1:], (CELL, CELL))
        key = (*plane.values(), channel)
        wanted = plane | {"C": channel + self._first}
        return assemble(
            box,
            lattice,
            (3 if self.header.rgb else 1, self.header.dtype),
            lambda region: self._cache.get((key, region.index), lambda: self._cell(region, wanted)),
        )

    def _cell(self, region: Region, plane: dict[str, int]) -> NDArray[Any]:
        box = region.box
        height, width = box.shape
        area = (self._x + box.x0, self._y + box.y0, width, height)
        background = (1.0, 1.0, 1.0) if self.header.rgb else (0.0, 0.0, 0.0)
        with reading(self._path, f"cannot be decoded in {box}", _REMEDY), self._lock:
            pixels = self._document.read(
                area, plane, scene=self._scene, background_pixel=background
            )
        if self.header.rgb:
            pixels = pixels[..., ::-1]  # Zeiss stores blue first
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
