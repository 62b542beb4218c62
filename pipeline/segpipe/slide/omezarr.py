"""OME-Zarr folders as inputs: 0.4 (Zarr v2) and 0.5 (Zarr v3).

Beside store.py the only importer of zarr.

Metadata are hostile: codecs are those of a list (a filter named "pickle" would run what the folder
says), paths stay inside the folder, chunks are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from segpipe.errors import InputError
from segpipe.geometry import Box
from segpipe.slide.source import (
    MAX_SEGMENT_BYTES,
    UM_PER_UNIT,
    Header,
    check_size,
    printable,
    square_pixel_um,
    unusable,
    working_dtype,
)

VERSIONS = ("0.4", "0.5")
_COMPRESSORS = ("blosc", "zstd", "gzip", "zlib", "lz4", "lzma", "bz2")
_FILTERS = ("bytes", "crc32c", "delta", "packbits", "sharding_indexed", "shuffle", "transpose")
CODECS = frozenset(_COMPRESSORS + _FILTERS)
COLOURS = ("red", "green", "blue")
"""Labels by which an image is known as RGB; omero's display colours do not tell it."""

_AXIS_WORDS = {"z": "z planes", "t": "time points"}
_MARKERS = ("zarr.json", ".zgroup", ".zattrs", ".zarray")


def is_zarr_folder(path: Path) -> bool:
    """Whether the folder holds Zarr metadata, or is named as if it did."""
    return path.is_dir() and (
        path.suffix.lower() == ".zarr" or any((path / marker).is_file() for marker in _MARKERS)
    )


def open_omezarr(path: Path) -> OmeZarrSource:
    """The image in an OME-Zarr folder; its pixels are not read yet.

    Raises
    ------
    InputError
        When it is not OME-Zarr 0.4 or 0.5, is a plate or several scenes, has axes longer than 1
        beside c, y and x, or uses codecs that are not in `CODECS`.
    """
    remedy = "give an OME-Zarr 0.4 or 0.5 folder"
    if not any((path / marker).is_file() for marker in _MARKERS):
        raise unusable(path, "is a folder without Zarr metadata", remedy)
    try:
        group = zarr.open_group(str(path), mode="r", use_consolidated=False)
        return _source(path, group)
    except InputError:
        raise
    except Exception as error:
        why = printable(str(error) or type(error).__name__)
        raise unusable(path, f"is no OME-Zarr image that can be read ({why})", remedy) from error


def _source(path: Path, group: zarr.Group) -> OmeZarrSource:
    group, multiscale, metadata = _multiscale(path, group)
    axes = _axes(path, multiscale)
    levels = [_level(path, group, dataset) for dataset in _objects(multiscale, "datasets")]
    if not levels or any(level.ndim != len(axes) for level in levels):
        raise unusable(path, f"has no arrays of axes {''.join(axes)}", "write it again")
    finest = levels[0]
    sizes = dict(zip(axes, finest.shape, strict=True))
    extra = {axis: size for axis, size in sizes.items() if size > 1 and axis not in "cyx"}
    if extra:
        words = " and ".join(
            f"{size} {_AXIS_WORDS.get(axis, f'of axis {printable(axis)}')}"
            for axis, size in extra.items()
        )
        raise unusable(path, f"has {words}", "save the plane to segment in a folder of its own")
    shape = (sizes.get("c", 1), sizes["y"], sizes["x"])
    dtype = np.dtype(finest.dtype).newbyteorder("=")
    working_dtype(path, dtype)
    check_size(path, shape, dtype.itemsize, None)
    y, x = axes.index("y"), axes.index("x")
    names = _channel_names(metadata, shape[0])
    header = Header(
        shape=shape,
        dtype=dtype,
        channel_names=names,
        rgb=tuple(name.lower() for name in names) == COLOURS,
        pixel_size_um=_pixel_size_um(path, multiscale, y, x),
        levels=tuple((level.shape[y], level.shape[x]) for level in levels),
        reader=f"zarr/{_version(multiscale, metadata) or VERSIONS[0]}",
        compression=next((name for name in _COMPRESSORS if name in _codecs(finest)), "none"),
    )
    return OmeZarrSource(path, header, finest, axes)


def _multiscale(path: Path, group: zarr.Group) -> tuple[zarr.Group, dict[str, Any], dict[str, Any]]:
    """The group of the one image in the folder, its multiscale, and the metadata around that."""
    metadata = _namespace(group)
    if "plate" in metadata or "well" in metadata:
        kind = "plate" if "plate" in metadata else "well"
        raise unusable(path, f"is a {kind} of several fields", "give the folder of one field")
    if "multiscales" not in metadata and "bioformats2raw.layout" in metadata:
        scenes = sorted(entry.name for entry in path.iterdir() if entry.name.isdigit())
        if len(scenes) != 1:
            raise unusable(path, f"has {len(scenes)} scenes", f"give one, as in {path.name}/0")
        scene = group[scenes[0]]
        if not isinstance(scene, zarr.Group):
            raise TypeError(f"{scenes[0]} is not a group")
        group, metadata = scene, _namespace(scene)
    multiscales = _objects(metadata, "multiscales")
    if len(multiscales) != 1:
        raise unusable(path, f"has {len(multiscales)} images", "save one image a folder")
    version = _version(multiscales[0], metadata)
    if version is not None and version not in VERSIONS:
        raise unusable(
            path, f"is OME-Zarr {printable(version)}", f"convert it to {' or '.join(VERSIONS)}"
        )
    return group, multiscales[0], metadata


