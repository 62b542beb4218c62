"""`info`: what a file holds, and what `predict` would make of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from segpipe.errors import InputError
from segpipe.inputs import plain_name
from segpipe.slide import Choice, OpenFile, Scene, open_file
from segpipe.slide.source import printable

LISTED_SCENES = 12
EACH = Choice(z="each", t="each", scene="each")
MAX = Choice(z="max", t="each", scene="each")


def describe(path: Path) -> Iterator[tuple[str, str]]:
    """Keys and values, in the order in which they are shown.

    Raises
    ------
    InputError
        When the file cannot be read.
    """
    with open_file(path) as file:
        unexplained = any(scene.pages > 1 for scene in file.scenes)
        with file.slide(file.first()) as slide:
            channels, height, width = slide.shape
            size = slide.pixel_size_um
            yield "file", str(path)
            yield "size", f"{width:,} x {height:,} px, {slide.dtype}"
            yield "channels", f"{channels}: {', '.join(slide.channel_names)}"
            yield "pixel size", "not known" if size is None else f"{size:.4g} um"
            yield (
                "levels",
                ", ".join(f"{level.shape[1]} x {level.shape[0]}" for level in slide.levels),
            )
            yield "compression", slide.compression
            yield "reader", slide.reader
        if len(file.scenes) > 1:
            yield "scenes", f"{len(file.scenes)}; of the first are the lines above"
            for number, scene in enumerate(file.scenes[:LISTED_SCENES]):
                height, width = scene.size
                named = f"{printable(scene.name, 60) or '?'}, {width:,} x {height:,} px"
                yield f"  scene {number}", f"{named}, {_counts(scene)}"
        else:
            yield "planes", _counts(file.scenes[0])
        if unexplained:
            yield "predict", "needs to be told what the pages are: -s tile.pages=channel, z or t"
        elif max(len(file.scenes), *(scene.t * scene.z for scene in file.scenes)) == 1:
            yield "predict", _images(file, EACH)
        else:
            yield "predict", "needs to be told which planes, by one of these:"
            yield "", f"--planes each          {_images(file, EACH)}"
            if any(scene.z > 1 for scene in file.scenes):
                yield "", f"--planes max           {_images(file, MAX)}"
            for key, several in {
                "scene": len(file.scenes) > 1,
                "t": any(scene.t > 1 for scene in file.scenes),
                "z": any(scene.z > 1 for scene in file.scenes),
            }.items():
                if several:
                    yield "", f"-s tile.{key}=[0]".ljust(23) + "these alone, counted from 0"


def _counts(scene: Scene) -> str:
    counts = {"time points": scene.t, "z planes": scene.z, "pages of no stated kind": scene.pages}
    several = [f"{count} {word}" for word, count in counts.items() if count > 1]
    return " and ".join(several) or "1"


def _images(file: OpenFile, choice: Choice) -> str:
    """How many images these are, and their names."""
    try:
        chosen = file.choose(choice)
    except InputError as error:
        return f"fails: {error}"
    first, last = (plain_name(file.path) + one.suffix for one in (chosen[0], chosen[-1]))
    return f"1 image: {first}" if len(chosen) == 1 else f"{len(chosen)} images: {first} ... {last}"
