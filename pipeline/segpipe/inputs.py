"""Files and folders become named images; names once given stay."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from segpipe.errors import SettingsError
from segpipe.records import locked, read_json, write_json
from segpipe.slide import IMAGE_SUFFIXES, is_zarr_folder

LONGEST = 160
"""Bytes of a name; suffixes and temporary names must still fit a file name."""


@dataclass(frozen=True)
class Input:
    """An image file (or OME-Zarr folder) and the name of its results, with `/` for subfolders."""

    name: str
    source: Path


def find_inputs(given: Sequence[Path], out: Path) -> list[Input]:
    """All images in the given files and folders, searched recursively, in a stable order.

    Folders of results (OUT, or any other) and hidden ones are not searched; an OME-Zarr is an input,
    not a folder. A file that is named is taken whatever its suffix.

    Raises
    ------
    SettingsError
        When a path does not exist, or no image is found.
    """
    found: list[tuple[Path, PurePosixPath]] = []
    for path in given:
        if not path.exists():
            raise SettingsError(f"no such file or folder: {path}")
        if path.is_dir() and not is_zarr_folder(path):
            if path.resolve() == out.resolve():
                raise SettingsError(f"{path} is both searched and OUT; choose another OUT")
            found += [
                (image, PurePosixPath(image.relative_to(path).as_posix()))
                for image in _search(path, out.resolve())
            ]
        else:
            found.append((path, PurePosixPath(path.resolve().name)))
    if not found:
        where = ", ".join(str(path) for path in given)
        raise SettingsError(
            f"no images in {where}; looked for {' '.join(sorted(IMAGE_SUFFIXES))} .ome.zarr"
        )
    return _name(found, out)


def names_in_order(out: Path) -> list[str]:
    """All names that were ever given in OUT, in the order in which they were."""
    given = read_json(out / "manifests" / "images.json")
    return list(given) if isinstance(given, dict) else []


def is_results(folder: Path) -> bool:
    """Whether a folder holds results of ours."""
    return os.access(folder, os.X_OK) and (
        (folder / "manifests" / "images.json").is_file() or (folder / ".segpipe").is_dir()
    )


def _search(folder: Path, out: Path) -> Iterator[Path]:
    def unreadable(error: OSError) -> None:
        raise SettingsError(f"cannot search {error.filename}: {error.strerror}") from error

    for place, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(place)
        images = [here / name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        inside = []
        for name in folders:
            if name.startswith(".") or (here / name).resolve() == out or is_results(here / name):
                continue
            if is_zarr_folder(here / name):
                images.append(here / name)
            else:
                inside.append(name)
        folders[:] = sorted(inside)
        yield from sorted(path for path in images if not path.name.startswith("."))


def _name(found: Sequence[tuple[Path, PurePosixPath]], out: Path) -> list[Input]:
    registry = out / "manifests" / "images.json"
    with locked(registry.with_name(".images.json"), "images.json", wait=True):
        return _name_new(found, registry)


def _name_new(found: Sequence[tuple[Path, PurePosixPath]], registry: Path) -> list[Input]:
    given = read_json(registry)
    names: dict[str, str] = dict(given) if isinstance(given, dict) else {}
    by_source = {source: name for name, source in names.items()}
    taken = {_folded(name) for name in names}
    inputs: list[Input] = []
    for path, relative in found:
        source = str(path.resolve())
        name = by_source.get(source)
        if name is None:
            name = _free_name(relative, taken)
            names[name], by_source[source] = source, name
            taken.add(_folded(name))
        if all(one.name != name for one in inputs):
            inputs.append(Input(name, Path(source)))
    if names != given:
        write_json(registry, names)
    return inputs


def _free_name(relative: PurePosixPath, taken: set[str]) -> str:
    folders = [_safe(part) for part in relative.parts[:-1]]
    candidates = [_stem(relative.name), relative.name]
    number = 2
    while True:
        name = "/".join([*folders, _safe(candidates[0])])
        if _folded(name) not in taken:
            return name
        candidates = candidates[1:] or [f"{relative.name}_{number}"]
        number += 1


def _stem(name: str) -> str:
    lower = name.lower()
    for double in (".ome.zarr", ".ome.tiff", ".ome.tif", ".ome.btf", ".tf8"):
        if lower.endswith(double) and len(name) > len(double):
            return name[: -len(double)]
    return PurePosixPath(name).stem


def _safe(part: str) -> str:
    """A file name that cannot leave its folder, hide, break a line or be too long."""
    clean = "".join(
        "_" if unicodedata.category(c).startswith("C") or c in '/\\:*?"<>|' else c
        for c in part.encode("utf-8", "replace").decode("utf-8")
    )
    clean = clean.strip(" ")
    if clean.startswith("."):
        clean = "_" + clean[1:]
    if len(clean.encode()) > LONGEST:
        digest = hashlib.sha256(clean.encode()).hexdigest()[:8]
        clean = clean.encode()[: LONGEST - 9].decode("utf-8", "ignore") + "-" + digest
    return clean or "_"


def _folded(name: str) -> str:
    """What a file system that ignores case or normalises unicode would take for the same name."""
    return unicodedata.normalize("NFC", name).casefold()