def _namespace(group: zarr.Group) -> dict[str, Any]:
    attributes = group.attrs.asdict()
    inner = attributes.get("ome", attributes)
    if not isinstance(inner, dict):
        raise TypeError("the attribute ome is not an object")
    return inner


def _objects(parent: dict[str, Any], key: str) -> list[dict[str, Any]]:
    listed = parent.get(key)
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise TypeError(f"no list of {key}")
    return listed


def _version(multiscale: dict[str, Any], metadata: dict[str, Any]) -> str | None:
    version = metadata.get("version", multiscale.get("version"))
    return None if version is None else str(version)


def _axes(path: Path, multiscale: dict[str, Any]) -> tuple[str, ...]:
    axes = tuple(str(axis["name"]).lower() for axis in _objects(multiscale, "axes"))
    if len(set(axes)) != len(axes) or not {"y", "x"} <= set(axes):
        raise unusable(path, f"has axes {printable(', '.join(axes))}", "write it with y and x")
    return axes


def _level(path: Path, group: zarr.Group, dataset: dict[str, Any]) -> zarr.Array[Any]:
    name = str(dataset["path"])
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts:
        raise unusable(path, f"points outside itself ({printable(name)})", "write it again")
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise TypeError(f"{name} is not an array")
    foreign = _codecs(array) - CODECS
    if foreign:
        raise unusable(
            path,
            f"uses codecs {printable(', '.join(sorted(foreign)))}",
            "write it with zstd or blosc",
        )
    chunk_bytes = math.prod(array.chunks) * array.dtype.itemsize
    if chunk_bytes > MAX_SEGMENT_BYTES:
        raise unusable(path, f"has chunks of {chunk_bytes:,} bytes", "write smaller chunks")
    return array


def _codecs(array: zarr.Array[Any]) -> set[str]:
    metadata: dict[str, Any] = dict(array.metadata.to_dict())
    listed = [metadata.get("compressor"), *(metadata.get("filters") or ())]
    names = {str(codec["id"]) for codec in listed if codec}
    return names | set(_codec_names(metadata.get("codecs") or ()))


def _codec_names(codecs: Any) -> Iterator[str]:
    for codec in codecs:
        yield str(codec["name"]).removeprefix("numcodecs.")
        configuration = codec.get("configuration") or {}
        for key in ("codecs", "index_codecs"):
            yield from _codec_names(configuration.get(key) or ())


def _channel_names(metadata: dict[str, Any], count: int) -> tuple[str, ...]:
    numbers = tuple(str(number) for number in range(count))
    omero = metadata.get("omero")
    channels = omero.get("channels") if isinstance(omero, dict) else None
    if not isinstance(channels, list) or len(channels) != count:
        return numbers
    labels = (entry.get("label") if isinstance(entry, dict) else None for entry in channels)
    return tuple(
        str(label).strip() or number if label is not None else number
        for label, number in zip(labels, numbers, strict=True)
    )


def _pixel_size_um(path: Path, multiscale: dict[str, Any], y: int, x: int) -> float | None:
    axes = _objects(multiscale, "axes")
    scales = [1.0] * len(axes)
    stated = False
    for owner in (multiscale["datasets"][0], multiscale):
        for transformation in owner.get("coordinateTransformations") or ():
            if transformation.get("type") == "scale":
                stated = True
                steps = [float(step) for step in transformation["scale"]]
                scales = [scale * step for scale, step in zip(scales, steps, strict=True)]
    units = [UM_PER_UNIT.get(str(axes[n].get("unit", "")).lower()) for n in (y, x)]
    sides = [
        None if unit is None or not stated else scales[n] * unit
        for n, unit in zip((y, x), units, strict=True)
    ]
    return square_pixel_um(path, *sides)


class OmeZarrSource:
    """An open OME-Zarr folder. A chunk that is absent holds the fill value, as Zarr defines it."""

    def __init__(
        self, path: Path, header: Header, array: zarr.Array[Any], axes: tuple[str, ...]
    ) -> None:
        self.header = header
        self._path = path
        self._array = array
        self._axes = axes

    def close(self) -> None:
        """Nothing is kept open."""

    def read(self, box: Box, channels: tuple[int, ...]) -> NDArray[Any]:
        """(channels, height, width) in the file's dtype, native byte order.

        Raises
        ------
        InputError
            When a chunk cannot be read or decoded.
        """
        out = np.empty((len(channels), *box.shape), self.header.dtype)
        run = range(channels[0], channels[0] + len(channels))
        try:
            if channels == tuple(run):
                out[:] = self._part(box, slice(run.start, run.stop))
            else:
                for k, channel in enumerate(channels):
                    out[k] = self._part(box, slice(channel, channel + 1))[0]
        except Exception as error:
            what = f"cannot be read at {box} ({printable(str(error) or type(error).__name__)})"
            raise unusable(self._path, what, "copy or export it again") from error
        return out

    def _part(self, box: Box, channels: slice) -> NDArray[Any]:
        y, x = box.slices
        wanted: dict[str, slice] = {"c": channels, "y": y, "x": x}
        index = tuple(wanted.get(axis, slice(0, 1)) for axis in self._axes)
        part = np.asarray(self._array[index])
        kept = [axis for axis in self._axes if axis in wanted]
        part = part.reshape([part.shape[n] for n, axis in enumerate(self._axes) if axis in wanted])
        part = part.transpose([kept.index(axis) for axis in "cyx" if axis in kept])
        return part if "c" in kept else part[np.newaxis]
