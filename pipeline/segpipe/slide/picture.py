"""PNG and JPEG files: pictures that are decoded whole, once, and kept.

They hold no pixel size that can be believed, and no tiles: a large image belongs in a tiled TIFF.
"""

from __future__ import annotations

import struct
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from imagecodecs import png_decode
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from segpipe.errors import InputError
from segpipe.geometry import Box
from segpipe.slide.planes import Place, Scene
from segpipe.slide.source import Header, Level, PixelSize, check_size, printable, unusable

MAX_PICTURE_PIXELS = 2**30
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8\xff"

_PNG_SAMPLES = {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}
"""Colour samples by colour type: grey, RGB, palette, grey and alpha, RGB and alpha."""


class PictureContents:
    """A file that is one picture. See `Contents`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.scenes: tuple[Scene, ...] = (Scene(path.name, open_picture(path).header.shape[1:]),)

    def source(self, place: Place) -> PictureSource:
        """The picture; it is not decoded yet."""
        return open_picture(self._path)

    def close(self) -> None:
        """Nothing is kept open."""


def open_picture(path: Path) -> PictureSource:
    """The picture in a PNG or JPEG file; its pixels are not decoded yet.

    Raises
    ------
    InputError
        When it is damaged, too large, animated, or a JPEG of four colours (CMYK).
    """
    try:
        with path.open("rb") as file:
            start = file.read(33)
        header = _png_header(path, start) if start.startswith(PNG_MAGIC) else _jpeg_header(path)
    except InputError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error
    _, height, width = header.shape
    if height * width > MAX_PICTURE_PIXELS:
        raise unusable(
            path,
            f"has {height} x {width} pixels, and a {header.compression.upper()} is decoded whole",
            "convert it to a tiled TIFF",
        )
    check_size(path, header.shape, header.dtype.itemsize, path.stat().st_size)
    return PictureSource(path, header)


def _png_header(path: Path, start: bytes) -> Header:
    width, height, bits, colour = struct.unpack_from(">IIBB", start, 16)
    dtype = np.dtype(
        np.bool_ if bits == 1 and colour == 0 else np.uint16 if bits == 16 else np.uint8
    )
    return _header((_PNG_SAMPLES[colour], height, width), dtype, "png")


def _jpeg_header(path: Path) -> Header:
    # The plugin's class, not Image.open: that has a bound of its own, in a global variable.
    with path.open("rb") as file, JpegImageFile(file) as image:
        samples = {"L": 1, "RGB": 3}.get(image.mode)
        if samples is None:
            raise unusable(path, f"is a JPEG in {image.mode} colours", "convert it to RGB")
        return _header((samples, image.height, image.width), np.dtype(np.uint8), "jpeg")


def _header(shape: tuple[int, int, int], dtype: np.dtype[Any], kind: str) -> Header:
    rgb = shape[0] == 3
    return Header(
        shape=shape,
        dtype=dtype,
        channel_names=("red", "green", "blue") if rgb else ("0",),
        rgb=rgb,
        pixel_size=PixelSize(),
        levels=(Level(shape[1:], 1.0),),
        reader=f"pillow/{kind}",
        compression=kind,
    )


class PictureSource:
    """An open PNG or JPEG file."""

    def __init__(self, path: Path, header: Header) -> None:
        self.header = header
        self._path = path
        self._lock = threading.Lock()
        self._pixels: NDArray[Any] | None = None

    def close(self) -> None:
        """Forget the pixels."""
        self._pixels = None

    def read(self, box: Box, channels: tuple[int, ...], level: int) -> NDArray[Any]:
        """(channels, height, width) in the file's dtype.

        Raises
        ------
        InputError
            When the file does not decode to what its header says.
        """
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decode()
            pixels = self._pixels
        part = pixels[box.slices]
        return np.stack([part[..., channel] for channel in channels])

    def _decode(self) -> NDArray[Any]:
        """(height, width, samples) of the whole picture, without alpha."""
        try:
            pixels = self._decode_file()
        except InputError:
            raise
        except Exception as error:
            raise _damaged(self._path, error) from error
        samples, height, width = self.header.shape
        pixels = pixels.reshape(height, width, -1)[..., :samples]
        if pixels.dtype != self.header.dtype or pixels.shape[2] != samples:
            raise _damaged(self._path, f"{pixels.shape} {pixels.dtype}")
        return pixels

    def _decode_file(self) -> NDArray[Any]:
        if self.header.dtype == np.uint16:
            # Pillow would round colours of 16 bits to 8.
            return np.asarray(png_decode(self._path.read_bytes()))
        plugin = PngImageFile if self.header.compression == "png" else JpegImageFile
        with warnings.catch_warnings(), self._path.open("rb") as file, plugin(file) as image:
            warnings.simplefilter("ignore")
            if getattr(image, "is_animated", False):
                raise unusable(self._path, "is an animated PNG", "save one picture a file")
            return np.asarray(image.convert("RGBA") if image.mode == "P" else image)


def _damaged(path: Path, why: object) -> InputError:
    return unusable(
        path, f"is damaged and cannot be decoded ({printable(why)})", "copy or export it again"
    )
