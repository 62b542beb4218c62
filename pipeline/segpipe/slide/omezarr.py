"""OME-Zarr folders as inputs: 0.4 (Zarr v2) and 0.5 (Zarr v3).

Beside store.py only this module and its neighbours import zarr.

Metadata are hostile: codecs are those of a list (a filter named "pickle" would run what the folder
says), paths stay inside the folder, chunks are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from segpipe.errors import InputError
from segpipe.slide.omezarr_scenes import find_scenes, inside, namespace, objects
from segpipe.slide.omezarr_source import OmeZarrSource
from segpipe.slide.pixel_size import UM_PER_UNIT, stated_pixel
from segpipe.slide.planes import Place, Scene
from segpipe.slide.remote import open_store, remote_url
from segpipe.slide.source import (
    MAX_SEGMENT_BYTES,
    Header,
    Level,
    PixelSize,
    check_size,
    downsample_of,
    left_out,
    printable,
    reading,
    unusable,
    working_dtype,
)

VERSIONS = ("0.4", "0.5")
_COMPRESSORS = ("blosc", "zstd", "gzip", "zlib", "lz4", "lzma", "bz2")
_FILTERS = ("bytes", "crc32c", "delta", "packbits", "sharding_indexed", "shuffle", "transpose")
CODECS = frozenset(_COMPRESSORS + _FILTERS)
COLOURS = ("red", "green", "blue")
"""Labels by which an image is known as RGB; omero's display colours do not tell it."""

_REMEDY = "give an OME-Zarr 0.4 or 0.5 folder"
_REMOTE_REMEDY = (
    "give the address of an OME-Zarr 0.4 or 0.5, and credentials where the store asks for them"
)
_UNREADABLE = "is no OME-Zarr image that can be read"
_MARKERS = ("zarr.json", ".zgroup", ".zattrs", ".zarray")


def is_zarr_folder(path: Path) -> bool:
    """Whether the folder holds Zarr metadata, or is named as if it did; or is an address."""
    if remote_url(path) is not None:
        return True
    return path.is_dir() and (
        path.suffix.lower() == ".zarr" or any((path / marker).is_file() for marker in _MARKERS)
    )


def open_omezarr(path: Path) -> OmeZarrContents:
    """The scenes in an OME-Zarr folder: its image, those of a bioformats2raw folder, or the fields of
    a plate or well. No pixels are read yet.

    Raises
    ------
    InputError
        When it is not OME-Zarr 0.4 or 0.5. What is wrong with one of several scenes is said when
        that one is opened.
    """
    local = remote_url(path) is None
    if local and not any((path / marker).is_file() for marker in _MARKERS):
        raise unusable(path, "is a folder without Zarr metadata", _REMEDY)
    with reading(path, _UNREADABLE, _REMEDY if local else _REMOTE_REMEDY):
        return OmeZarrContents(path)


def list_labels(path: Path) -> tuple[Path, ...]:
    """The label images that an OME-Zarr image names as its own, each an OME-Zarr folder itself.

    Raises
    ------
    InputError
        When the metadata cannot be read, or lead out of the folder.
    """
    with reading(path, _UNREADABLE, _REMEDY):
        root = zarr.open_group(open_store(path), mode="r", use_consolidated=False)
        group = root.get("labels")
        listed = namespace(group).get("labels") if isinstance(group, zarr.Group) else None
        names = [str(name) for name in listed] if isinstance(listed, list) else []
        for name in names:
            inside(path, root["labels"], name)  # type: ignore[arg-type]
        return tuple(path / "labels" / name for name in names)


