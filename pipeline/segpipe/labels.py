"""Label images as people have them: files, folders, OME-Zarr, an OUT of `predict`.

They are read exactly (ids of 32 bits) and in bands, so that memory does not grow with the image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segpipe.errors import InputError, SettingsError
from segpipe.geometry import Box
from segpipe.inputs import Input, find_files, is_results, known_inputs, stem_of
from segpipe.slide import (
    THE_PLANE,
    Choice,
    Plane,
    Slide,
    is_zarr_folder,
    list_labels,
    open_file,
    open_slide,
)
from segpipe.slide.source import printable, unusable
from segpipe.stages.manifest import Manifest
from segpipe.stages.places import manifest_path
from segpipe.store import LABEL_GROUP

BAND_PIXELS = 2**22
"""Read at once, about."""
_ROWS = 512  # bands are whole chunks of what we write
_EACH = Choice(z="each", t="each", scene="each")
_LARGEST_ID = 2**32 - 1


@dataclass(frozen=True)
class FullSize:
    """Of labels that `predict` made at another resolution: the image that they are of.

    shape
        (Y, X) of its full resolution.
    scale
        Full-resolution pixels a pixel of the labels.
    source
        The image itself.
    """

    shape: tuple[int, int]
    scale: float
    source: Path


@dataclass(frozen=True)
class LabelFile:
    """Where a label image lies.

    name
        By which it is matched: the stem, with `/` for subfolders.
    path, plane
        File, or OME-Zarr folder of the labels themselves, and the plane in it.
    image
        What was segmented, if that is known: a file or an OME-Zarr folder.
    problem
        Why it cannot be used, where that is known before it is opened.
    full
        The full resolution, where that is another one and is known.
    at_full
        Whether it is to be read at that: each pixel has the label of the working pixel that its
        centre lies in.
    """

    name: str
    path: Path
    plane: Plane = THE_PLANE
    image: Path | None = None
    problem: str | None = None
    full: FullSize | None = None
    at_full: bool = False

    def at_full_resolution(self) -> LabelFile:
        """The same, read at the full resolution of the image; itself where it is that already."""
        if self.full is None:
            return self
        return replace(self, image=self.full.source, at_full=True)


def find_labels(given: Path, out: Path | None = None) -> list[LabelFile]:
    """The label images that PATH stands for, by name.

    given
        A label file; an OME-Zarr, of an image with labels or of labels; an OUT of `predict`; a folder
        of any of these, or one that holds `images` and `masks`. Each plane of a file is an image.
    out
        A folder in it that is not searched.

    Raises
    ------
    SettingsError
        When it does not exist, no label image is found, or two have one name.
    """
    if is_results(given):
        return _of_results(given)
    masks = given / "masks"
    if given.is_dir() and masks.is_dir() and (given / "images").is_dir():
        given = masks
    images: dict[str, Path] = {}
    if given.is_dir() and (given.parent / "images").is_dir() and given.name != "images":
        images = find_images(given.parent / "images")
    found: dict[str, LabelFile] = {}
    for path, relative in find_files([given], out):
        for one in _in_file(path, stem_of(relative), images):
            if one.name in found:
                both = f"{found[one.name].path} and {one.path}"
                raise SettingsError(f"{both} are both called {one.name}; keep one")
            found[one.name] = one
    return list(found.values())


def find_images(folder: Path) -> dict[str, Path]:
    """Name -> file of the images in a folder, as `find_labels` names labels.

    Raises
    ------
    SettingsError
        When it does not exist or holds none.
    """
    return {stem_of(relative): path for path, relative in find_files([folder], None)}


def _of_results(out: Path) -> list[LabelFile]:
    found = []
    for known in known_inputs(out):
        name = known.name
        image = out / f"{name}.ome.zarr"
        manifest = Manifest.read(manifest_path(out, name, "stitch"))
        problem = None
        if manifest is None:
            problem = f"{name}: predict has not finished it; run the same `segpipe predict` again"
        elif manifest.failed:
            problem = (
                f"{name}: {len(manifest.failed)} of its regions failed in predict, see run.json; "
                "run the same `segpipe predict` again"
            )
        full = _full_size(out, known)
        found.append(LabelFile(name, image / LABEL_GROUP, image=image, problem=problem, full=full))
    return found


def _full_size(out: Path, known: Input) -> FullSize | None:
    """By the manifest of an image of an OUT."""
    manifest = Manifest.read(manifest_path(out, known.name, "tile"))
    if manifest is None or manifest.facts.get("scale", 1.0) == 1.0:
        return None
    height, width = manifest.facts["full_shape"]
    return FullSize((height, width), manifest.facts["scale"], known.source)


def _in_file(path: Path, name: str, images: dict[str, Path]) -> list[LabelFile]:
    """The label images in a file or OME-Zarr; one that cannot be opened, with its problem."""
    image = images.get(name)
    try:
        if is_zarr_folder(path):
            own = list_labels(path)
            chosen = [one for one in own if one.name == "instances"] or own
            if len(chosen) > 1:
                names = ", ".join(printable(one.name, 40) for one in own)
                raise unusable(path, f"has labels {names}", "give the path of one: .../labels/NAME")
            if chosen:
                path, image = chosen[0], path
        with open_file(path) as file:
            return [
                LabelFile(name + one.suffix, path, one.plane, images.get(name + one.suffix, image))
                for one in file.choose(_EACH)
            ]
    except InputError as error:
        return [LabelFile(name, path, problem=_in_folder(path, error))]


def _in_folder(path: Path, error: InputError) -> str:
    """The message with the whole path: files of truth and prediction have one name."""
    return f"{printable(path.parent)}/{error}"


class LabelImage:
    """An open label image; close it after use.

    shape
        (Y, X).

    Raises
    ------
    InputError
        When it cannot be opened, or has several channels.
    """

    def __init__(self, file: LabelFile) -> None:
        if file.problem is not None:
            raise InputError(file.problem)
        self.file = file
        try:
            self._slide: Slide = open_slide(file.path, file.plane)
        except InputError as error:
            raise InputError(_in_folder(file.path, error)) from error
        channels, *plane = self._slide.shape
        if channels != 1:
            self.close()
            raise self._no_labels(f"has {channels} channels")
        self._stored = (plane[0], plane[1])
        self._full = file.full if file.at_full else None
        self.shape = self._stored if self._full is None else self._full.shape

    def read(self, box: Box) -> NDArray[np.uint32]:
        """(h, w) ids of a box inside the image, 0 is background.

        Raises
        ------
        InputError
            When numbers are negative, fractions, NaN or above 2^32 - 1, or the file is damaged.
        """
        if self._full is None:
            return self._read(box)
        scale = self._full.scale
        rows, columns = (
            np.minimum(((np.arange(*span) + 0.5) / scale).astype(np.int64), size - 1)
            for span, size in zip(((box.y0, box.y1), (box.x0, box.x1)), self._stored, strict=True)
        )
        small = Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
        ids: NDArray[np.uint32] = self._read(small)[np.ix_(rows - small.y0, columns - small.x0)]
        return ids

    def _read(self, box: Box) -> NDArray[np.uint32]:
        try:
            stored = self._slide.read_stored(box)[0]
        except InputError as error:
            raise InputError(_in_folder(self.file.path, error)) from error
        kind = stored.dtype.kind
        if kind == "f" and not np.array_equal(
            np.trunc(stored), stored
        ):  # NaN is not equal to itself
            raise self._no_labels("has fractions or NaN")
        if kind in "fi" and stored.min(initial=0) < 0:
            raise self._no_labels("has negative numbers")
        if stored.max(initial=0) > _LARGEST_ID:
            raise self._no_labels(f"has numbers above {_LARGEST_ID:,}")
        ids: NDArray[np.uint32] = stored.astype(np.uint32, copy=False)
        return ids

    def bands(self) -> Iterator[Box]:
        """Boxes of whole rows that make up the image, from top to bottom."""
        height, width = self.shape
        rows = max(BAND_PIXELS // width // _ROWS, 1) * _ROWS
        return (Box(y, 0, min(y + rows, height), width) for y in range(0, height, rows))

    def count_pieces(self) -> int:
        """Connected components of all that is not background, those that cross bands left out."""
        pieces = 0
        for box in self.bands():
            found, count = ndimage.label(self.read(box) > 0)
            cut = [found[row] for row, at in ((0, box.y0), (-1, box.y1)) if 0 < at < self.shape[0]]
            crossing = np.unique(np.concatenate([[0], *cut]))
            pieces += count - (len(crossing) - 1)
        return pieces

    def _no_labels(self, what: str) -> InputError:
        remedy = "give one channel of whole numbers, 0 for background and one number per object"
        error = unusable(self.file.path, f"is no label image, it {what}", remedy)
        return InputError(_in_folder(self.file.path, error))

    def close(self) -> None:
        """Let go of the file."""
        self._slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def last_part(name: str) -> str:
    """A name without its folders."""
    return PurePosixPath(name).name


def read_image(path: Path, plane: Plane, box: Box, shape: tuple[int, int]) -> NDArray[Any] | None:
    """(C, h, w) of the image that was segmented; None when it cannot be read or has another shape."""
    try:
        with open_slide(path, plane) as slide:
            return slide.read(box) if slide.shape[1:] == shape else None
    except InputError:
        return None
