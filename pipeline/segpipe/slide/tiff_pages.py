"""Where each channel of the slide lies in a TIFF.

It turns tifffile's objects into offsets and lengths, so that the file that tifffile opened can be
closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segpipe.geometry import Lattice
from segpipe.slide.planes import Place
from segpipe.slide.source import (
    MAX_SEGMENT_BYTES,
    Header,
    Level,
    check_size,
    downsample_of,
    left_out,
    unusable,
)
from segpipe.slide.tiff_coding import (
    MIN_IS_WHITE,
    PALETTE,
    RGB,
    YCBCR,
    check_coding,
    palette,
    sample_dtype,
)
from segpipe.slide.tiff_metadata import (
    channel_names,
    imagej_labels,
    pixel_size,
    qptiff_name,
)
from segpipe.slide.tiff_series import TiffScene

_ALPHA = (1, 2)


@dataclass(frozen=True)
class Page:
    """Where the segments of one page are. `start` is set if its pixels lie there row by row."""

    offsets: NDArray[np.int64]
    byte_counts: NDArray[np.int64]
    jpeg_tables: bytes | None
    start: int | None


@dataclass(frozen=True)
class Layout:
    """Where the pixels are.

    Channel k of plane z is sample `stack[z][k][1]` of page `stack[z][k][0]`; several planes are
    projected. With `colours`, (3, 2^bits) uint8, the only channel holds indices into it. A segment
    without bytes holds the value `absent`.
    `interleaved`: a segment holds the `samples` of a pixel side by side; otherwise each sample has
    segments of its own.
    """

    keyframe: Any
    pages: tuple[Page, ...]
    stack: tuple[tuple[tuple[int, int], ...], ...]
    samples: int
    interleaved: bool
    grid: Lattice
    byte_order: str
    colours: NDArray[np.uint8] | None
    inverted: bool
    absent: float

    @property
    def without_bytes(self) -> tuple[int, int]:
        """How many segments have no bytes, and how many there are."""
        counts = [page.byte_counts for page in self.pages if page.start is None]
        return sum(int(np.count_nonzero(c == 0)) for c in counts), sum(c.size for c in counts)


def read_layouts(scene: TiffScene, tiff: Any, place: Place) -> tuple[Header, tuple[Layout, ...]]:
    """Header of one plane of a scene, or of the planes to project, and the layout of each level.

    Raises
    ------
    InputError
        When a page of the full resolution is missing, or its pixels are of a kind that would not be
        read right. A level below it of which that is so is left out, with a warning.
    """
    path, page = scene.path, scene.series.keyframe
    layout, stated, rgb = _read_layout(scene, tiff, place)
    count, dtype = len(layout.stack[0]), np.dtype(page.dtype).newbyteorder("=")
    if layout.colours is not None:
        count, dtype = 3, np.dtype(np.uint8)
    shape = (count, page.imagelength, page.imagewidth)
    check_size(path, shape, dtype.itemsize, path.stat().st_size)
    layouts, levels = [layout], [Level(shape[1:], 1.0)]
    absent, segments = layout.without_bytes
    warnings = [
        f"{absent:,} of {segments:,} {'tiles' if page.is_tiled else 'strips'} hold no bytes: they are "
        f"read as {'white' if layout.absent else 'black'}"
    ][: 1 if absent else 0]
    for number, coarser in enumerate(scene.coarser, start=1):
        try:
            below, factor = _read_level(coarser, tiff, place, layout, levels[-1])
        except Exception as error:  # noqa: BLE001  whatever it is, the full resolution can be read
            warnings.append(left_out(path, number, error))
            continue
        layouts.append(below)
        levels.append(Level(below.grid.shape, factor))
    header = Header(
        shape=shape,
        dtype=dtype,
        channel_names=("red", "green", "blue") if rgb else channel_names(stated, count),
        rgb=rgb,
        pixel_size=pixel_size(path, tiff, page, scene.ome),
        levels=tuple(levels),
        reader=f"tifffile/{scene.series.kind}",
        compression=getattr(page.compression, "name", str(page.compression)).lower(),
        warnings=tuple(warnings),
        left_out=scene.left_out,
    )
    return header, tuple(layouts)


def _read_layout(scene: TiffScene, tiff: Any, place: Place) -> tuple[Layout, tuple[str, ...], bool]:
    """Layout of one level, the channel names that the file states, and whether it is RGB."""
    path, page = scene.path, scene.series.keyframe
    check_size(
        path,
        (page.samplesperpixel, page.imagelength, page.imagewidth),
        sample_dtype(path, page).itemsize,
        path.stat().st_size,
    )
    numbers = scene.page_numbers(place.pages)
    depth, channels = len(place.z), numbers.shape[2]
    if page.samplesperpixel > 1 and channels > 1:
        raise unusable(
            path,
            f"has {channels} pages of {page.samplesperpixel} samples each",
            "save the page to segment in a file of its own",
        )
    listed = numbers[place.t, place.z.start : place.z.stop].ravel()
    pages = _pages(scene, listed, place)
    stated = _stated_names(tiff, scene, numbers)
    layout, rgb = _layout(path, tiff, page, pages, depth, stated)
    return layout, stated, rgb


def _read_level(
    scene: TiffScene, tiff: Any, place: Place, full: Layout, finer: Level
) -> tuple[Layout, float]:
    """Layout and downsample of a level below the full resolution.

    Raises
    ------
    ValueError
        When it is no smaller copy.
    """
    layout, _, _ = _read_layout(scene, tiff, place)
    same = (
        len(layout.stack) == len(full.stack)
        and len(layout.stack[0]) == len(full.stack[0])
        and layout.keyframe.dtype == full.keyframe.dtype
        and (layout.colours is None) == (full.colours is None)
    )
    factor = downsample_of(full.grid.shape, layout.grid.shape)
    absent, segments = layout.without_bytes
    if absent and not full.without_bytes[0]:
        raise ValueError(f"{absent:,} of its {segments:,} segments hold no bytes")
    if not same or factor is None or factor <= finer.downsample:
        height, width = layout.grid.shape
        samples = f"{len(layout.stack[0])} x {layout.keyframe.dtype}"
        raise ValueError(f"{height} x {width} ({samples}) is no smaller copy of the image")
    return layout, factor


def _pages(scene: TiffScene, numbers: NDArray[np.int64], place: Place) -> tuple[Page, ...]:
    keyframe = scene.series.keyframe
    if scene.start:
        # Planes one after the other, of which ImageJ and tifffile may describe the first only.
        empty = np.zeros(0, np.int64)
        plane_bytes = prod(keyframe.shape) * keyframe.dtype.itemsize
        starts = (scene.start + int(number) * plane_bytes for number in numbers)
        return tuple(Page(empty, empty, None, start) for start in starts)
    there = len(scene.pages)
    listed = [scene.pages[int(number)] if number < there else None for number in numbers]
    found = [page for page in listed if page is not None]
    if len(found) != len(listed):
        raise unusable(
            scene.path,
            f"has {len(found)} of its {len(listed)} planes{_at(scene, place)}",
            "copy or export it again",
        )
    pages = tuple(_page(scene.path, keyframe, page) for page in found)
    if not any(page.start or page.byte_counts.any() for page in pages):
        raise unusable(
            scene.path,
            f"holds no pixels{_at(scene, place)}; its writing was probably interrupted",
            "write it again",
        )
    return pages


def _at(scene: TiffScene, place: Place) -> str:
    """Which plane it is, where there are several."""
    several = max(scene.counted.t, scene.counted.z, scene.counted.pages) > 1 or place.scene
    return f" at {place}" if several else ""


def _page(path: Path, keyframe: Any, found: Any) -> Page:
    offsets = np.asarray(found.dataoffsets, np.int64)
    byte_counts = np.asarray(found.databytecounts, np.int64)
    if keyframe.is_final and offsets.size and offsets[0] > 0:
        gaps = offsets[:-1] + byte_counts[: offsets.size - 1] - offsets[1:]
        if offsets.size == 1 or not gaps.any():
            return Page(offsets, byte_counts, None, int(offsets[0]))
    expected = len(_grid(keyframe)) * (1 if _is_interleaved(keyframe) else keyframe.samplesperpixel)
    if offsets.size != expected or byte_counts.size != expected:
        raise unusable(
            path,
            f"lists {min(offsets.size, byte_counts.size)} of {expected} segments",
            "copy or export it again",
        )
    return Page(offsets, byte_counts, found.jpegtables, None)


def _grid(page: Any) -> Lattice:
    cell = (
        (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    )
    return Lattice((page.imagelength, page.imagewidth), cell)


def _is_interleaved(page: Any) -> bool:
    return page.samplesperpixel == 1 or int(page.planarconfig) == 1


def _is_inverted(tiff: Any, page: Any) -> bool:
    # ImageJ writes the tag for a picture that is shown inverted, tifffile for any bool array.
    return (
        int(page.photometric) == MIN_IS_WHITE
        and not tiff.is_imagej
        and not (tiff.is_shaped and page.dtype.kind == "b")
    )


def _stated_names(tiff: Any, scene: TiffScene, numbers: NDArray[np.int64]) -> tuple[str, ...]:
    if scene.ome is not None:
        return scene.ome.names
    if scene.series.kind == "imagej":
        return imagej_labels(tiff.imagej_metadata or {}, numbers)
    if scene.series.kind == "qpi":
        return tuple(qptiff_name(scene.pages[int(n)].description) for n in numbers[0, 0])
    return ()


def _layout(
    path: Path, tiff: Any, page: Any, pages: tuple[Page, ...], depth: int, stated: tuple[str, ...]
) -> tuple[Layout, bool]:
    """The layout, and whether its channels are red, green and blue."""
    check_coding(path, page)
    photometric, samples = int(page.photometric), page.samplesperpixel
    extra = tuple(int(kind) for kind in page.extrasamples)[:samples]
    alpha = {samples - len(extra) + n for n, kind in enumerate(extra) if kind in _ALPHA}
    if len(stated) == samples > 1:
        alpha = set()
    count = len(pages) // depth
    stack = tuple(
        tuple(
            (number, sample)
            for number in range(z * count, (z + 1) * count)
            for sample in range(samples)
            if sample not in alpha
        )
        for z in range(depth)
    )
    channels = len(stack[0])
    named = bool(stated) and len(stated) == channels
    rgb = photometric in (RGB, YCBCR) and count == 1 and channels == 3 and not named
    colours = None
    if photometric == PALETTE and not (tiff.is_ome or tiff.is_imagej):
        # In OME-TIFF and ImageJ a palette is how one channel is shown; elsewhere it is the colours.
        colours = palette(path, page, channels)
    layout = Layout(
        keyframe=page,
        pages=pages,
        stack=stack,
        samples=samples,
        interleaved=_is_interleaved(page),
        grid=_grid(page),
        byte_order=tiff.byteorder,
        colours=colours,
        inverted=_is_inverted(tiff, page),
        # Glass that was not scanned, as OpenSlide shows it; black would be objects to a model.
        absent=np.iinfo(page.dtype).max if rgb and page.dtype.kind == "u" else 0,
    )
    cell = layout.grid.cell
    segment_bytes = prod(cell) * (samples if layout.interleaved else 1) * page.dtype.itemsize
    if segment_bytes > MAX_SEGMENT_BYTES and any(found.start is None for found in pages):
        what = f"has segments of {cell[0]} x {cell[1]} pixels ({segment_bytes:,} bytes decoded)"
        raise unusable(path, what, "convert it to a tiled TIFF")
    return layout, rgb or colours is not None
