"""`info`: what a file holds, and what `predict` would make of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from segpipe.errors import InputError, SegpipeError
from segpipe.inputs import Input, choice_of, plain_name
from segpipe.prepare import prepare
from segpipe.settings import Settings
from segpipe.slide import Choice, Chosen, OpenFile, Scene, Slide, address, open_file
from segpipe.slide.source import printable
from segpipe.stages.image import Image

LISTED_SCENES = 12
EACH = Choice(z="each", t="each", scene="each")
MAX = Choice(z="max", t="each", scene="each")


@dataclass(frozen=True)
class Description:
    """What is in a file. `slide` describes the first of several planes or scenes.

    choices
        Options that say which planes are wanted, each with what it gives; empty where that is said,
        or there is only one.
    planes
        Those that are wanted; the first is what `predicted` tells of.
    predicted
        The image as `predict` would work on it, or why it would not; None where `choices` come first.
    """

    path: Path
    slide: Slide
    scenes: tuple[Scene, ...]
    choices: dict[str, str]
    planes: tuple[Chosen, ...]
    predicted: Image | str | None

    @property
    def images(self) -> str:
        """How many images it becomes, and their names."""
        return _named(self.path, self.planes)

    def to_json(self) -> dict[str, Any]:
        """For machines; sizes in pixels."""
        slide, image = self.slide, self.predicted
        height, width = slide.shape[1:]
        predict: dict[str, Any] = {"choices": self.choices} if self.choices else {}
        if isinstance(image, str):
            predict["error"] = image
        elif image is not None:
            worked = image.layout.plane
            predict |= {
                "images": [plain_name(self.path) + plane.suffix for plane in self.planes],
                "model": image.model.card.name,
                "why": image.chosen,
                "channels": list(image.layout.channels),
                "tiles": len(image.tiles),
                "height": worked[0],
                "width": worked[1],
                "scale": image.scale,
                "level": image.layout.resolution.level,
                "resampled": image.layout.resolution.resampled,
            }
        return {
            "file": address(self.path),
            "height": height,
            "width": width,
            "dtype": slide.dtype.name,
            "channels": list(slide.channel_names),
            "rgb": slide.rgb,
            "pixel_size_um": slide.pixel_size_um,
            "pixel_size_from": slide.pixel_size_from or None,
            "levels": [
                {"height": level.shape[0], "width": level.shape[1], "downsample": level.downsample}
                for level in slide.levels
            ],
            "compression": slide.compression,
            "reader": slide.reader,
            "scenes": [
                {
                    "name": scene.name,
                    "height": scene.size[0],
                    "width": scene.size[1],
                    "t": scene.t,
                    "z": scene.z,
                    "pages": scene.pages,
                }
                for scene in self.scenes
            ],
            "left_out": list(slide.left_out),
            "warnings": list(slide.warnings),
            "predict": predict,
        }

    def lines(self) -> Iterator[tuple[str, str]]:
        """Keys and values, in the order in which they are shown."""
        slide = self.slide
        channels, height, width = slide.shape
        size = slide.pixel_size_um
        yield "file", printable(address(self.path), 4096)
        yield "size", f"{width:,} x {height:,} px, {slide.dtype}"
        names = ", ".join(printable(name, 60) for name in slide.channel_names)
        yield "channels", f"{channels}: {names}"
        yield (
            "pixel size",
            "not known" if size is None else f"{size:.4g} um, by {slide.pixel_size_from}",
        )
        yield (
            "levels",
            ", ".join(
                f"{level.shape[1]:,} x {level.shape[0]:,} (1/{level.downsample:g})"
                for level in slide.levels
            ),
        )
        yield "compression", slide.compression
        yield "reader", slide.reader
        if slide.left_out:
            yield "left out", ", ".join(slide.left_out)
        for warning in slide.warnings:
            yield "warning", warning
        if len(self.scenes) > 1:
            yield "scenes", f"{len(self.scenes)}; of the first are the lines above"
            for number, scene in enumerate(self.scenes[:LISTED_SCENES]):
                named = (
                    f"{printable(scene.name, 60) or '?'}, {scene.size[1]:,} x {scene.size[0]:,} px"
                )
                yield f"  scene {number}", f"{named}, {_counts(scene)}"
        else:
            yield "planes", _counts(self.scenes[0])
        yield from self._predict_lines()

    def _predict_lines(self) -> Iterator[tuple[str, str]]:
        image = self.predicted
        if self.choices:
            yield "predict", "needs to be told which planes, by one of these:"
            for option, gives in self.choices.items():
                yield "", f"{option:<23}{gives}"
        elif isinstance(image, str):
            yield "predict", f"fails: {image}"
        elif image is not None:
            why = f" ({image.chosen})" if image.chosen else ""
            yield "predict", self.images
            yield "  model", f"{image.model.card.name}{why}"
            seen = [printable(image.layout.channel_names[n], 60) for n in image.layout.channels]
            yield "  sees", ", ".join(seen)
            worked, resolution = image.layout.plane, image.layout.resolution
            how = "resampled from" if resolution.resampled else "which is"
            yield (
                "  works on",
                "the full resolution"
                if image.scale == 1.0
                else f"{worked[1]:,} x {worked[0]:,} px, {how} level {resolution.level}",
            )
            yield "  tiles", f"{len(image.tiles):,}"


def describe(
    paths: Sequence[Path], settings: Settings
) -> tuple[list[Description], list[InputError]]:
    """What is in the files, and what is wrong with those that cannot be read.

    Raises
    ------
    SettingsError, ModelError
        As `prepare`.
    """
    found: list[Description] = []
    failed: list[InputError] = []
    for path in paths:
        try:
            found.append(_read(path, choice_of(settings.tile)))
        except InputError as error:
            failed.append(error)
    return _predicted(found, settings), failed


def _read(path: Path, choice: Choice) -> Description:
    with open_file(path) as file:
        choices = _choices(file) if choice == Choice() else {}
        planes: tuple[Chosen, ...] = ()
        error = None
        if not choices:
            try:
                planes = file.choose(choice)
            except InputError as found:
                error = _without_name(path, found)
        first = planes[0].plane if planes else file.first()
        with file.slide(first) as slide:
            return Description(path, slide, file.scenes, choices, planes, error)


def _predicted(found: list[Description], settings: Settings) -> list[Description]:
    """The descriptions with what `predict` would do with their first planes: to `prepare` them."""
    wanted = [
        Input(str(number), one.path, one.planes[0].plane)
        for number, one in enumerate(found)
        if one.planes
    ]
    if not wanted:
        return found
    with tempfile.TemporaryDirectory(prefix="segpipe-info-") as temporary:
        out = Path(temporary)
        (out / "manifests").mkdir()
        prepared = prepare(wanted, out, settings)
    told: dict[str, Image | str] = {image.name: image for image in prepared.images}
    told |= {bad.name: _without_name(bad.source, error) for bad, error in prepared.failed}
    return [
        replace(one, predicted=told.get(str(number), one.predicted))
        for number, one in enumerate(found)
    ]


def _without_name(path: Path, error: SegpipeError) -> str:
    """The error without the name of the file, which stands above it."""
    return str(error).removeprefix(f"{printable(path.name)}: ")


def _choices(file: OpenFile) -> dict[str, str]:
    """Options that say which planes are wanted, each with what it gives; none for one plane."""
    scenes = file.scenes
    if any(scene.pages > 1 for scene in scenes):
        pages = max(scene.pages for scene in scenes)
        return {
            "-s tile.pages=channel": f"the {pages} pages are channels",
            "-s tile.pages=z": "they are z planes (add --planes each or max)",
            "-s tile.pages=t": "they are time points (add --planes each)",
        }
    if max(len(scenes), *(scene.t * scene.z for scene in scenes)) == 1:
        return {}
    choices = {"--planes each": _images(file, EACH)}
    if any(scene.z > 1 for scene in scenes):
        choices["--planes max"] = _images(file, MAX)
    for key, several in {
        "scene": len(scenes) > 1,
        "t": any(scene.t > 1 for scene in scenes),
        "z": any(scene.z > 1 for scene in scenes),
    }.items():
        if several:
            choices[f"-s tile.{key}=[0]"] = "these alone, counted from 0"
    return choices


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
    return _named(file.path, chosen)


def _named(path: Path, chosen: Sequence[Chosen]) -> str:
    first, last = (plain_name(path) + one.suffix for one in (chosen[0], chosen[-1]))
    return f"1 image: {first}" if len(chosen) == 1 else f"{len(chosen)} images: {first} ... {last}"
