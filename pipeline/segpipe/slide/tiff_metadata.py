"""What TIFF dialects say beside the pixels: names of channels, and the size of a pixel.

A pixel size is one that somebody stated: OME-XML, ImageJ's unit, Aperio's MPP, or a resolution tag
in centimetres or inches that gives a size a microscope can have (72 dots an inch is a printer's).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from segpipe.slide.pixel_size import UM_PER_UNIT, first_stated, number, stated_pixel
from segpipe.slide.source import MAX_SIDE, PixelSize, printable, unusable

MAX_PLANES = 65_536
MICROSCOPE_UM = (0.01, 20.0)
AUXILIARY = frozenset(
    f"{name}{suffix}"
    for name in ("thumbnail", "label", "macro", "map", "overview")
    for suffix in ("", " image")
)
"""Names of pictures beside the slide, in lower case, as tifffile and Bio-Formats write them."""

_UM_PER_RESOLUTION_UNIT = {2: 25_400.0, 3: 10_000.0}


@dataclass(frozen=True)
class OmeImage:
    """One Image of OME-XML. `names` is empty unless each channel is one sample."""

    name: str
    sizes: dict[str, int]
    names: tuple[str, ...]
    y_um: float | None
    x_um: float | None

    @property
    def is_auxiliary(self) -> bool:
        """Whether it is named as a picture beside the slide."""
        return self.name.strip().lower() in AUXILIARY

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Whether pixels of these sizes by axis may be its own; channels may be samples of them."""
        return all(self.sizes[axis] == sizes.get(axis, 1) for axis in "TZYX")


def parse_ome(path: Path, text: str) -> tuple[OmeImage, ...]:
    """The Images of OME-XML.

    Checked before tifffile makes lists as long as the XML asks for, or opens the files that it
    names.

    Raises
    ------
    InputError
        When the XML is damaged, declares entities, spreads over several files, has a modulo axis,
        or counts more than `MAX_PLANES` planes.
    """
    export = "export the image again as one OME-TIFF"
    if "<!ENTITY" in text or "<!DOCTYPE" in text:
        raise unusable(path, "has OME-XML that declares entities", export)
    try:
        root = ElementTree.fromstring(text)  # noqa: S314  entities are refused above
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise unusable(path, f"has damaged OME-XML ({printable(error)})", export) from error
    if any(_tag(element).startswith("ModuloAlong") for element in root.iter()):
        raise unusable(path, "has a modulo axis (lifetimes, angles or the like)", export)
    if _children(root, "BinaryOnly"):
        raise unusable(path, "holds pixels of an OME-TIFF that is described elsewhere", export)
    _refuse_other_files(path, root, export)
    try:
        return tuple(_ome_image(image) for image in _children(root, "Image"))
    except (ArithmeticError, IndexError, KeyError, ValueError) as error:
        what = f"has OME-XML that cannot be used ({type(error).__name__}: {printable(error)})"
        raise unusable(path, what, export) from error


def ome_image_names(text: str) -> tuple[str, ...]:
    """Names of the Images of OME-XML; none when it is damaged or declares entities."""
    if "<!ENTITY" in text or "<!DOCTYPE" in text:
        return ()
    try:
        root = ElementTree.fromstring(text)  # noqa: S314  entities are refused above
    except (ElementTree.ParseError, ValueError, RecursionError):
        return ()
    return tuple(image.attrib.get("Name", "") for image in _children(root, "Image"))


def _ome_image(image: ElementTree.Element) -> OmeImage:
    pixels = _children(image, "Pixels")[0]
    sizes = {axis: int(pixels.attrib[f"Size{axis}"]) for axis in "CTZYX"}
    if not all(1 <= size <= MAX_SIDE for size in sizes.values()):
        raise ValueError(f"sizes {sizes}")
    planes = [sizes["C"] * sizes["T"] * sizes["Z"]]
    for data in _children(pixels, "TiffData"):
        counted = (data.attrib.get(key, 0) for key in ("IFD", "NumPlanes", "PlaneCount"))
        planes += [int(count) for count in counted]
    if max(planes) > MAX_PLANES:
        raise ValueError(f"{max(planes):,} planes, more than {MAX_PLANES:,}")
    if min(planes) < 0:
        raise ValueError("a negative count of planes")
    channels = _children(pixels, "Channel")
    single = all(int(channel.attrib.get("SamplesPerPixel", 1)) == 1 for channel in channels)
    stated = single and any(channel.attrib.get("Name", "").strip() for channel in channels)
    return OmeImage(
        name=image.attrib.get("Name", ""),
        sizes=sizes,
        names=tuple(channel.attrib.get("Name", "") for channel in channels) if stated else (),
        y_um=_physical_um(pixels, "Y"),
        x_um=_physical_um(pixels, "X"),
    )


