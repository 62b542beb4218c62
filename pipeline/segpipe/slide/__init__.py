"""Images as people have them; `open_slide` gives a Slide. Only importer of tifffile and readers."""

from __future__ import annotations

from segpipe.slide.channels import list_channels, select_channels
from segpipe.slide.omezarr import is_zarr_folder, list_labels
from segpipe.slide.planes import THE_PLANE, Choice, Chosen, Plane, Scene
from segpipe.slide.remote import address, remote_url
from segpipe.slide.slide import (
    IMAGE_SUFFIXES,
    OpenFile,
    Slide,
    input_fingerprint,
    open_file,
    open_slide,
)
from segpipe.slide.source import Level

__all__ = [
    "IMAGE_SUFFIXES",
    "THE_PLANE",
    "Choice",
    "Chosen",
    "Level",
    "OpenFile",
    "Plane",
    "Scene",
    "Slide",
    "address",
    "input_fingerprint",
    "is_zarr_folder",
    "list_channels",
    "list_labels",
    "open_file",
    "open_slide",
    "remote_url",
    "select_channels",
]