class OmeZarrContents:
    """An OME-Zarr folder whose metadata were read. See `Contents`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        root = zarr.open_group(open_store(path), mode="r", use_consolidated=False)
        self._found = find_scenes(path, root)
        self._sources: dict[int, OmeZarrSource] = {}
        if len(self._found) == 1:
            self.scenes: tuple[Scene, ...] = (self._opened(0).scene(self._found[0][0]),)
        else:
            self.scenes = tuple(self._scene(number) for number in range(len(self._found)))

    def _opened(self, number: int) -> OmeZarrSource:
        if number not in self._sources:
            with reading(self._path, _UNREADABLE, _REMEDY):
                self._sources[number] = _source(self._path, self._found[number][1]())
        return self._sources[number]

    def _scene(self, number: int) -> Scene:
        name = self._found[number][0]
        try:
            return self._opened(number).scene(name)
        except InputError:
            return Scene(name, (0, 0))  # the others can be used, and this one will say what it has

    def source(self, place: Place) -> OmeZarrSource:
        """One plane, or a projection; no pixels are read yet.

        Raises
        ------
        InputError
            When the scene is not OME-Zarr 0.4 or 0.5, has axes longer than 1 beside t, c, z, y and
            x, or uses codecs that are not in `CODECS`.
        """
        return self._opened(place.scene).at(place)

    def close(self) -> None:
        """Nothing is kept open."""


def _source(path: Path, group: zarr.Group) -> OmeZarrSource:
    multiscale, metadata = _multiscale(path, group)
    axes = _axes(path, multiscale)
    datasets = objects(multiscale, "datasets")
    finest = _level(path, group, datasets[0]) if datasets else None
    if finest is None or finest.ndim != len(axes):
        raise unusable(path, f"has no arrays of axes {''.join(axes)}", "write it again")
    sizes = dict(zip(axes, finest.shape, strict=True))
    extra = [axis for axis, size in sizes.items() if size > 1 and axis not in "tczyx"]
    if extra:
        words = " and ".join(f"{sizes[axis]} of axis {printable(axis)}" for axis in extra)
        raise unusable(path, f"has {words}", "save what to segment in a folder of its own")
    shape = (sizes.get("c", 1), sizes["y"], sizes["x"])
    dtype = np.dtype(finest.dtype).newbyteorder("=")
    working_dtype(path, dtype)
    check_size(path, shape, dtype.itemsize, None)
    y, x = axes.index("y"), axes.index("x")
    names = _channel_names(metadata, shape[0])
    arrays, levels, warnings = [finest], [Level(shape[1:], 1.0)], []
    for number, dataset in enumerate(datasets[1:], start=1):
        try:
            coarser = _level(path, group, dataset)
            if coarser.ndim == len(axes) and _along(coarser, axes, "z") != sizes.get("z", 1):
                break  # halved along z too: it has no planes of this image
            factor = _downsample(finest, coarser, y, x)
            if factor <= levels[-1].downsample:
                raise ValueError("it is no smaller than the level before")
        except Exception as error:  # noqa: BLE001  whatever it is, the full resolution can be read
            warnings.append(left_out(path, number, error))
            continue
        arrays.append(coarser)
        levels.append(Level((coarser.shape[y], coarser.shape[x]), factor))
    header = Header(
        shape=shape,
        dtype=dtype,
        channel_names=names,
        rgb=tuple(name.lower() for name in names) == COLOURS,
        pixel_size=_pixel_size(path, multiscale, y, x),
        levels=tuple(levels),
        reader=f"zarr/{_version(multiscale, metadata) or VERSIONS[0]}",
        compression=next((name for name in _COMPRESSORS if name in _codecs(finest)), "none"),
        warnings=tuple(warnings),
    )
    return OmeZarrSource(path, header, tuple(arrays), axes)


def _along(array: zarr.Array[Any], axes: tuple[str, ...], axis: str) -> int:
    return int(array.shape[axes.index(axis)]) if axis in axes else 1


def _downsample(full: zarr.Array[Any], level: zarr.Array[Any], y: int, x: int) -> float:
    """Of a level.

    Raises
    ------
    ValueError
        When it is no smaller copy of the full resolution.
    """
    alike = len(level.shape) == len(full.shape) and level.dtype == full.dtype
    others = (n for n in range(len(full.shape)) if n not in (y, x))
    if alike and all(level.shape[n] == full.shape[n] for n in others):
        factor = downsample_of((full.shape[y], full.shape[x]), (level.shape[y], level.shape[x]))
        if factor is not None:
            return factor
    raise ValueError(f"{level.shape} {level.dtype} is no smaller copy of {full.shape}")


def _multiscale(path: Path, group: zarr.Group) -> tuple[dict[str, Any], dict[str, Any]]:
    """The multiscale of a group that is one image, and the metadata around it."""
    metadata = namespace(group)
    multiscales = objects(metadata, "multiscales")
    if len(multiscales) != 1:
        raise unusable(path, f"has {len(multiscales)} images", "save one image a folder")
    version = _version(multiscales[0], metadata)
    if version is not None and version not in VERSIONS:
        raise unusable(
            path, f"is OME-Zarr {printable(version)}", f"convert it to {' or '.join(VERSIONS)}"
        )
    return multiscales[0], metadata


def _version(multiscale: dict[str, Any], metadata: dict[str, Any]) -> str | None:
    version = metadata.get("version", multiscale.get("version"))
    return None if version is None else str(version)


def _axes(path: Path, multiscale: dict[str, Any]) -> tuple[str, ...]:
    axes = tuple(str(axis["name"]).lower() for axis in objects(multiscale, "axes"))
    if len(set(axes)) != len(axes) or not {"y", "x"} <= set(axes):
        raise unusable(path, f"has axes {printable(', '.join(axes))}", "write it with y and x")
    return axes


def _level(path: Path, group: zarr.Group, dataset: dict[str, Any]) -> zarr.Array[Any]:
    array = inside(path, group, str(dataset["path"]))
    if not isinstance(array, zarr.Array):
        raise TypeError(f"{array.name} is not an array")
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


def _pixel_size(path: Path, multiscale: dict[str, Any], y: int, x: int) -> PixelSize:
    axes = objects(multiscale, "axes")
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
    return stated_pixel(path, sides[0], sides[1], "OME-Zarr's scale")