def _physical_um(pixels: ElementTree.Element, axis: str) -> float | None:
    size = pixels.attrib.get(f"PhysicalSize{axis}")
    unit = UM_PER_UNIT.get(pixels.attrib.get(f"PhysicalSize{axis}Unit", "µm").strip().lower())
    if size is None or unit is None:
        return None
    return float(size) * unit


def _refuse_other_files(path: Path, root: ElementTree.Element, remedy: str) -> None:
    for element in root.iter():
        if _tag(element) != "UUID":
            continue
        other = element.attrib.get("FileName", "")
        if element.text != root.attrib.get("UUID") and other.lower() != path.name.lower():
            raise unusable(
                path,
                f"is one of several files of an OME-TIFF (also {printable(other) or 'unnamed'})",
                f"{remedy}, or give it back its name if it was renamed",
            )


def _tag(element: ElementTree.Element) -> str:
    return str(element.tag).rsplit("}", 1)[-1]


def _children(element: ElementTree.Element, tag: str) -> list[ElementTree.Element]:
    return [child for child in element if _tag(child) == tag]


def channel_names(stated: Iterator[str] | tuple[str, ...], count: int) -> tuple[str, ...]:
    """The stated names if they are `count`, with numbers where one is empty; else numbers."""
    names = [name.strip() for name in stated]
    if len(names) != count:
        return tuple(str(number) for number in range(count))
    return tuple(name or str(number) for number, name in enumerate(names))


def imagej_labels(metadata: dict[str, Any], numbers: NDArray[np.int64]) -> tuple[str, ...]:
    """Names of channels from the labels that ImageJ keeps for the pages of a stack, if they name them.

    `numbers` are the pages, (T, Z, C). Labels of a stack often name slices: only one that all pages
    of a channel share is the channel's.
    """
    labels = [str(label or "") for label in metadata.get("Labels") or ()]
    if len(labels) != numbers.size:
        return ()
    shared = ({labels[page] for page in pages} for pages in numbers.reshape(-1, numbers.shape[2]).T)
    return tuple(names.pop() if len(names) == 1 else "" for names in shared)


def qptiff_name(description: str) -> str:
    """The name of the channel that a page of a QPTIFF holds, or nothing."""
    found = re.search(r"<Name>([^<]*)</Name>", description)
    return found.group(1) if found else ""


def resolution_um(page: Any, um_per_unit: float | None = None) -> tuple[float, float] | None:
    """Sides (y, x) of a pixel from the resolution tags; None when they do not say.

    `um_per_unit` is the unit when something else than the tag states it; without it, sizes
    outside `MICROSCOPE_UM` are not believed.
    """
    unit = um_per_unit or _UM_PER_RESOLUTION_UNIT.get(page.tags.valueof(296))
    if unit is None:
        return None
    sides = []
    for code in (283, 282):
        value = page.tags.valueof(code)
        if not isinstance(value, tuple) or len(value) != 2 or min(value) <= 0:
            return None
        sides.append(unit * value[1] / value[0])
    low, high = MICROSCOPE_UM
    if um_per_unit is None and not all(low <= side <= high for side in sides):
        return None
    return sides[0], sides[1]


def pixel_size(path: Path, tiff: Any, page: Any, ome: OmeImage | None) -> PixelSize:
    """Micrometres a pixel of the finest level, by the first of these that states it.

    Raises
    ------
    InputError
        When pixels are not square.
    """

    def stated() -> Iterator[PixelSize]:
        if ome is not None:
            yield stated_pixel(path, ome.y_um, ome.x_um, "OME-XML")
        if tiff.is_svs:
            found = re.search(r"\bMPP\s*=\s*([^|\s]+)", page.description)
            side = number(found.group(1) if found else None)
            yield stated_pixel(path, side, side, "Aperio's MPP")
        if tiff.is_imagej and ome is None:
            y, x = _imagej_um(page, tiff.imagej_metadata or {}) or (None, None)
            yield stated_pixel(path, y, x, "ImageJ")
        else:
            y, x = resolution_um(page) or (None, None)
            yield stated_pixel(path, y, x, "the resolution tag")

    return first_stated(stated())


def _imagej_um(page: Any, metadata: dict[str, Any]) -> tuple[float, float] | None:
    name = str(metadata.get("unit", "")).strip().lower()
    if str(metadata.get("yunit", name)).strip().lower() != name:
        return None
    unit = UM_PER_UNIT.get(name)
    if unit is None or unit > 1:
        # ImageJ writes centimetres and inches for scanned pictures: they obey the common rule.
        return resolution_um(page)
    return resolution_um(page, unit)
