"""Images as people have them: `open_file` shows what is in a file, `open_slide` gives a Slide of it.

    TIFF  stripped, tiled, Big, OME, ImageJ, SVS, NDPI, SCN, QPTIFF   tiff      lazy
    PNG, JPEG                                                          picture   decoded once
    OME-Zarr 0.4, 0.5                                                  omezarr   lazy
    MRXS, VMS, SVSLIDE, BIF, DICOM                         extra wsi   openslide_reader   lazy
    CZI; ND2, LIF                                          extra bioio czi_reader, bioio_reader
    what other packages read                                           readers

A Slide is one plane, (C, Y, X), or the maximum along z. Which one has to be said: see `planes`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from segpipe.errors import InputError
from segpipe.geometry import Box
from segpipe.slide.omezarr import is_zarr_folder, open_omezarr
from segpipe.slide.picture import JPEG_MAGIC, PNG_MAGIC, PictureContents
from segpipe.slide.planes import (
    THE_PLANE,
    Choice,
    Chosen,
    Contents,
    Plane,
    choose_planes,
    find_plane,
)
from segpipe.slide.readers import find_reader, searched_suffixes
from segpipe.slide.remote import remote_fingerprint, remote_url
from segpipe.slide.source import Source, printable, to_working, unusable, working_dtype
from segpipe.slide.tiff import open_tiff

IMAGE_SUFFIXES = (
    frozenset(
        {
            *(".tif", ".tiff", ".btf", ".tf8", ".png", ".jpg", ".jpeg"),
            *(".svs", ".ndpi", ".scn", ".qptiff"),
        }
    )
    | searched_suffixes()
)
"""Suffixes, in lower case, of files that are images when a folder is searched. OME-Zarr folders are
recognised by `is_zarr_folder`."""

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class Slide:
    """An opened image. `read` may be called by several threads at once; close it after use.

    Attributes
    ----------
    path
        The file, or the OME-Zarr folder.
    plane
        Which plane of it this is.
    shape
        (C, Y, X) of the full-resolution level. Pixels lie as they are stored: an orientation tag
        is not applied. Alpha is not a channel.
    dtype
        uint8, uint16 or float32. bool is read as uint8 of 0 and 255; other integers, float16 and
        float64 as float32, and an integer that float32 cannot hold exactly is an InputError.
    channel_names
        From OME-XML, ImageJ's labels, QPTIFF or omero; else "0", "1", ...; of a colour image "red",
        "green", "blue".
    rgb
        Whether the channels are the colours of a photograph.
    pixel_size_um
        Micrometres a pixel along y and x; None when nobody states it, or it is absurd (a warning).
    pixel_size_from
        Who states it, for people: `OME-XML`; empty when nobody does.
    levels
        Of the pyramid, the finest first: shape and downsample of each. A level that cannot be read,
        or is no smaller copy of the image, is left out and in `warnings`.
    reader, compression
        Who reads the file and how its pixels are stored, for people: `tifffile/svs`, `jpeg`.
    warnings
        What is wrong with the file and does no harm to the full resolution.
    left_out
        Pictures beside the slide that are not read: label, macro, thumbnail.
    chunk
        (Y, X) of the pieces, each of this plane alone, in which an OME-Zarr stores the full
        resolution; None of other files, and where more than the plane must be read.
    """

    def __init__(self, path: Path, source: Source, plane: Plane = THE_PLANE) -> None:
        header = source.header
        self._source: Source | None = source
        self.path = path
        self.plane = plane
        self.shape = header.shape
        self.dtype = working_dtype(path, header.dtype)
        self.channel_names = header.channel_names
        self.rgb = header.rgb
        self.pixel_size_um = header.pixel_size.um
        self.pixel_size_from = header.pixel_size.origin
        self.levels = header.levels
        self.reader = header.reader
        self.compression = header.compression
        self.warnings = header.warnings + header.pixel_size.warnings
        self.left_out = header.left_out
        self.chunk = header.chunk

    def __repr__(self) -> str:
        return f"Slide({printable(self.path.name)}, {self.shape}, {self.dtype})"

    def read(self, box: Box, channels: Sequence[int] | None = None, level: int = 0) -> NDArray[Any]:
        """(channels, height, width) of the box in pixels of a level, in `dtype`; a new array.

        Parameters
        ----------
        box
            Inside the level.
        channels
            Numbers of channels in the order wanted; None gives all.
        level
            Number in `levels`; 0 is the full resolution.

        Raises
        ------
        InputError
            When a part of the file that the box needs is missing or damaged, or holds a number
            that `dtype` cannot.
        ValueError, IndexError
            When the slide is closed, the box is not inside the level, or there is no such channel
            or level.
        """
        pixels = self.read_stored(box, channels, level)
        try:
            return to_working(pixels, self.dtype)
        except ValueError as error:
            raise unusable(
                self.path, f"has {error} in {box}", "convert it to uint16 or float32"
            ) from error

    def read_stored(
        self, box: Box, channels: Sequence[int] | None = None, level: int = 0
    ) -> NDArray[Any]:
        """As `read`, in the file's own dtype: label ids of 32 bits stay what they are.

        Raises
        ------
        InputError, ValueError, IndexError
            As `read`.
        """
        source = self._source
        if source is None:
            raise ValueError(f"{self!r} is closed")
        if not 0 <= level < len(self.levels):
            raise IndexError(f"level {level} of {self!r}, which has {len(self.levels)}")
        if not Box(0, 0, *self.levels[level].shape).contains(box):
            raise ValueError(f"box {box} is not inside level {level} of {self!r}")
        wanted = tuple(range(self.shape[0])) if channels is None else tuple(channels)
        if not all(0 <= channel < self.shape[0] for channel in wanted):
            raise IndexError(f"channels {wanted} of {self!r}")
        if not wanted or box.area == 0:
            return np.empty((len(wanted), *box.shape), source.header.dtype)
        pixels = source.read(box, wanted, level)
        expected = (len(wanted), *box.shape), source.header.dtype
        if (pixels.shape, pixels.dtype) != expected:
            what = f"was read as {pixels.shape} {pixels.dtype}, not {expected[0]} {expected[1]}"
            raise unusable(self.path, f"{what}, by {self.reader}", "repair that reader")
        return pixels

    def close(self) -> None:
        """Let go of the file and of what was decoded; may be called again. What it is stays known."""
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class OpenFile:
    """A file whose headers were read, once for all of its planes. For one thread at a time.

    Attributes
    ----------
    path
        The file, or the OME-Zarr folder.
    scenes
        What is in it: how many time points and z planes of each scene.
    """

    def __init__(self, path: Path, contents: Contents) -> None:
        self.path = path
        self.scenes = contents.scenes
        self._contents = contents

    def choose(self, choice: Choice) -> tuple[Chosen, ...]:
        """The planes that are wanted; errors as in `choose_planes`."""
        return choose_planes(self.path, self.scenes, choice)

    def first(self, number: int = 0) -> Plane:
        """The first plane of a scene; pages without a stated meaning are taken for planes."""
        scene = self.scenes[number]
        return Plane(
            scene=number if len(self.scenes) > 1 else None,
            t=0 if scene.t > 1 else None,
            z=0 if scene.z > 1 or scene.pages > 1 else None,
            pages="z" if scene.pages > 1 else None,
        )

    def slide(self, plane: Plane = THE_PLANE) -> Slide:
        """One plane of the file; it stays readable when the file is closed.

        Raises
        ------
        InputError
            When there is no such plane, when it is one of several and none was named, or when it
            cannot be read right.
        """
        source = self._contents.source(find_plane(self.path, self.scenes, plane))
        try:
            return Slide(self.path, source, plane)
        except BaseException:
            source.close()
            raise

    def close(self) -> None:
        """Let go of the file; may be called again."""
        self._contents.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_slide(path: Path, plane: Plane = THE_PLANE) -> Slide:
    """The image in a file or OME-Zarr folder, or one plane of it.

    Raises
    ------
    InputError
        In one line: the name, what is wrong, what to do.
    """
    with open_file(path) as file:
        return file.slide(plane)


def open_file(path: Path) -> OpenFile:
    """What is in a file or OME-Zarr folder; what it is follows from its content, not its name.

    Raises
    ------
    InputError
        In one line: the name, what is wrong, what to do.
    """
    return OpenFile(path, _open_contents(path))


def _open_contents(path: Path) -> Contents:
    try:
        if is_zarr_folder(path):
            return open_omezarr(path)
        if path.is_dir():
            raise unusable(path, "is a folder and no OME-Zarr image", "give a file")
        if path.exists() and not path.is_file():
            raise unusable(path, "is not a regular file", "give a file")
        with path.open("rb") as file:
            start = file.read(16)
        opener = find_reader(path)
        if opener is not None and start:
            return opener(path)
        if start.startswith(_TIFF_MAGIC):
            return open_tiff(path)
        if start.startswith((PNG_MAGIC, JPEG_MAGIC)):
            return PictureContents(path)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise _unopened(path, error) from error
    if not start:
        raise unusable(path, "is empty (0 bytes)", "copy or export it again")
    raise unusable(
        path,
        "is not an image that segpipe reads (TIFF, PNG, JPEG, OME-Zarr)",
        "convert it to OME-TIFF",
    )


def _unopened(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return unusable(path, f"cannot be opened ({printable(reason)})", "check its path and rights")


def input_fingerprint(path: Path) -> str:
    """16 hexadecimal digits that change when the input does; the path is not part of it.

    Of a file: size and time of change. Of a folder: those of every file in it, with the path
    inside the folder; of a MIRAX file its folder counts too. Of an address: its metadata.

    Raises
    ------
    InputError
        When it does not exist or cannot be listed.
    """
    digest = hashlib.blake2b(digest_size=8)
    try:
        if remote_url(path) is not None:
            return remote_fingerprint(path)
        for inside, status in sorted(_files(path)):
            digest.update(f"{inside}\0{status}\0".encode(errors="surrogateescape"))
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise _unopened(path, error) from error
    return digest.hexdigest()


def _files(path: Path) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    folders = [path]
    if not path.is_dir():
        found = [("", _status(path.stat()))]
        beside = path.with_suffix("")
        folders = [beside] if path.suffix.lower() == ".mrxs" and beside.is_dir() else []
    top = folders[0] if folders else path
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                else:
                    inside = Path(entry.path).relative_to(top).as_posix()
                    found.append((inside, _status(entry.stat())))
    return found


def _status(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"
