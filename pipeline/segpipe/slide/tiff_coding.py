"""How the samples of a TIFF are coded: which codes are read right, and which are refused.

Refused is what would come out wrong without a word (CMYK or Lab as if they were red, green and
blue) and what cannot be bounded before it is decoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segpipe.slide.jpeg_stream import decode_whole
from segpipe.slide.segments import jpeg2000_size, jpeg_size, rgb_of_ycbcr
from segpipe.slide.source import printable, unusable

JPEG = frozenset({6, 7, 33007, 34892})
JPEG_2000 = frozenset({33003, 33004, 33005, 34712})
WEBP = frozenset({34927, 50001})
APERIO_YCBCR = 33003
COMPRESSIONS = (
    JPEG | JPEG_2000 | WEBP | {1, 2, 3, 4, 5, 8, 32773, 32946, 34925, 34926, 50000, 50013}
)
"""Codes whose decoded size is bounded by tifffile, by the format or by `decode`. JPEG XL, JPEG XR,
LERC and PNG inside a TIFF are not: a few bytes of them may ask for any memory."""

_J2K, _J2K_END = b"\xff\x4f", b"\xff\xd9"
MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
_GREY_OR_RGB = (MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE)


def sample_dtype(path: Path, page: Any) -> np.dtype[Any]:
    """The dtype of the samples of a page.

    Raises
    ------
    InputError
        When there is none for its bits and format.
    """
    if page.dtype is None:
        raise unusable(
            path,
            f"has samples of {printable(page.bitspersample)} bits (format {page.sampleformat})",
            "convert it to uint8, uint16 or float32",
        )
    dtype: np.dtype[Any] = np.dtype(page.dtype).newbyteorder("=")
    return dtype


def check_coding(path: Path, page: Any) -> None:
    """Refuse compressions and colours that would not be read right.

    Raises
    ------
    InputError
        When the page has such a coding.
    """
    compression, photometric = int(page.compression), int(page.photometric)
    name = printable(getattr(page.compression, "name", compression))
    if compression not in COMPRESSIONS:
        raise unusable(path, f"is compressed with {name}", "convert it to OME-TIFF")
    if page.samplesperpixel > 1 and int(page.planarconfig) not in (1, 2):
        raise unusable(path, f"has planar configuration {page.planarconfig}", "export it again")
    known = photometric in _GREY_OR_RGB
    if photometric == YCBCR:
        # The decoders of these give red, green and blue; of others, YCbCr as it is.
        known = compression in JPEG | WEBP | {APERIO_YCBCR}
    if photometric == MIN_IS_WHITE:
        known = page.dtype.kind in "bu"
    if compression == APERIO_YCBCR:
        known = page.samplesperpixel == 3 and page.dtype == np.uint8
    if not known:
        colours = printable(getattr(page.photometric, "name", photometric))
        what = f"has colours of kind {colours} ({page.samplesperpixel} x {page.dtype}, {name})"
        raise unusable(path, what, "convert it to RGB or grey values")
    _ = page.decode  # tifffile finds out here, once and not in a thread, what it cannot decode


def palette(path: Path, page: Any, planes: int) -> NDArray[np.uint8]:
    """(3, 2^bits) uint8 red, green and blue of each index.

    Raises
    ------
    InputError
        When the palette is missing or has another length.
    """
    colours = page.colormap
    if colours is None or planes != 1 or colours.shape != (3, 2**page.bitspersample):
        raise unusable(path, "has palette colours without a full palette", "convert it to RGB")
    # Palettes have 16 bits; some programs write 8, as libtiff's tools know.
    scaled = colours >> 8 if colours.max() > 255 else colours
    return np.asarray(scaled, np.uint8)


def decode(
    keyframe: Any, data: bytes, index: int, cell: tuple[int, int], jpeg_tables: bytes | None
) -> NDArray[Any]:
    """(rows, columns, samples) of the segment `index` from its bytes, as the decoder gives them.

    Raises
    ------
    ValueError
        When a code stream claims a picture far larger than the `cell` that it fills. Decoders raise
        what they like besides.
    """
    compression = int(keyframe.compression)
    claim: tuple[int, ...] | None = cell
    if compression in JPEG and keyframe.jpegheader is None:
        claim = jpeg_size(data)
    elif compression in JPEG_2000:
        claim = jpeg2000_size(data)
    if claim is None:
        raise ValueError("it has no header")
    if compression in JPEG_2000 and data[:2] == _J2K and not data.rstrip(b"\0").endswith(_J2K_END):
        raise ValueError("its JPEG 2000 stream has no end")
    if any(side > 2 * bound + 16 for side, bound in zip(claim, cell, strict=False)):
        raise ValueError(f"it claims {claim[0]} x {claim[1]} pixels, not {cell[0]} x {cell[1]}")

    def decoded(coded: bytes) -> NDArray[Any]:
        found, *_ = keyframe.decode(
            coded, index, jpegtables=jpeg_tables, jpegheader=keyframe.jpegheader
        )
        pixels: NDArray[Any] = np.asarray(found)[0]
        return pixels

    pixels = (
        decode_whole(data, decoded, headless=keyframe.jpegheader is not None)
        if compression in JPEG
        else decoded(data)
    )
    if keyframe.dtype.kind == "b":
        return pixels.astype(np.bool_)  # the fax decoders give 0 and 1 as uint8
    if compression == APERIO_YCBCR and not claim[2]:
        # imagecodecs takes subsampled components for YCbCr by itself, and full ones for RGB.
        return rgb_of_ycbcr(pixels)
    return pixels
