"""Nikon ND2, Leica LIF and what else a reader of bioio knows. Only importer of bioio (extra `bioio`).

bioio decodes whole planes: one is kept, and a plane that does not fit is refused.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bioio import BioImage
from numpy.typing import NDArray

from segpipe.errors import InputError
from segpipe.geometry import Box
from segpipe.slide.pixel_size import stated_pixel
from segpipe.slide.planes import Place, Scene
from segpipe.slide.segments import SegmentCache
from segpipe.slide.source import (
    MAX_SEGMENT_BYTES,
    Header,
    Level,
    check_size,
    printable,
    project,
    unusable,
)
from segpipe.slide.tiff_metadata import channel_names

_REMEDY = "copy or export the file again"
MAX_SCENES = 4096


def open_bioio(path: Path) -> BioioContents:
    """The scenes of a file; no pixels are read yet.

    Raises
    ------
    InputError
        When no installed reader of bioio can read it.
    """
    return BioioContents(path)


@contextlib.contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        why = printable(str(error).strip().split("\n")[0] or type(error).__name__)
        kind = printable(path.suffix.lower().removeprefix("."), 10)
        remedy = f"{_REMEDY}, or install its reader (bioio-{kind})"
        raise unusable(path, f"{what} ({why})", remedy) from error


class BioioContents:
    """A file whose headers were read. See `Contents`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _readable(path, "cannot be opened by bioio"):
            image = BioImage(path)
            names = list(image.scenes)
            if not 1 <= len(names) <= MAX_SCENES:
                raise unusable(path, f"has {len(names):,} scenes", "split it")
            self.scenes = tuple(self._scene(image, name) for name in names)

    def _scene(self, image: Any, name: str) -> Scene:
        image.set_scene(name)
        sizes = dict(zip(image.dims.order, image.dims.shape, strict=True))
        return Scene(printable(name, 60), (sizes["Y"], sizes["X"]), sizes["T"], sizes["Z"])

    def source(self, place: Place) -> BioioSource:
        """One plane, or a projection; no pixels are read yet.

        Raises
        ------
        InputError
            When it has axes that are not known, or planes that do not fit.
        """
        with _readable(self._path, "cannot be opened by bioio"):
            image = BioImage(self._path)
            image.set_scene(image.scenes[place.scene])
            return BioioSource(self._path, image, _header(self._path, image), place)

    def close(self) -> None:
        """Nothing is kept open."""


def _header(path: Path, image: Any) -> Header:
    sizes = dict(zip(image.dims.order, image.dims.shape, strict=True))
    extra = {axis: size for axis, size in sizes.items() if size > 1 and axis not in "TCZYXS"}
    if extra:
        words = " and ".join(f"{size} of axis {printable(axis)}" for axis, size in extra.items())
        raise unusable(path, f"has {words}", "save what to segment in a file of its own")
    samples, channels = sizes.get("S", 1), sizes["C"]
    if samples > 1 and (samples != 3 or channels > 1):
        what = f"has {channels} channels of {samples} samples each"
        raise unusable(path, what, "convert it to OME-TIFF")
    rgb = samples == 3
    shape = (samples if rgb else channels, sizes["Y"], sizes["X"])
    dtype = np.dtype(image.dtype).newbyteorder("=")
    check_size(path, shape, dtype.itemsize, path.stat().st_size)
    plane_bytes = math.prod(shape[1:]) * samples * dtype.itemsize
    if plane_bytes > MAX_SEGMENT_BYTES:
        raise unusable(
            path,
            f"has planes of {plane_bytes:,} bytes, which its reader decodes whole",
            "convert it to OME-Zarr",
        )
    pixel = image.physical_pixel_sizes
    stated = tuple(str(name) for name in image.channel_names or ())
    plugin = type(image.reader).__module__.split(".")[0]
    return Header(
        shape=shape,
        dtype=dtype,
        channel_names=("red", "green", "blue") if rgb else channel_names(stated, channels),
        rgb=rgb,
        pixel_size=stated_pixel(path, pixel.Y, pixel.X, "the file"),
        levels=(Level(shape[1:], 1.0),),
        reader=plugin.replace("_", "-"),
        compression="vendor's",
    )


class BioioSource:
    """An open file; planes are decoded whole, one at a time, and kept while they fit."""

    def __init__(self, path: Path, image: Any, header: Header, place: Place) -> None:
        self.header = header
        self._path = path
        self._image = image
        self._place = place
        self._lock = threading.Lock()
        self._cache = SegmentCache()

    def close(self) -> None:
        """Forget what was decoded."""
        self._cache.clear()
        self._image = None

    def read(self, box: Box, channels: tuple[int, ...], level: int) -> NDArray[Any]:
        """(channels, height, width) in the file's dtype.

        Raises
        ------
        InputError
            When a plane cannot be decoded.
        """
        if self.header.rgb:
            return project(self._box(box, z, 0) for z in self._place.z)[list(channels)]
        return np.concatenate(
            [project(self._box(box, z, channel) for z in self._place.z) for channel in channels]
        )

    def _box(self, box: Box, z: int, channel: int) -> NDArray[Any]:
        """(samples, height, width), a new array."""
        plane = self._cache.get((z, channel), lambda: self._plane(z, channel))
        return np.array(plane[(slice(None), *box.slices)])

    def _plane(self, z: int, channel: int) -> NDArray[Any]:
        order = "SYX" if self.header.rgb else "YX"
        what = f"cannot be decoded at t {self._place.t}, z {z}, channel {channel}"
        with _readable(self._path, what), self._lock:
            lazy = self._image.get_image_dask_data(order, T=self._place.t, C=channel, Z=z)
            pixels = np.asarray(lazy.compute(scheduler="synchronous"), self.header.dtype)
        return pixels.reshape(-1, *self.header.shape[1:])
