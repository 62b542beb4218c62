"""The size of a pixel: one that somebody stated and that a microscope can have, or none.

It is never guessed. What is stated and absurd (0, negative, a metre) is told and not believed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from segpipe.slide.source import PixelSize, unusable

SAME = 0.01
"""Pixel sizes along y and x that differ by no more than this part are one pixel size."""

STATED_UM = (1e-4, 1e3)
"""What is believed when it is stated: from an electron microscope to a photograph of a dish."""

UM_PER_UNIT = {
    name: size
    for size, names in (
        (1e-4, ("angstrom", "å")),
        (1e-3, ("nm", "nanometer", "nanometre")),
        (1.0, ("um", "µm", "μm", "\\u00b5m", "micron", "microns", "micrometer", "micrometre")),
        (1e3, ("mm", "millimeter", "millimetre")),
        (1e4, ("cm", "centimeter", "centimetre")),
        (1e6, ("m", "meter", "metre")),
        (25_400.0, ("in", "inch")),
    )
    for name in names
}
"""Micrometres a unit, by its name in lower case."""


def stated_pixel(path: Path, y_um: float | None, x_um: float | None, origin: str) -> PixelSize:
    """Mean of both sides of a pixel; without a size when one side is not stated, or is absurd.

    Raises
    ------
    InputError
        When the sides differ by more than `SAME`: an object's shape and area would be wrong.
    """
    if y_um is None or x_um is None:
        return PixelSize()
    low, high = STATED_UM
    sides = f"{y_um:.4g} x {x_um:.4g} um (y, x)"
    if not (low <= y_um <= high and low <= x_um <= high):  # nan too
        return PixelSize(
            warnings=(
                f"{origin} states pixels of {sides}, which no microscope has: the pixel size is "
                "taken for unknown; state it with --pixel-size",
            )
        )
    if max(y_um, x_um) > min(y_um, x_um) * (1 + SAME):
        raise unusable(
            path,
            f"has pixels of {sides}, which are not square",
            "resample it to square pixels, or correct its pixel size",
        )
    return PixelSize((y_um + x_um) / 2, origin)


def first_stated(sizes: Iterable[PixelSize]) -> PixelSize:
    """The first that has a size, with what was not believed before it."""
    warnings: tuple[str, ...] = ()
    for size in sizes:
        warnings += size.warnings
        if size.um is not None:
            return PixelSize(size.um, size.origin, warnings)
    return PixelSize(warnings=warnings)


def number(text: object) -> float | None:
    """The number that a text is; nan when it is none; None when there is no text."""
    if text is None or text == "":
        return None
    try:
        return float(str(text).strip().replace(",", "."))
    except ValueError:
        return math.nan
