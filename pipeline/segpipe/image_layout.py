"""The layout of an image: what opening its file told, and whether OUT is to hold a copy."""

from __future__ import annotations

import math

from segpipe.choosing import Choice
from segpipe.errors import InputError
from segpipe.resampling import Resolution
from segpipe.settings import Settings
from segpipe.slide import Slide, remote_url, select_channels
from segpipe.slide.source import printable
from segpipe.stages.image import Layout, Model
from segpipe.stages.resolution import resolution_of

LARGE_COPY_BYTES, MANY_TIMES = 4_000_000_000, 5
"""An image is read where it is when its pixels are more bytes than this, and so many times the file."""
LARGE_ZARR_BYTES = 1_000_000_000
"""An OME-Zarr of more bytes of pixels than this is read where it is, when its chunks suit: a copy would
be what is there already. Of less it is cheap, and OUT then holds all that viewers want."""
SUITABLE_CHUNK = 128, 2048
"""Pixels a side: of smaller chunks there are too many, larger ones are decoded for too many regions."""


def layout_of(
    slide: Slide, settings: Settings, model: Model, choice: Choice | None, fingerprint: str
) -> Layout:
    """The layout of an image for a model.

    Parameters
    ----------
    choice
        Why the model was chosen, and for which channels, where that was left to segpipe.
    fingerprint
        Of the file.

    Raises
    ------
    InputError
        When channels or resolution are not ones that the model can work on.
    """
    wanted = choice.channels if choice and choice.channels else settings.tile.channel
    channels = select_channels(slide, wanted, len(model.card.channels))
    try:
        resolution = resolution_of(settings.tile, model.card, slide.pixel_size_um, slide.levels)
    except InputError as error:
        raise InputError(f"{printable(slide.path.name)}: {error}") from None
    return Layout(
        (slide.shape[0], *resolution.shape),
        (slide.shape[1], slide.shape[2]),
        resolution,
        slide.dtype.name,
        tuple(channels),
        tuple(slide.channel_names),
        slide.rgb,
        settings.tile.pixel_size_um or slide.pixel_size_um,
        fingerprint,
        copied=_is_copied(slide, settings, resolution),
        warnings=slide.warnings,
    )


def _is_copied(slide: Slide, settings: Settings, resolution: Resolution) -> bool:
    """Whether OUT is to hold the image at the working resolution.

    By `auto`, it is not where a copy would be large and many times the file, or of an OME-Zarr of
    suitable chunks, and reading the file is as good: a level of a pyramid as it is, on this machine's
    own file system.
    """
    if settings.tile.copy != "auto":
        return settings.tile.copy == "always"
    if resolution.resampled or len(slide.levels) < 2 or remote_url(slide.path) is not None:
        return True
    pixels = math.prod(resolution.shape)
    size = slide.shape[0] * pixels * slide.dtype.itemsize
    if not slide.path.is_file():
        least, most = SUITABLE_CHUNK
        suits = slide.chunk is not None and all(least <= side <= most for side in slide.chunk)
        return not suits or size < LARGE_ZARR_BYTES
    stored = slide.path.stat().st_size
    return size < LARGE_COPY_BYTES or size < MANY_TIMES * stored
