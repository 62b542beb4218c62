"""Pictures as files."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from imagecodecs import zlibng_encode
from PIL import Image

from segpipe.export.drawing import Picture
from segpipe.whole_file import write_whole

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def write_png(path: Path, picture: Picture) -> None:
    """Write the picture; under its name there is always a whole file, the old one or the new.

    Raises
    ------
    OSError
        When it cannot be written.
    """
    write_whole(path, encode_png(picture), durable=False)


def write_jpeg(path: Path, picture: Picture) -> None:
    """As `write_png`, for a picture that is to be small."""
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, format="JPEG", quality=80)
    write_whole(path, encoded.getvalue(), durable=False)


def encode_png(picture: Picture) -> bytes:
    """The picture as PNG. Each row as its difference to the one above (filter 2 of the standard),
    which costs a fourth of finding out what is best for each, as Pillow does, and is as small."""
    height, width, _ = picture.shape
    rows = picture.reshape(height, 3 * width)
    filtered = np.empty((height, 1 + 3 * width), np.uint8)
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlibng_encode(filtered.tobytes(), level=2),
        b"IEND": b"",
    }
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    ]
    return b"".join([PNG_SIGNATURE, *chunks])
