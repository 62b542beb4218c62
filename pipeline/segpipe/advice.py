"""What images leave to be decided: which keys of their project to set, to fill in, or to leave.

Nothing is chosen that the headers do not tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from segpipe.choosing import auto_model
from segpipe.geometry import Lattice
from segpipe.numeric_plan import REGION_ON_CPU
from segpipe.results import counted
from segpipe.settings import AUTO
from segpipe.slide.source import printable
from segpipe.survey import LISTED, SeenImage, Survey

NUCLEI = re.compile(
    r"(?<![a-z])(dapi|hoechst|draq ?[57]|sytox|to-?pro|sir-?dna|h2b|nuclei|nucleus)(?![a-z])|^dna$",
    re.IGNORECASE,
)
"""Names of channels that show nuclei: stains of DNA, and plain words."""

BATCH_PIXELS = 200_000_000
"""Pixels of a job of the workflow: minutes of work, against the seconds that it takes to start."""

FEW = 10
"""Images of a batch that would not be worth a word."""


@dataclass(frozen=True)
class Advice:
    """What to do with a key: set it, leave it to be filled in, or leave its default.

    Attributes
    ----------
    told
        In a few words; the comment above the key begins with it.
    more
        The rest of the comment.
    listed
        Lines below it.
    """

    key: str
    kind: Literal["set", "fill in", "default"]
    told: str = ""
    more: str = ""
    listed: Sequence[str] = ()
    value: Any = None


def advise(found: Survey) -> list[Advice]:
    """What to do with the keys that depend on the images, in the order of the settings."""
    return [
        _model(found),
        _batch(found),
        _region(found),
        _channel(found),
        _pixel_size(found),
        *_planes(found),
    ]


def _model(found: Survey) -> Advice:
    grey, colour = auto_model(rgb=False), auto_model(rgb=True)
    keep = "Name it, or the path of your own model, to keep to one."
    if found.rgb == len(found.images):
        why = f"auto is {colour} here: it takes RGB images of stained tissue."
        more = (
            "For fluorescence that was stored in colours, set tile.channel to the colour of the nuclei: "
            f"{grey} takes that."
        )
        return Advice("model", "set", why, more, value=AUTO)
    why = f"auto is {grey} here: it takes one channel of fluorescence."
    if not found.rgb:
        return Advice("model", "set", why, keep, value=AUTO)
    files = sorted({printable(image.source.name, 40) for image in found.images if image.rgb})
    some = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
    more = f"But {colour} for RGB: {found.rgb} of {counted(len(found.images), 'image')} ({some}). {keep}"
    return Advice("model", "set", why, more, value=AUTO)


def _batch(found: Survey) -> Advice:
    each = found.pixels / found.planes
    batch = min(found.planes, int(BATCH_PIXELS // each))
    if batch < FEW:
        return Advice("batch", "default")
    told = (
        f"Images of one job of the workflow: with {each / 1e6:.2g} megapixels an image, a job of one "
        "would start for longer than it works. predict has no need of it."
    )
    return Advice("batch", "set", told, value=batch)


def _region(found: Survey) -> Advice:
    regions = len(Lattice(found.largest.size, (REGION_ON_CPU, REGION_ON_CPU)))
    told = (
        f"On a CPU the largest image is {regions:,} regions: processes share them, and an interruption "
        "costs those at work, no more."
        if regions > 1
        else "Each image is one region: processes share images."
    )
    return Advice("tile.region", "default", told)


def _channel(found: Survey) -> Advice:
    images = [image for image in found.images if not image.rgb]
    several = sum(len(image.channels) > 1 for image in images)
    if not several:
        others = "the others have" if found.rgb else "each image has"
        told = f"Nothing to choose: {others} one channel." if images else ""
        if found.rgb:
            told = f"A name, such as blue, would take one colour of RGB images. {told}".strip()
        return Advice("tile.channel", "default", told)
    listed = found.told_channels()
    channel = nuclear_channel(found.images)
    if channel is not None:
        told = "Chosen because its name is one of nuclei. There are:"
        return Advice("tile.channel", "set", told, listed=listed, value=channel)
    named = dict.fromkeys(
        name for image in images for name in image.channels if NUCLEI.search(name)
    )
    like = ", ".join(printable(name, 40) for name in list(named)[:LISTED])
    return Advice(
        "tile.channel",
        "fill in",
        "which channel shows the nuclei, by name or number.",
        f"Names do not tell one for all images{f' (like nuclei: {like})' if like else ''}. Where none "
        "fits all, give those that differ a project of their own. There are:",
        listed,
    )


def nuclear_channel(images: Iterable[SeenImage]) -> str | int | None:
    """The channel of nuclei in all images, by name or else by number; None when that is not certain.

    Of one channel there is nothing to choose. A number would take a colour of an RGB image, which a
    name does not.
    """
    names, numbers, rgb = [], [], False
    for image in images:
        if image.rgb:
            rgb = True
            continue
        found = [number for number, name in enumerate(image.channels) if NUCLEI.search(name)]
        if len(image.channels) == 1:
            found = [0]
        if len(found) != 1:
            return None
        numbers.append(found[0])
        names.append(image.channels[found[0]])
    if len({name.lower() for name in names}) == 1:
        return names[0]
    return numbers[0] if len(set(numbers)) == 1 and not rgb else None


def _pixel_size(found: Survey) -> Advice:
    if all(image.pixel_size_um is None for image in found.images):
        told = (
            "No file says it: results are in pixels, and columns in um stay empty, unless you do."
        )
    else:
        told = (
            f"The files say {found.told_pixel_sizes()}. A value here replaces what all of them say."
        )
    return Advice("tile.pixel_size_um", "default", told)


_PLANES = {
    "z": (
        "z planes",
        "max: their maximum, which sees each nucleus once and fuses those that lie above one another; "
        "the usual one to count nuclei. each: every plane is an image. [3, 10]: some, counted from 0.",
    ),
    "t": ("time points", "each: every one is an image. [0, 10]: some, counted from 0."),
    "scene": (
        "scenes",
        "each: every one is an image. [0, 2]: some, counted from 0; `segpipe info FILE` lists them.",
    ),
    "pages": (
        "pages of no stated kind",
        "They are z, t or channel. If z or t, say above, at that key, which become images.",
    ),
}


def _planes(found: Survey) -> Iterator[Advice]:
    for key, (what, choices) in _PLANES.items():
        counts = found.counts(key)
        if not counts:
            yield Advice(f"tile.{key}", "default")
            continue
        span = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
        noun = "file" if key == "scene" else "image"
        told = f"{span} {what} in {counted(len(counts), noun)}."
        yield Advice(f"tile.{key}", "fill in", told, choices)
