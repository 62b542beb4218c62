"""Which series of pages of a TIFF is the slide.

tifffile parses; this module decides, and refuses what it would have to guess: several planes,
several scenes, pages whose meaning nobody stated.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from segpipe.slide.source import printable, unusable
from segpipe.slide.tiff_metadata import AUXILIARY, OmeImage, parse_ome, resolution_um

_MACRO_FACTOR = 4
_AXIS_WORDS = {
    "Z": "z planes",
    "T": "time points",
    "I": "pages without a stated meaning",
    "Q": "pages without a stated meaning",
    "R": "positions",
    "A": "angles",
    "H": "lifetimes",
}


def find_series(path: Path, tiff: Any) -> tuple[Any, OmeImage | None]:
    """The one series that is the slide, and what OME-XML says of it, if it has any.

    Raises
    ------
    InputError
        When there is none, or several beside labels, macros and thumbnails.
    """
    ome = _ome_image(path, tiff)
    series = _main_series(path, tiff)
    if ome is not None and series.kind != "ome":
        raise unusable(path, "has OME-XML that does not fit its pages", "export it again")
    return series, ome


def _ome_image(path: Path, tiff: Any) -> OmeImage | None:
    if not tiff.is_ome:
        return None
    images = parse_ome(path, tiff.ome_metadata)
    if len(images) != 1:
        listed = ", ".join(
            f"{printable(image.name, 40) or '?'} {image.sizes['Y']} x {image.sizes['X']}"
            for image in images[:4]
        )
        raise unusable(path, f"has {len(images)} images ({listed})", "save one image a file")
    image = images[0]
    _refuse_axes(path, [(axis, image.sizes[axis]) for axis in "ZT" if image.sizes[axis] > 1])
    return image


def _main_series(path: Path, tiff: Any) -> Any:
    found = [series for series in tiff.series if prod(series.shape)]
    if not found:
        raise unusable(path, "is a TIFF without an image", "copy or export it again")
    if tiff.is_bif:
        raise unusable(path, "is a Ventana BIF, whose tiles overlap", "convert it to OME-TIFF")
    if tiff.is_svs or tiff.is_ndpi:
        # Thumbnail, label, macro and map: pictures beside the slide, which is the largest.
        return max(
            found, key=lambda series: series.keyframe.imagelength * series.keyframe.imagewidth
        )
    main = [series for series in found if series.name.strip().lower() not in AUXILIARY] or found
    if tiff.is_scn:
        main = _finest(main)
    if len(main) != 1:
        shapes = ", ".join(
            f"{' x '.join(str(size) for size in series.shape)} {series.axes}" for series in main[:4]
        )
        raise unusable(path, f"has {len(main)} images ({shapes})", "save one image a file")
    if main[0].transform is not None:
        raise unusable(path, "has pixels that need a conversion", "convert it to OME-TIFF")
    return main[0]


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


def check_axes(path: Path, series: Any) -> None:
    """Refuse axes longer than 1 beside channels, samples, y and x.

    Raises
    ------
    InputError
        When there are such axes, or planes that are not the pages.
    """
    sizes = list(zip(series.get_axes(False), series.get_shape(False), strict=True))
    _refuse_axes(path, [(axis, size) for axis, size in sizes if size > 1 and axis not in "CSYX"])
    page = series.keyframe
    plane = [size for axis, size in sizes if axis in "YX"]
    if plane != [page.imagelength, page.imagewidth]:
        raise unusable(
            path,
            f"says that its planes are {plane}, and has pages of "
            f"{page.imagelength} x {page.imagewidth}",
            "write it again",
        )


def _refuse_axes(path: Path, extra: list[tuple[str, int]]) -> None:
    if not extra:
        return
    words = " and ".join(
        f"{size} {_AXIS_WORDS.get(axis, f'of axis {axis}')}" for axis, size in extra
    )
    remedy = (
        "save it with its axes stated (OME-TIFF, ImageJ hyperstack), or one page a file"
        if extra[0][0] in "IQ"
        else "save the plane to segment in a file of its own"
    )
    raise unusable(path, f"has {words}", remedy)
