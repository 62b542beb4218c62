"""At which resolution an image is worked on: settings, model and file together."""

from __future__ import annotations

from collections.abc import Sequence

from segpipe.models.card import ModelCard
from segpipe.resampling import Resolution, Wish, choose_resolution, wanted_scale
from segpipe.settings import TileSettings
from segpipe.slide import Level


def resolution_of(
    tile: TileSettings, card: ModelCard, pixel_size_um: float | None, levels: Sequence[Level]
) -> Resolution:
    """The resolution for an image with these levels, whose file states this pixel size.

    Raises
    ------
    SettingsError, InputError
        As `segpipe.resampling.wanted_scale`.
    """
    wish = Wish(
        factor=tile.scale,
        diameter_px=tile.diameter,
        pixel_size_um=tile.pixel_size_um or pixel_size_um,
        model=card.name,
        model_diameter_px=card.object_diameter_px,
        model_pixel_size_um=card.pixel_size_um,
    )
    return choose_resolution(
        [level.shape for level in levels],
        [level.downsample for level in levels],
        wanted_scale(wish),
    )
