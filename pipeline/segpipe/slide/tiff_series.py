"""Which pages of a TIFF are a scene of the slide, and along which axes they lie.

tifffile parses; this module tells scenes from pictures beside them (labels, macros, thumbnails) and
from levels of a pyramid, and finds the page of each plane and channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segpipe.errors import InputError
from segpipe.slide.planes import Pages, Scene
from segpipe.slide.source import printable, unusable
from segpipe.slide.tiff_metadata import AUXILIARY, OmeImage, parse_ome, resolution_um

MAX_PAGES = 2**20
_MACRO_FACTOR = 4
_STATED, _UNSTATED = "TZC", "IQ"
_AXIS_WORDS = {"R": "positions", "A": "angles", "H": "lifetimes"}
_MEANING = {"z": "Z", "t": "T", "channel": "C"}


@dataclass(frozen=True)
class TiffScene:
    """One scene: its pages, and the axes along which they lie.

    `axes` and `shape` are those along which pages follow each other, the last one fastest; `start`
    is where the pixels of all pages begin, if they lie there one after the other. `pages` holds
    tifffile's pages, None where one is missing. `coarser` are the levels below the full resolution,
    `left_out` the pictures beside the scenes.
    """

    path: Path
    series: Any
    pages: Sequence[Any]
    axes: str
    shape: tuple[int, ...]
    start: int | None
    name: str
    ome: OmeImage | None
    coarser: tuple[TiffScene, ...] = ()
    left_out: tuple[str, ...] = ()

    @cached_property
    def counted(self) -> Scene:
        """How many planes there are."""
        page = self.series.keyframe
        size = dict.fromkeys("TZI", 1)
        for axis, length in zip(self.axes, self.shape, strict=True):
            size["I" if axis in _UNSTATED else axis] = size.get(axis, 1) * length
        return Scene(
            self.name, (page.imagelength, page.imagewidth), size["T"], size["Z"], size["I"]
        )

    def page_numbers(self, pages: Pages | None) -> NDArray[np.int64]:
        """(T, Z, C) numbers of pages; `pages` tells the meaning of those that the file does not."""
        meaning = _MEANING.get(pages or "", "C")
        letters = [meaning if axis in _UNSTATED else axis for axis in self.axes]
        order = sorted(range(len(letters)), key=lambda place: _STATED.index(letters[place]))
        size = {
            letter: prod(n for axis, n in zip(letters, self.shape, strict=True) if axis == letter)
            for letter in _STATED
        }
        numbers = np.arange(prod(self.shape)).reshape(self.shape).transpose(order)
        return numbers.reshape([size[letter] for letter in _STATED])


def find_scenes(path: Path, tiff: Any) -> tuple[TiffScene, ...]:
    """The scenes of a TIFF, without labels, macros and thumbnails, unless there is nothing else.

    Raises
    ------
    InputError
        When there is none, or one whose pages lie along other axes than channels, z, time.
    """
    # Before tifffile believes what the XML counts.
    images = parse_ome(path, tiff.ome_metadata) if tiff.is_ome else None
    found = [series for series in tiff.series if prod(series.shape)]
    if not found:
        raise unusable(path, "is a TIFF without an image", "copy or export it again")
    if tiff.is_bif:
        raise unusable(path, "is a Ventana BIF, whose tiles overlap", "convert it to OME-TIFF")
    if images is not None:
        scenes, beside = _ome_scenes(path, images, found)
    else:
        main = _main_series(tiff, found)
        joined = _are_pages_of_one(main)
        scenes = [_joined(path, main)] if joined else [_scene(path, series) for series in main]
        beside = [(series.name, series) for series in found if series not in main]
    for scene in scenes:
        if scene.series.transform is not None:
            raise unusable(path, "has pixels that need a conversion", "convert it to OME-TIFF")
    left_out = tuple(_picture(name, series.keyframe) for name, series in beside)
    return tuple(replace(scene, left_out=left_out) for scene in scenes)


def _picture(name: str, page: Any) -> str:
    return f"{printable(name, 60) or 'picture'} {page.imagewidth} x {page.imagelength}"


def _ome_scenes(
    path: Path, images: tuple[OmeImage, ...], found: list[Any]
) -> tuple[list[TiffScene], list[tuple[str, Any]]]:
    """A scene per Image, and the pictures beside them; OME-TIFF keeps the levels of a pyramid out of
    sight, in SubIFDs."""
    left = list(images)
    pairs = []
    for series in found:
        size = dict(zip(series.get_axes(False), series.get_shape(False), strict=True))
        fits = [n for n, image in enumerate(left) if image.fits(size)]
        if series.kind != "ome" or not fits:
            raise _unfit(path)
        pairs.append((left[fits[0]], series))
        del left[: fits[0] + 1]
    main = [pair for pair in pairs if not pair[0].is_auxiliary] or pairs
    if len(main) < sum(not image.is_auxiliary for image in images):
        raise _unfit(path)
    beside = [(image.name, series) for image, series in pairs if (image, series) not in main]
    return [_scene(path, series, image) for image, series in main], beside


def _unfit(path: Path) -> InputError:
    return unusable(path, "has OME-XML that does not fit its pages", "export it again")


def _main_series(tiff: Any, found: list[Any]) -> list[Any]:
    if tiff.is_svs or tiff.is_ndpi:
        # Thumbnail, label, macro and map: pictures beside the slide, which alone is tiled; else it is
        # the largest. Which comes first, and is therefore named Baseline, does not tell it.
        tiled = [series for series in found if series.keyframe.is_tiled] or found
        return [
            max(tiled, key=lambda series: series.keyframe.imagelength * series.keyframe.imagewidth)
        ]
    main = [series for series in found if series.name.strip().lower() not in AUXILIARY] or found
    main = [series for series in main if not series.keyframe.is_reduced] or main
    return _finest(main) if tiff.is_scn else main


def _finest(found: list[Any]) -> list[Any]:
    # A Leica SCN names neither its macro picture nor its scans: the macro's pixels are the coarse
    # ones (about 16 um; scans have 0.25 or 0.5).
    sizes = [resolution_um(series.keyframe) for series in found]
    known = [size[0] for size in sizes if size is not None]
    return [
        series
        for series, size in zip(found, sizes, strict=True)
        if size is not None and size[0] < _MACRO_FACTOR * min(known)
    ] or found


def _are_pages_of_one(found: list[Any]) -> bool:
    """Whether several images are pages that were written one by one, as tifffile does in a loop."""
    first = found[0]
    return len(found) > 1 and all(
        series.kind == "shaped"
        and len(series) == len(series.levels) == 1
        and series.keyframe.hash == first.keyframe.hash
        for series in found
    )


def _joined(path: Path, found: list[Any]) -> TiffScene:
    pages = [series.keyframe for series in found]
    first = found[0]
    return TiffScene(path, first, pages, "I", (len(pages),), None, "", None)


def _scene(path: Path, series: Any, ome: OmeImage | None = None) -> TiffScene:
    page = series.keyframe
    axes, shape = series.get_axes(False), tuple(series.get_shape(False))
    # The axes of a page come last; those before it are of pages.
    inner = next(
        (n for n in range(len(shape) + 1) if prod(shape[n:]) == prod(page.shape)), len(shape) + 1
    )
    plane = [size for axis, size in zip(axes, shape, strict=True) if axis in "YX"]
    if inner > len(shape) or plane != [page.imagelength, page.imagewidth]:
        raise unusable(
            path,
            f"says that its planes are {plane}, and has pages of "
            f"{page.imagelength} x {page.imagewidth}",
            "write it again",
        )
    sizes = list(zip(axes, shape, strict=True))
    outer = [(axis, size) for axis, size in sizes[:inner] if size > 1]
    _refuse_axes(path, [entry for entry in outer if entry[0] not in _STATED + _UNSTATED])
    _refuse_axes(path, [entry for entry in sizes[inner:] if entry[0] not in "CSYX"])
    counted = prod(size for _, size in outer)
    if counted > MAX_PAGES:
        raise unusable(path, f"claims {counted:,} pages, more than {MAX_PAGES:,}", "split it")
    full = TiffScene(
        path,
        series,
        series,
        "".join(axis for axis, _ in outer),
        tuple(size for _, size in outer),
        series.dataoffset if page.is_final else None,
        ome.name if ome else series.name,
        ome,
    )
    # Pages of a level follow each other as those of the full resolution do.
    coarser = (replace(full, series=level, pages=level, start=None) for level in series.levels[1:])
    return replace(full, coarser=tuple(coarser))


def _refuse_axes(path: Path, extra: list[tuple[str, int]]) -> None:
    """Refuse axes longer than 1 that are neither channels, z, time nor pages."""
    words = " and ".join(
        f"{size} {_AXIS_WORDS.get(axis, f'of axis {axis}')}" for axis, size in extra if size > 1
    )
    if words:
        raise unusable(path, f"has {words}", "save what to segment in a file of its own")
