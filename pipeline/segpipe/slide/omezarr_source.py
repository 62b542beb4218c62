"""Boxes of an OME-Zarr image, of one plane or of the largest value over several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from segpipe.geometry import Box
from segpipe.slide.planes import Place, Scene
from segpipe.slide.source import Header, printable, project, unusable

_PROJECTED_BYTES = 2**26
"""Read at once of the planes that are projected, but for whole chunks."""


class OmeZarrSource:
    """An open OME-Zarr image. A chunk that is absent holds the fill value, as Zarr defines it.

    `t` and `z` are what is read of these axes; several z are projected.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        arrays: tuple[zarr.Array[Any], ...],
        axes: tuple[str, ...],
        t: int = 0,
        z: range = range(1),
    ) -> None:
        self.header = replace(header, chunk=_chunk(arrays[0], axes, z))
        self._path = path
        self._arrays = arrays
        self._axes = axes
        self._t = t
        self._z = z

    def scene(self, name: str) -> Scene:
        """How many planes there are."""
        sizes = dict(zip(self._axes, self._arrays[0].shape, strict=True))
        return Scene(name, self.header.shape[1:], sizes.get("t", 1), sizes.get("z", 1))

    def at(self, place: Place) -> OmeZarrSource:
        """The same image, read at another place."""
        return OmeZarrSource(self._path, self.header, self._arrays, self._axes, place.t, place.z)

    def close(self) -> None:
        """Nothing is kept open."""

    def read(self, box: Box, channels: tuple[int, ...], level: int) -> NDArray[Any]:
        """(channels, height, width) in the file's dtype, native byte order.

        Raises
        ------
        InputError
            When a chunk cannot be read or decoded.
        """
        array = self._arrays[level]
        out = np.empty((len(channels), *box.shape), self.header.dtype)
        run = range(channels[0], channels[0] + len(channels))
        try:
            if channels == tuple(run):
                self._fill(array, out, box, slice(run.start, run.stop))
            else:
                for k, channel in enumerate(channels):
                    self._fill(array, out[k : k + 1], box, slice(channel, channel + 1))
        except Exception as error:
            what = f"cannot be read at {box} ({printable(str(error) or type(error).__name__)})"
            raise unusable(self._path, what, "copy or export it again") from error
        return out

    def _fill(self, array: zarr.Array[Any], out: NDArray[Any], box: Box, channels: slice) -> None:
        if len(self._z) == 1:
            out[:] = self._stack(array, box, channels, self._z)[0]
            return
        depth, rows = self._steps(array, out)
        for y0 in range(box.y0 - box.y0 % rows, box.y1, rows):
            band = Box(max(y0, box.y0), box.x0, min(y0 + rows, box.y1), box.x1)
            parts = (
                project(self._stack(array, band, channels, self._z[n : n + depth]))
                for n in range(0, len(self._z), depth)
            )
            out[(slice(None), *band.within(box).slices)] = project(parts)

    def _steps(self, array: zarr.Array[Any], out: NDArray[Any]) -> tuple[int, int]:
        """Planes and rows to read at once, whole chunks of them: each chunk is then decoded once, and
        what is in memory does not grow with the number of planes."""
        chunk = dict(zip(self._axes, array.chunks, strict=True))
        depth, layers = chunk["z"], _PROJECTED_BYTES // max(1, out.nbytes * chunk["z"])
        if layers > 0:
            height = array.shape[self._axes.index("y")]
            return depth * layers, chunk["y"] * -(-height // chunk["y"])
        row_bytes = out.nbytes // out.shape[1]
        return depth, chunk["y"] * max(1, _PROJECTED_BYTES // (row_bytes * depth * chunk["y"]))

    def _stack(
        self, array: zarr.Array[Any], box: Box, channels: slice, planes: range
    ) -> NDArray[Any]:
        """(z, channels, height, width) of some planes."""
        y, x = box.slices
        t, z = slice(self._t, self._t + 1), slice(planes.start, planes.stop)
        wanted: dict[str, slice] = {"t": t, "z": z, "c": channels, "y": y, "x": x}
        part = np.asarray(array[tuple(wanted.get(a, slice(0, 1)) for a in self._axes)])
        order = [a for a in "tzcyx" if a in self._axes]
        others = [a for a in self._axes if a not in order]
        part = part.transpose([self._axes.index(a) for a in (*others, *order)])
        return part.reshape(len(planes), -1, *box.shape)


def _chunk(array: zarr.Array[Any], axes: tuple[str, ...], z: range) -> tuple[int, int] | None:
    """Sides of a chunk, where it holds nothing but the plane that is read."""
    chunk = dict(zip(axes, array.chunks, strict=True))
    if len(z) > 1 or any(chunk.get(axis, 1) > 1 for axis in "tz"):
        return None
    return chunk["y"], chunk["x"]
