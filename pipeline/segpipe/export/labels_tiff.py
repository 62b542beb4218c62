"""Labels as a pyramidal OME-TIFF: tiled, compressed, uint32; written strip by strip of tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import numpy as np

from segpipe.export.partial import written_whole
from segpipe.geometry import Box
from segpipe.store import open_array, read_box

Array = np.ndarray[Any, np.dtype[Any]]
TILE = 512
STRIP_TILES = 16
"""Tiles of one row that are read at once: 16 MB."""


def write_labels_tiff(
    path: Path, levels: Sequence[Path], name: str, pixel_size_um: float | None, made_of: str
) -> None:
    """Write the levels of a label pyramid, finest first, each (Y, X) uint32.

    Parameters
    ----------
    levels
        Their arrays.
    name
        Of the image in the file.
    pixel_size_um
        Of the finest level.
    made_of
        What the labels are made of; the file's UUID is a hash of it, and not of the time.
    """
    import tifffile

    unique = str(uuid5(NAMESPACE_OID, made_of))
    metadata: dict[str, Any] = {"axes": "YX", "Name": name, "UUID": unique}
    if pixel_size_um is not None:
        for axis in "XY":
            metadata |= {
                f"PhysicalSize{axis}": pixel_size_um,
                f"PhysicalSize{axis}Unit": "µm",
            }
    options: dict[str, Any] = {
        "dtype": np.uint32,
        "tile": (TILE, TILE),
        "compression": "zlib",
        "photometric": "minisblack",
        "maxworkers": 1,  # others work beside it
    }
    with (
        written_whole(path) as partial,
        tifffile.TiffWriter(partial, bigtiff=True, ome=True) as file,
    ):
        for number, level in enumerate(levels):
            step = 2**number
            if pixel_size_um is not None:
                per_cm = 1e4 / (pixel_size_um * step)
                options |= {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
            more = {"subifds": len(levels) - 1, "metadata": metadata}
            file.write(
                tiles(level),
                shape=open_array(level).shape,
                **options,
                **(more if number == 0 else {"subfiletype": 1, "metadata": None}),
            )


def tiles(level: Path) -> Iterator[Array]:
    """Tiles of an array, row by row, 0 beyond its edges: (TILE, TILE) uint32."""
    height, width = open_array(level).shape
    image = Box(0, 0, height, width)
    for y in range(0, height, TILE):
        for x in range(0, width, TILE * STRIP_TILES):
            strip = Box(y, x, y + TILE, x + TILE * STRIP_TILES).intersect(image)
            pixels = read_box(level, strip)
            for start in range(0, strip.shape[1], TILE):
                part = pixels[:, start : start + TILE]
                whole = np.zeros((TILE, TILE), np.uint32)
                whole[: part.shape[0], : part.shape[1]] = part
                yield whole
