"""What a folder of images holds, by their headers alone."""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from segpipe.errors import InputError
from segpipe.inputs import find_files
from segpipe.results import counted
from segpipe.slide import OpenFile, list_channels, open_file
from segpipe.slide.pixel_size import SAME

LISTED = 8
"""Most lines of one kind."""


@dataclass(frozen=True)
class SeenImage:
    """A scene of a file; of its planes, the first.

    Attributes
    ----------
    pages
        Pages whose meaning the file does not state.
    """

    source: Path
    size: tuple[int, int]
    channels: tuple[str, ...]
    rgb: bool
    pixel_size_um: float | None
    t: int = 1
    z: int = 1
    pages: int = 1

    @property
    def pixels(self) -> int:
        """Pixels of one plane."""
        return math.prod(self.size)

    @property
    def planes(self) -> int:
        """How many images it can become."""
        return self.t * self.z * self.pages


@dataclass(frozen=True)
class Survey:
    """What the images of a folder are.

    Attributes
    ----------
    unreadable
        What is wrong with the others, each named.
    """

    images: tuple[SeenImage, ...]
    unreadable: tuple[str, ...] = ()

    @property
    def files(self) -> int:
        """How many files they are in."""
        return len({image.source for image in self.images})

    @property
    def rgb(self) -> int:
        """How many images have the colours of a photograph."""
        return sum(image.rgb for image in self.images)

    @property
    def largest(self) -> SeenImage:
        """The image of most pixels."""
        return max(self.images, key=lambda image: image.pixels)

    @property
    def planes(self) -> int:
        """Planes of all images."""
        return sum(image.planes for image in self.images)

    @property
    def pixels(self) -> int:
        """Pixels of all planes of all images."""
        return sum(image.planes * image.pixels for image in self.images)

    def told_sizes(self) -> str:
        """How many images, from which size to which, and how much it is in all."""
        smallest, largest = (
            "{1:,} x {0:,}".format(*chosen.size)
            for chosen in (min(self.images, key=lambda image: image.pixels), self.largest)
        )
        sizes = smallest if smallest == largest else f"{smallest} to {largest}"
        what = counted(len(self.images), "image")
        if len(self.images) > self.files:
            what += f" (scenes of {counted(self.files, 'file')})"
        if self.planes > len(self.images):
            what += f", {self.planes:,} planes"
        return f"{what} of {sizes} px, {_amount(self.pixels)} in all"

    def told_channels(self) -> list[str]:
        """Which channels how many images have, the most common first."""
        kinds = Counter((image.rgb, image.channels) for image in self.images)
        lines = [
            f"{counted(count, 'RGB image' if rgb else 'image')}: {list_channels(names)}"
            for (rgb, names), count in kinds.most_common(LISTED)
        ]
        return lines + [f"and {len(kinds) - LISTED} other lists of channels"] * (
            len(kinds) > LISTED
        )

    def told_pixel_sizes(self) -> str:
        """What the files say of the size of a pixel."""
        said = [size for image in self.images if (size := image.pixel_size_um) is not None]
        if not said:
            return "no file says it"
        low, high = min(said), max(said)
        sizes = f"{low:.4g} um" if high <= low * (1 + SAME) else f"{low:.4g} to {high:.4g} um"
        if len(said) == len(self.images):
            return sizes
        return (
            f"{sizes} in {counted(len(said), 'image')}, not said in {len(self.images) - len(said)}"
        )

    def counts(self, axis: str) -> list[int]:
        """How many there are along z, t, pages or scene, of each that has several."""
        if axis == "scene":
            counts = list(Counter(image.source for image in self.images).values())
        else:
            counts = [getattr(image, axis) for image in self.images]
        return sorted(count for count in counts if count > 1)


def survey(given: Path, out: Path) -> Survey:
    """What the images in a file or folder are; results in OUT, and others, are not looked at.

    Raises
    ------
    SettingsError
        When it does not exist, or holds no images.
    InputError
        When none of them can be read.
    """
    files = list(dict.fromkeys(path.resolve() for path, _ in find_files([given], out)))
    images: list[SeenImage] = []
    unreadable: list[str] = []
    bar = tqdm(files, unit=" files", disable=not sys.stderr.isatty(), leave=False, delay=1)
    for path in bar:
        try:
            with open_file(path) as file:
                for number in range(len(file.scenes)):
                    _look(file, number, images, unreadable)
        except InputError as error:
            unreadable.append(str(error))
    if not images:
        raise InputError(f"nothing in {given} can be read: {unreadable[0]}")
    return Survey(tuple(images), tuple(unreadable))


def _look(file: OpenFile, number: int, images: list[SeenImage], unreadable: list[str]) -> None:
    """Add a scene to the images, or to what is wrong."""
    scene = file.scenes[number]
    try:
        with file.slide(file.first(number)) as slide:
            names, rgb, size = slide.channel_names, slide.rgb, slide.pixel_size_um
    except InputError as error:
        which = f"scene {number} of " if len(file.scenes) > 1 else ""
        unreadable.append(f"{which}{error}")
        return
    images.append(SeenImage(file.path, scene.size, names, rgb, size, scene.t, scene.z, scene.pages))


def _amount(pixels: int) -> str:
    return f"{pixels / 1e9:.3g} gigapixels" if pixels >= 1e9 else f"{pixels / 1e6:.3g} megapixels"
