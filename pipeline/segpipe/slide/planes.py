"""Scenes, time points and z planes of one file, and which of them are made images.

A file holds scenes; a scene has time points and z planes; one of each is an image. Nothing is chosen
that was not asked for. Planes and their projection differ in what is counted (236 planes see a
nucleus 20 times, their maximum sees it once, and fuses what lies above it), a scene may be a picture
of the label that nobody called so, and a film is thousands of images: the error costs one option,
the wrong guess a night.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from segpipe.errors import InputError
from segpipe.slide.source import Source, printable, unusable

MAX_IMAGES = 65_536
"""Most images of one file: a header may claim any number."""

Pages = Literal["z", "t", "channel"]
_WORDS = {"scene": "scenes", "t": "time points", "z": "z planes"}
_LISTED_SCENES = 4


@dataclass(frozen=True)
class Plane:
    """One (C, Y, X) of a file. Numbers count from 0; None where the file has one only.

    `z` may be "max": the largest value along z. `pages` is what pages are that the file does not
    explain.

    >>> print(Plane(scene=1, z=3), "|", Plane())
    scene 1, z 3 | the only plane
    """

    scene: int | None = None
    t: int | None = None
    z: int | Literal["max"] | None = None
    pages: Pages | None = None

    def stated(self) -> dict[str, int | str]:
        """What is not None, for JSON."""
        return {key: value for key, value in vars(self).items() if value is not None}

    def __str__(self) -> str:
        numbers = (f"{key} {value}" for key, value in self.stated().items() if key != "pages")
        return ", ".join(numbers) or "the only plane"


THE_PLANE = Plane()
"""Of a file that holds one."""


@dataclass(frozen=True)
class Choice:
    """Which planes are wanted, as the settings say: None where that is not said."""

    z: Literal["each", "max"] | tuple[int, ...] | None = None
    t: Literal["each"] | tuple[int, ...] | None = None
    scene: Literal["each"] | tuple[int, ...] | None = None
    pages: Pages | None = None


@dataclass(frozen=True)
class Scene:
    """How many planes a scene has. `pages` are those whose meaning the file does not state."""

    name: str
    size: tuple[int, int]
    t: int = 1
    z: int = 1
    pages: int = 1

    def read_as(self, path: Path, pages: Pages | None) -> Scene:
        """The scene with its pages explained; of channels nothing is left to choose.

        Raises
        ------
        InputError
            When pages are left unexplained, or stand beside other planes.
        """
        if self.pages == 1:
            return self
        if self.t > 1 or self.z > 1:
            what = f"has {self.pages} pages without a stated meaning beside other planes"
            raise unusable(path, what, "save it with its axes stated (OME-TIFF, ImageJ hyperstack)")
        if pages is None:
            raise unusable(
                path,
                f"has {self.pages} pages without a stated meaning",
                "say what they are with -s tile.pages=channel, or z or t (with --planes each or max)",
            )
        t, z = (self.pages if pages == axis else 1 for axis in ("t", "z"))
        return Scene(self.name, self.size, t, z)


@dataclass(frozen=True)
class Chosen:
    """A plane that becomes an image, and what is added to the file's name for it."""

    plane: Plane
    suffix: str


def choose_planes(path: Path, scenes: Sequence[Scene], choice: Choice) -> tuple[Chosen, ...]:
    """The planes of a file that are wanted: by scene, then time, then z.

    A file of one plane is that plane, whatever is wanted. A number has as many digits as the last
    one of its axis; a projection adds nothing.

    Raises
    ------
    InputError
        When there are several planes and nobody said which, when one is wanted that is not there,
        or when there are more than `MAX_IMAGES`.
    """
    several = len(scenes) > 1
    numbers = _numbers(path, "scene", len(scenes), choice.scene)
    wanted = scenes if numbers is None else [scenes[number] for number in numbers]
    read = [scene.read_as(path, choice.pages) for scene in wanted]
    _refuse_unsaid(path, scenes, read, (choice.scene, choice.t, choice.z))
    digits = {
        "s": len(str(len(scenes) - 1)),
        "t": max(len(str(scene.t - 1)) for scene in read),
        "z": max(len(str(scene.z - 1)) for scene in read),
    }
    total = sum(math.prod(_images(scene, choice)) for scene in read)
    if total > MAX_IMAGES:
        what = f"would be {total:,} images, more than {MAX_IMAGES:,}"
        raise unusable(path, what, "choose some with tile.scene, tile.t and tile.z")
    chosen = []
    for number, scene, unread in zip(numbers or (0,), read, wanted, strict=True):
        for t in _numbers(path, "t", scene.t, choice.t) or (None,):
            for z in _numbers(path, "z", scene.z, choice.z) or (None,):
                plane = Plane(
                    scene=number if several else None,
                    t=t,
                    z="max" if choice.z == "max" and scene.z > 1 else z,
                    pages=choice.pages if unread.pages > 1 else None,
                )
                chosen.append(Chosen(plane, _suffix(plane, digits)))
    return tuple(chosen)


