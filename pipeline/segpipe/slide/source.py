"""What every reader of images states about a file, and the bounds that hold for all of them.

A file header is hostile until it is checked: sizes are bounded before anything is decoded, and
what a header says reaches a message only through `printable`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from segpipe.errors import InputError
from segpipe.geometry import Box

MAX_SIDE = 2**31 - 1
MAX_PIXELS = 2**42
MAX_CHANNELS = 4096
MAX_SEGMENT_BYTES = 2**31
MAX_FIELDS = 2**14
MAX_EXPANSION = 100_000
"""Decoded bytes a byte of file: deflate reaches 1,032, a sparse tiled TIFF some 65,000."""

_ROUNDED = 2
"""Pixels that a side of a level may differ from the exact part of the full resolution's."""

EXACT_INTEGERS = 2**24
"""float32 holds every integer up to this one."""

_WORKING = {
    "bool": np.uint8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "float32": np.float32,
    **dict.fromkeys(
        ("int8", "int16", "uint32", "int32", "uint64", "int64", "float16", "float64"), np.float32
    ),
}


@dataclass(frozen=True)
class Level:
    """One level of a pyramid: height and width, and full-resolution pixels along a pixel's side.

    Pixel i of the level covers pixels `i * downsample` to `(i + 1) * downsample` of the full
    resolution.
    """

    shape: tuple[int, int]
    downsample: float


@dataclass(frozen=True)
class PixelSize:
    """Micrometres a pixel, None when nobody states it; who states it; and what was not believed."""

    um: float | None = None
    origin: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Header:
    """What an image is, before a pixel is read.

    `dtype` is that of the file, in native byte order; `shape` counts pixels. `levels` begin with the
    full resolution, and each is smaller than the one before. `warnings` say what was wrong with the
    file and did no harm. `left_out` names pictures beside the slide: its label, its macro picture.
    `chunk` is (Y, X) of the pieces, of this plane alone, in which the pixels of an array are stored
    without loss; None of all else.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    channel_names: tuple[str, ...]
    rgb: bool
    pixel_size: PixelSize
    levels: tuple[Level, ...]
    reader: str
    compression: str
    warnings: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    chunk: tuple[int, int] | None = None


class Source(Protocol):
    """An opened file of one format. `read` may be called by several threads at once."""

    header: Header

    def read(self, box: Box, channels: tuple[int, ...], level: int) -> NDArray[Any]:
        """(channels, height, width) in the file's dtype; box, channels and level have been checked."""

    def close(self) -> None:
        """Let go of the file."""


def downsample_of(full: tuple[int, int], shape: tuple[int, int]) -> float | None:
    """Pixels of the full resolution along the side of a pixel of a level; None when it is no smaller
    copy of the whole image.

    Sizes of levels are rounded, so a factor that is whole but for the rounding is taken for whole.

    >>> downsample_of((2967, 2220), (741, 555)), downsample_of((300, 200), (100, 90))
    (4.0, None)
    """
    long, short = (0, 1) if full[0] >= full[1] else (1, 0)
    factor = full[long] / shape[long]
    if shape == full or shape[0] > full[0] or shape[1] > full[1]:
        return None
    if abs(full[short] / factor - shape[short]) > _ROUNDED:
        return None
    whole = round(factor)
    if all(
        abs(size * whole - whole_size) < whole for size, whole_size in zip(shape, full, strict=True)
    ):
        return float(whole)
    return factor


def left_out(path: Path, number: int, error: Exception) -> str:
    """The warning about a level that cannot be read: others are read in its place."""
    why = str(error) or type(error).__name__
    why = printable(why.removeprefix(f"{printable(path.name)}: "))
    return f"level {number} of the pyramid is left out: {why}"


def project(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
    """The largest value of each pixel over planes of one shape, which are taken one at a time.

    NaN counts as the darkest value here too: it is left only where every plane has it. The first
    plane is written over.
    """
    planes = iter(parts)
    largest = next(planes)
    for plane in planes:
        np.fmax(largest, plane, out=largest)
    return largest


def printable(text: object, limit: int = 160) -> str:
    r"""The text on one line: control characters escaped, the end cut off.

    >>> printable("a\nb\x1b[2J")
    'a\\nb\\x1b[2J'
    """
    escaped = "".join(
        character
        if character.isprintable()
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in str(text)
    )
    return escaped if len(escaped) <= limit else f"{escaped[: limit - 3]}..."


def unusable(path: Path, what: str, remedy: str) -> InputError:
    """The error of one line that names the file, what is wrong with it and what to do."""
    return InputError(f"{printable(path.name)}: {what}; {remedy}")


@contextmanager
def reading(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Inside, whatever a library raises over a file is an InputError: its readers name no errors, and a
    header made to break one may raise anything.

    Parameters
    ----------
    what, remedy
        As for `unusable`; the reason is added.

    Raises
    ------
    InputError
        For any exception, one of ours as it is.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        why = printable(str(error) or type(error).__name__)
        raise unusable(path, f"{what} ({why})", remedy) from error


def check_size(
    path: Path, shape: tuple[int, int, int], itemsize: int, file_bytes: int | None
) -> None:
    """Bound what the header claims.

    Raises
    ------
    InputError
        When an axis is empty or above `MAX_SIDE`, when channels or pixels are above their bounds,
        or when the decoded image is more than `MAX_EXPANSION` times the file (None: not asked).
    """
    channels, height, width = shape
    if min(shape) < 1:
        raise unusable(path, f"is an empty image ({height} x {width})", "write it again")
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise unusable(
            path,
            f"claims {height} x {width} pixels; {MAX_SIDE:,} a side and {MAX_PIXELS:,} are the most",
            "cut it into smaller images",
        )
    if channels > MAX_CHANNELS:
        raise unusable(
            path,
            f"claims {channels:,} channels, more than {MAX_CHANNELS:,}",
            "save the channels that are needed",
        )
    decoded = channels * height * width * itemsize
    if file_bytes is not None and decoded > MAX_EXPANSION * max(1, file_bytes):
        raise unusable(
            path,
            f"claims {decoded:,} bytes of pixels in a file of {file_bytes:,}",
            "copy or export it again if it should hold that much",
        )


def working_dtype(path: Path, stored: DTypeLike) -> np.dtype[Any]:
    """uint8, uint16 or float32: what `Slide.read` gives for a file of dtype `stored`.

    Raises
    ------
    InputError
        When pixels are complex numbers, records or text.
    """
    name = np.dtype(stored).name
    if name not in _WORKING:
        raise unusable(
            path, f"has pixels of type {printable(name)}", "convert them to uint16 or float32"
        )
    return np.dtype(_WORKING[name])


def to_working(pixels: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The pixels in their `working_dtype`: bool becomes 0 and 255, the others keep their values.

    Raises
    ------
    ValueError
        When an integer is above `EXACT_INTEGERS`, or a float64 above the range of float32.
    """
    if pixels.dtype == dtype:
        return pixels
    if pixels.dtype.kind == "b":
        return np.asarray(pixels.astype(dtype) * dtype.type(255), dtype)
    if pixels.dtype.kind in "iu" and pixels.dtype.itemsize > 2 and pixels.size:
        extreme = max(int(pixels.max()), -int(pixels.min()))
        if extreme > EXACT_INTEGERS:
            raise ValueError(f"an integer of size {extreme:,}, which float32 cannot hold exactly")
    with np.errstate(over="ignore"):
        converted = pixels.astype(dtype)
    if pixels.dtype == np.float64 and np.any(np.isinf(converted) & np.isfinite(pixels)):
        raise ValueError("a number beyond the range of float32")
    return converted
