"""Which groups of an OME-Zarr folder are images: itself, or those of a collection.

one image        multiscales
bioformats2raw   0, 1, 2, ...; labels and macros among them are named in OME/METADATA.ome.xml
plate            the fields of its wells, A/1/0
well             its fields
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from segpipe.slide.source import MAX_FIELDS, printable, unusable
from segpipe.slide.tiff_metadata import AUXILIARY, ome_image_names

Found = tuple[str, Callable[[], zarr.Group]]
"""Name of a scene, and its group, opened when asked for: one that is damaged concerns nobody else."""


def find_scenes(path: Path, root: zarr.Group) -> list[Found]:
    """The images in a folder, in the order of its metadata.

    Raises
    ------
    InputError
        When there are none, too many, or paths that leave the folder.
    """
    metadata = namespace(root)
    if "plate" in metadata:
        wells = [str(well["path"]) for well in objects(metadata["plate"], "wells")]
        names = [field for well in wells for field in _fields_of_well(path, root, well)]
    elif "well" in metadata:
        names = _fields(root)
    elif "multiscales" not in metadata and "bioformats2raw.layout" in metadata:
        return _series(path, root)
    else:
        return [(path.name, lambda: root)]
    return [(name, _opener(path, root, name)) for name in _bounded(path, names)]


def _opener(path: Path, root: zarr.Group, name: str) -> Callable[[], zarr.Group]:
    def opened() -> zarr.Group:
        group = inside(path, root, name)
        if not isinstance(group, zarr.Group):
            raise TypeError(f"{name} is not a group")
        return group

    return opened


def _fields_of_well(path: Path, root: zarr.Group, well: str) -> list[str]:
    """Paths of the fields; of a well that is damaged its own, which then says what it has."""
    try:
        return [f"{well}/{field}" for field in _fields(_opener(path, root, well)())]
    except Exception:  # noqa: BLE001  whatever it is, the other wells are not concerned
        return [well]


def _fields(well: zarr.Group) -> list[str]:
    return [str(field["path"]) for field in objects(namespace(well)["well"], "images")]


def _series(path: Path, root: zarr.Group) -> list[Found]:
    ome = root.get("OME")
    listed = namespace(ome).get("series") if isinstance(ome, zarr.Group) else None
    # Numbers from 0 on, until one is missing: a server need not list what it has.
    paths = [str(name) for name in listed] if isinstance(listed, list) else _numbered(root)
    xml = sync(root.store.get("OME/METADATA.ome.xml", default_buffer_prototype()))
    names = ome_image_names(xml.to_bytes().decode("utf-8", "replace")) if xml is not None else ()
    if len(names) != len(paths):
        names = tuple(paths)
    found = [
        (name or place, _opener(path, root, place))
        for name, place in zip(names, _bounded(path, paths), strict=True)
    ]
    return [one for one in found if one[0].strip().lower() not in AUXILIARY] or found


def _numbered(root: zarr.Group) -> list[str]:
    numbers = itertools.takewhile(lambda n: n <= MAX_FIELDS and str(n) in root, itertools.count())
    return [str(number) for number in numbers]


def _bounded(path: Path, names: list[str]) -> list[str]:
    if not names or len(names) > MAX_FIELDS:
        raise unusable(path, f"has {len(names):,} images", f"give one to {MAX_FIELDS:,} of them")
    return names


def inside(path: Path, group: zarr.Group, name: str) -> zarr.Array[Any] | zarr.Group:
    """What a group holds under a name.

    Raises
    ------
    InputError
        When the name leads out of the group.
    """
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts:
        raise unusable(path, f"points outside itself ({printable(name)})", "write it again")
    return group[name]


def namespace(group: zarr.Group) -> dict[str, Any]:
    """The attributes of OME-Zarr: under `ome` in 0.5, at the top in 0.4."""
    attributes = group.attrs.asdict()
    ome = attributes.get("ome", attributes)
    if not isinstance(ome, dict):
        raise TypeError("the attribute ome is not an object")
    return ome


def objects(parent: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects in the metadata."""
    listed = parent.get(key)
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise TypeError(f"no list of {key}")
    return listed
