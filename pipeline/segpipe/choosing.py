"""`--model auto`: which of the shipped models an image is for, by its channels and its ground.

One channel, or channels that were chosen, are taken for fluorescence. Colours are looked at, because a
picture of fluorescence is often stored as RGB, and its header does not tell it from stained tissue:

                ground dark                                 ground bright
    grey        nuclei-fluorescence, on one of the three    refused: brightfield without stain
    one colour  nuclei-fluorescence, on that colour         nuclei-he
    colours     refused: which colour shows the nuclei?     nuclei-he

The ground is the median of the brightest colour of each pixel. Of the 616 images of DSB 2018 it is at
most 0.17 of full scale in fluorescence, and at least 0.76 in histology and brightfield.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from segpipe.errors import InputError
from segpipe.geometry import Box
from segpipe.settings import Settings
from segpipe.slide import Slide

FLUORESCENCE = "nuclei-fluorescence"
HE = "nuclei-he"
AUTO_MODELS = (FLUORESCENCE, HE)
"""The shipped models among which `auto` chooses."""

PLACES, SIDE = 3, 256
"""An image is looked at in 3 x 3 squares of so many pixels, spread over it."""
DARK = 0.4
"""Of full scale: a ground below it is dark."""
GREY = 8 / 255
"""Of full scale: colours that differ by no more are one grey; JPEG makes up to 5 of 255 of them."""
BLANK = 0.1
"""Of full scale: a bright grey image with less contrast may be the bare glass of a slide."""

COLOURS = ("red", "green", "blue")
ALONE = 0.05
"""Of the contrast of the brightest colour: what the others of a picture of one colour have at most."""

Kind = Literal["dark grey", "dark", "bright grey", "bright"]


@dataclass(frozen=True)
class Choice:
    """A shipped model for an image, and why.

    channels
        Those that the model is to read, where the settings name none and it does not read all.
    """

    model: str
    why: str
    channels: tuple[int, ...] | None = None


def auto_model(*, rgb: bool) -> str:
    """The shipped model that `auto` takes for channels that are, or are not, those of a photograph."""
    return HE if rgb else FLUORESCENCE


def choose_model(slide: Slide, settings: Settings) -> Choice:
    """The shipped model for an image; a small part of an RGB image is read.

    Raises
    ------
    InputError
        When no shipped model is for it, or when what it shows must be told; when it cannot be read.
    """
    if settings.tile.channel is not None:
        return Choice(FLUORESCENCE, "the channel that was chosen")
    if not slide.rgb:
        return Choice(FLUORESCENCE, "channels are not colours")
    return choose_for_colours(_sample(slide), slide.dtype, settings, slide.path.name)


def choose_for_colours(
    colours: NDArray[Any], dtype: np.dtype[Any], settings: Settings, name: str
) -> Choice:
    """The shipped model for an image in red, green and blue.

    Parameters
    ----------
    colours
        (3, ...) pixels of it.
    dtype, name
        Of the image; the name is for messages.

    Raises
    ------
    InputError
        As `choose_model`.
    """
    own = "or name a model (--model)"
    kind = look(colours, dtype)
    if kind == "dark grey":
        return Choice(FLUORESCENCE, "grey on a dark ground, stored as RGB", (0,))
    if kind == "dark":
        brightest, alone = _brightest(colours)
        if alone:
            why = f"{COLOURS[brightest]} alone on a dark ground, stored as RGB"
            return Choice(FLUORESCENCE, why, (brightest,))
        raise InputError(
            f"{name}: an RGB image whose ground is dark, which {HE} is not for; if it is fluorescence "
            f"stored in colours, choose that of the nuclei (--channel {COLOURS[brightest]}?) for "
            f"{FLUORESCENCE}, {own}"
        )
    if kind == "bright grey":
        raise InputError(
            f"{name}: an RGB image that is grey on a bright ground, as brightfield without stain, and "
            f"no shipped model is for it; name a model (--model), {HE} if it is stained"
        )
    if dtype != np.uint8 and settings.infer.normalise is None:
        raise InputError(
            f"{name}: RGB of {dtype}, and {HE} was trained on 8 bits; say what is black and white with "
            f"-s infer.normalise=[low,high], {own}"
        )
    return Choice(HE, "colours on a bright ground")


def look(colours: NDArray[Any], dtype: np.dtype[Any]) -> Kind:
    """What red, green and blue, (3, ...), look like: see the table at the top of the module."""
    values = np.nan_to_num(colours.reshape(3, -1).astype(np.float64), posinf=0.0, neginf=0.0)
    full = np.iinfo(dtype).max if dtype.kind == "u" else max(1.0, values.max(initial=0))
    brightest, darkest = values.max(axis=0) / full, values.min(axis=0) / full
    ground = float(np.median(brightest))
    grey = float(np.percentile(brightest - darkest, 99.5)) <= GREY
    if ground < DARK:
        return "dark grey" if grey else "dark"
    blank = ground - float(np.percentile(darkest, 1)) < BLANK
    return "bright grey" if grey and not blank else "bright"


def _brightest(colours: NDArray[Any]) -> tuple[int, bool]:
    """The colour that stands out most, and whether the others hardly do."""
    values = np.nan_to_num(colours.reshape(3, -1).astype(np.float64), posinf=0.0, neginf=0.0)
    contrast = np.percentile(values, 99.8, axis=1) - np.median(values, axis=1)
    brightest = int(np.argmax(contrast))
    others = np.delete(contrast, brightest)
    return brightest, bool(contrast[brightest] > 0 and others.max() <= ALONE * contrast[brightest])


def _sample(slide: Slide) -> NDArray[Any]:
    """(3, n): pixels of squares spread over the image; a damaged one is left out."""
    height, width = slide.shape[1:]
    parts: list[NDArray[Any]] = []
    damage: InputError | None = None
    for y in _starts(height):
        for x in _starts(width):
            box = Box(y, x, min(height, y + SIDE), min(width, x + SIDE))
            try:
                parts.append(slide.read(box).reshape(3, -1))
            except InputError as error:
                damage = error
    if damage is not None and not parts:
        raise damage
    return np.concatenate(parts, axis=1)


def _starts(length: int) -> list[int]:
    """Where squares begin along an axis, in the middles of equal parts; each place once."""
    middles = ((2 * place + 1) * length // (2 * PLACES) for place in range(PLACES))
    return sorted({max(0, min(middle - SIDE // 2, length - SIDE)) for middle in middles})
