"""Images as people have them; `open_slide` gives a Slide. Only importer of tifffile and readers."""

from __future__ import annotations

from segpipe.slide.omezarr import is_zarr_folder
from segpipe.slide.slide import (
    IMAGE_SUFFIXES,
    Slide,
    input_fingerprint,
    open_slide,
    select_channels,
)

__all__ = [
    "IMAGE_SUFFIXES",
    "Slide",
    "input_fingerprint",
    "is_zarr_folder",
    "open_slide",
    "select_channels",
]
