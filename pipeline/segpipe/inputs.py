"""Files and folders become named images; names once given stay.

An image is a plane of a file: `find_inputs` lists (name, source, plane), several of a file that holds
several planes of which the settings want several.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from segpipe.errors import InputError, SettingsError
from segpipe.records import locked, read_json, write_json
from segpipe.settings import TileSettings
from segpipe.slide import (
    IMAGE_SUFFIXES,
    THE_PLANE,
    Choice,
    Chosen,
    OpenFile,
    Plane,
    Slide,
    input_fingerprint,
    is_zarr_folder,
    open_file,
    remote_url,
)

LONGEST = 160
"""Bytes of a name; suffixes and temporary names must still fit a file name."""


@dataclass(frozen=True)
class Input:
    """A plane of an image file (or OME-Zarr folder), and the name of its results, with `/` for
    subfolders."""

    name: str
    source: Path
    plane: Plane = THE_PLANE
    seen: Seen | None = field(default=None, compare=False)
    """What its header says, if it was read while the file was open: opening many small files a second
    time takes long."""


@dataclass(frozen=True)
class Seen:
    """A file of one plane when it was last looked at."""

    slide: Slide
    """Closed: only what it tells of itself is of use."""
    fingerprint: str


def find_inputs(
    given: Sequence[Path],
    out: Path,
    tile: TileSettings | None = None,
) -> list[Input]:
    """All images in the given files and folders, searched recursively, in a stable order.

    Folders of results (OUT, or any other) and hidden ones are not searched; an OME-Zarr is an input,
    not a folder. A file that is named is taken whatever its suffix.

    The header of each file is read, for the planes in it; `tile` says which are wanted. A file that
    cannot be read, or of which the settings do not say enough, is one input: whoever opens it says
    what is wrong with it.

    Raises
    ------
    SettingsError
        When a path does not exist, or no image is found.
    """
    found = find_files(given, out)
    return _name(found, out, choice_of(tile or TileSettings()))


def choice_of(tile: TileSettings) -> Choice:
    """Which planes the settings want."""
    return Choice(z=tile.z, t=tile.t, scene=tile.scene, pages=tile.pages)


def find_files(given: Sequence[Path], out: Path | None) -> list[tuple[Path, PurePosixPath]]:
    """All image files in the given files and folders, each with its path in the folder that was given.

    Raises
    ------
    SettingsError
        As `find_inputs`.
    """
    found: list[tuple[Path, PurePosixPath]] = []
    for path in given:
        if remote_url(path) is not None:
            found.append((path, PurePosixPath(path.name)))
            continue
        if not path.exists():
            raise SettingsError(f"no such file or folder: {path}")
        if path.is_dir() and not is_zarr_folder(path):
            apart = None if out is None else out.resolve()
            if path.resolve() == apart:
                raise SettingsError(f"{path} is both searched and OUT; choose another OUT")
            if is_results(path):
                raise SettingsError(
                    f"{path} holds results of segpipe; name the folder of the images, or one "
                    f"OME-Zarr in {path}"
                )
            found += [
                (image, PurePosixPath(image.relative_to(path).as_posix()))
                for image in _search(path, apart)
            ]
        else:
            found.append((path, PurePosixPath(path.resolve().name)))
    if not found:
        where = ", ".join(str(path) for path in given)
        raise SettingsError(
            f"no images in {where}; looked for {' '.join(sorted(IMAGE_SUFFIXES))} .ome.zarr"
        )
    return found


def names_in_order(out: Path) -> list[str]:
    """All names that were ever given in OUT, in the order in which they were."""
    given = read_json(out / "manifests" / "images.json")
    return list(given) if isinstance(given, dict) else []


def is_results(folder: Path) -> bool:
    """Whether a folder holds results of ours."""
    return os.access(folder, os.X_OK) and (
        (folder / "manifests" / "images.json").is_file() or (folder / ".segpipe").is_dir()
    )


def _search(folder: Path, out: Path | None) -> Iterator[Path]:
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


def known_inputs(out: Path) -> list[Input]:
    """All inputs that were ever given a name in OUT, in the order in which they were."""
    return [Input(name, one.source, one.plane) for name, one in _read(_registry(out)).items()]


@dataclass(frozen=True)
class _Known:
    """What a name stands for; `base` is the part that the planes of a file share."""

    source: Path
    plane: Plane
    base: str


def _registry(out: Path) -> Path:
    return out / "manifests" / "images.json"


def _read(registry: Path) -> dict[str, _Known]:
    content = read_json(registry)
    known: dict[str, _Known] = {}
    for name, told in content.items() if isinstance(content, dict) else ():
        if isinstance(told, str):
            known[name] = _Known(Path(told), THE_PLANE, name)
        else:
            known[name] = _Known(Path(told["source"]), Plane(**told["plane"]), told["base"])
    return known


def _write(registry: Path, known: Mapping[str, _Known]) -> None:
    content = {
        name: os.fspath(one.source)
        if one.plane == THE_PLANE
        else {"source": os.fspath(one.source), "plane": one.plane.stated(), "base": one.base}
        for name, one in known.items()
    }
    write_json(registry, content)


def _planes(path: Path, choice: Choice) -> list[tuple[Plane, str, Seen | None]]:
    """The planes of a file, with what is added to its name; of a single one, what it is."""
    try:
        fingerprint = input_fingerprint(path) if path.is_file() else None
        with open_file(path) as file:
            chosen = file.choose(choice)
            return [(one.plane, one.suffix, _seen(file, chosen, fingerprint)) for one in chosen]
    except InputError:
        return [(THE_PLANE, "", None)]


def _seen(file: OpenFile, chosen: Sequence[Chosen], fingerprint: str | None) -> Seen | None:
    if len(chosen) > 1 or fingerprint is None:
        return None
    try:
        with file.slide(chosen[0].plane) as slide:
            return Seen(slide, fingerprint)
    except InputError:  # whoever opens it says why
        return None


def _name(found: Sequence[tuple[Path, PurePosixPath]], out: Path, choice: Choice) -> list[Input]:
    wanted: dict[Path, tuple[PurePosixPath, list[tuple[Plane, str, Seen | None]]]] = {}
    for path, relative in found:
        source = path if remote_url(path) else path.resolve()
        if source not in wanted:
            wanted[source] = relative, _planes(source, choice)
    registry = _registry(out)
    with locked(registry.with_name(".images.json"), "images.json", wait=True):
        before = _read(registry)
        names = _Names(dict(before))
        inputs = [
            Input(names.give(source, relative, plane, suffix), source, plane, seen)
            for source, (relative, planes) in wanted.items()
            for plane, suffix, seen in planes
        ]
        if names.known != before:
            _write(registry, names.known)
    return inputs


class _Names:
    """The names in an OUT; `known` has those that were given, and gets those that are."""

    def __init__(self, known: dict[str, _Known]) -> None:
        self.known = known
        self._given = {(one.source, _place(one.plane)): name for name, one in known.items()}
        self._bases = {one.source: one.base for one in known.values()}
        self._owners = {_folded(one.base): one.source for one in known.values()}
        self._owners |= {_folded(name): one.source for name, one in known.items()}

    def give(self, source: Path, relative: PurePosixPath, plane: Plane, suffix: str) -> str:
        """The name of a plane, as it was given before or anew."""
        name = self._given.get((source, _place(plane)))
        if name is None:
            name = self._new(source, relative, suffix)
            self._given[source, _place(plane)] = name
            self._owners[_folded(name)] = source
        self.known[name] = _Known(source, plane, self._bases[source])
        return name

    def _new(self, source: Path, relative: PurePosixPath, suffix: str) -> str:
        if source not in self._bases:
            free = (one for one in _candidates(relative) if _folded(one) not in self._owners)
            self._bases[source] = next(free)
            self._owners[_folded(self._bases[source])] = source
        bases = itertools.chain([self._bases[source]], _candidates(relative))
        names = (base + suffix for base in bases)
        return next(one for one in names if self._owners.get(_folded(one), source) == source)


def _place(plane: Plane) -> tuple[int | None, ...]:
    """What a name tells of a plane: its projection has the name of the whole file, and a file that
    is refused keeps it until somebody says what is wanted of it."""
    return plane.scene, plane.t, None if isinstance(plane.z, str) else plane.z


def plain_name(path: Path) -> str:
    """The name that a file's results have where no other file wants it."""
    return next(_candidates(PurePosixPath(path.resolve().name)))


def _candidates(relative: PurePosixPath) -> Iterator[str]:
    """Names for a file, the best first: its stem, its name, its name with a number."""
    folders = [_safe(part) for part in relative.parts[:-1]]
    numbered = (f"{relative.name}_{number}" for number in itertools.count(2))
    for last in itertools.chain([_stem(relative.name), relative.name], numbered):
        yield "/".join([*folders, _safe(last)])


def stem_of(path: PurePosixPath) -> str:
    """A file's path without suffixes, `.ome.tif` and `.ome.zarr` being one: what its image is called."""
    return path.with_name(_stem(path.name)).as_posix()


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