def _images(scene: Scene, choice: Choice) -> tuple[int, int]:
    """How many images a scene becomes along t and z, at most."""
    t = scene.t if choice.t == "each" else len(choice.t or ())
    z = scene.z if choice.z == "each" else 1 if choice.z == "max" else len(choice.z or ())
    return max(1, t), max(1, z)


def _numbers(
    path: Path, key: str, count: int, wanted: str | tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """The wanted numbers along one axis, rising; None when none has to be, or can be, named."""
    if count == 1 or wanted is None or wanted == "max":
        return None
    numbers = tuple(range(count)) if isinstance(wanted, str) else tuple(sorted(set(wanted)))
    if numbers[-1] >= count:
        raise _absent(path, key, numbers[-1], count)
    return numbers


def _absent(path: Path, key: str, number: int, count: int) -> InputError:
    there = f"{count} {_WORDS[key]}" if count > 1 else f"1 {_WORDS[key].removesuffix('s')}"
    what = f"has no {_WORDS[key].removesuffix('s')} {number}: it has {there}, numbered from 0"
    return unusable(path, what, f"correct tile.{key}")


def _refuse_unsaid(
    path: Path, scenes: Sequence[Scene], wanted: Sequence[Scene], said: tuple[object, ...]
) -> None:
    """Refuse a file of several scenes, time points or z planes of which nobody said which."""
    sizes = (
        len(scenes),
        max(scene.t for scene in wanted),
        max(scene.z for scene in wanted),
    )
    keys = [
        (key, size)
        for key, size, choice in zip(_WORDS, sizes, said, strict=True)
        if size > 1 and choice is None
    ]
    if not keys:
        return
    parts = [f"{size} {_WORDS[key]}" for key, size in keys]
    if keys[0][0] == "scene":
        listed = [
            f"{printable(scene.name, 40) or '?'} {scene.size[0]} x {scene.size[1]}"
            for scene in scenes[:_LISTED_SCENES]
        ]
        parts[0] += f" ({', '.join(listed)}{', ...' if len(scenes) > _LISTED_SCENES else ''})"
    projected = " or max (their maximum)" if keys[-1][0] == "z" else ""
    some = " ".join(f"-s tile.{key}=[0]" for key, _ in keys)
    raise unusable(
        path,
        f"has {' and '.join(parts)}",
        f"take them with --planes each (an image each){projected}, or some with {some}",
    )


def _suffix(plane: Plane, digits: dict[str, int]) -> str:
    numbers = {"s": plane.scene, "t": plane.t, "z": None if plane.z == "max" else plane.z}
    return "".join(
        f"_{letter}{number:0{digits[letter]}}"
        for letter, number in numbers.items()
        if number is not None
    )


@dataclass(frozen=True)
class Place:
    """Where a plane lies: numbers along the axes of its scene, those along z to be projected."""

    scene: int
    t: int
    z: range
    pages: Pages | None

    def __str__(self) -> str:
        words = [f"scene {self.scene}"] * (self.scene > 0) + [f"t {self.t}"]
        return ", ".join([*words, f"z {self.z[0]}" if len(self.z) == 1 else "all z"])


class Contents(Protocol):
    """An opened file, its headers read once. For one thread at a time."""

    scenes: tuple[Scene, ...]

    def source(self, place: Place) -> Source:
        """One plane, which stays readable when this is closed."""

    def close(self) -> None:
        """Let go of the file."""


def find_plane(path: Path, scenes: Sequence[Scene], plane: Plane) -> Place:
    """Where the plane is in the file.

    Raises
    ------
    InputError
        When the file has no such plane, or several that are meant.
    """
    number = plane.scene or 0
    if number >= len(scenes):
        raise _absent(path, "scene", number, len(scenes))
    scene = scenes[number].read_as(path, plane.pages)
    _refuse_unsaid(path, scenes, [scene], (plane.scene, plane.t, plane.z))
    t, z = plane.t or 0, plane.z or 0
    if t >= scene.t:
        raise _absent(path, "t", t, scene.t)
    if z == "max":
        return Place(number, t, range(scene.z), plane.pages)
    if z >= scene.z:
        raise _absent(path, "z", z, scene.z)
    return Place(number, t, range(z, z + 1), plane.pages)
