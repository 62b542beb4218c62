"""The picture of an image: which pixels and labels it shows."""

from __future__ import annotations

from typing import Any

import numpy as np

from segpipe.export import preview
from segpipe.export.drawing import contrast
from segpipe.export.png import write_jpeg, write_png
from segpipe.geometry import Box
from segpipe.resampling import full_box
from segpipe.stages.image import Image
from segpipe.stages.manifest import Manifest
from segpipe.stages.reading import pixels_in, read_coarse
from segpipe.stages.tile import ranges_of
from segpipe.store import LABEL_GROUP, read_box

Array = np.ndarray[Any, np.dtype[Any]]


def write_preview(
    image: Image, tiled: Manifest, before: Manifest, busiest: tuple[int, int]
) -> None:
    """The whole image from the pyramid, and a detail around the pixel with most objects."""
    layout = image.layout
    if layout.rgb:
        channels: tuple[int, ...] = (0, 1, 2)
        top = {"uint8": 255.0, "uint16": 65535.0}.get(layout.dtype, 1.0)
        ranges = [(0.0, top)] * 3
    else:
        channels, ranges = layout.channels, ranges_of(tiled)
    plan = preview.Plan.of(layout.plane)
    level = min(plan.step.bit_length(), len(image.grid.levels)) - 1

    def view(number: int, box: Box) -> preview.View:
        """Part of a level; the box is in that level's pixels."""
        if number == 0:
            pixels = pixels_in(image, box, channels)
        elif number < image.finest:  # the picture needs no more than the level that there is
            pixels = read_coarse(image, number, box)[list(channels)]
        else:
            pixels = read_box(image.zarr / str(number), box, channels)
        labels = read_box(image.zarr / LABEL_GROUP / str(number), box)
        working = Box(*(value << number for value in (box.y0, box.x0, box.y1, box.x1)))
        if working.contains(Box(0, 0, *layout.plane)):
            shown = Box(
                0, 0, *layout.full_shape
            )  # of a pyramid's level the last rows may be lacking
        else:
            shown = full_box(working, image.scale, layout.full_shape)
        return preview.View(contrast(pixels, ranges, layout.rgb), labels, shown)

    corner = (
        max(0, min(centre - length // 2, size - length))
        for centre, length, size in zip(busiest, plan.detail, layout.plane, strict=True)
    )
    failed = (*tiled.failed, *before.failed)
    caption = preview.Caption(
        image.name,
        before.facts["objects"],
        layout.pixel_size_um,
        [f"model {image.model.card.name}"] + ([f"{len(failed)} REGIONS FAILED"] if failed else []),
        image.model.card.classes,
    )
    whole, part = Box(0, 0, *image.grid.levels[level]), Box(0, 0, *plan.detail).shift(*corner)
    overview = view(level, whole)
    detail = overview if level == 0 and part == whole else view(0, part)
    picture = preview.compose(overview, detail, caption)
    write_png(image.preview, picture)
    write_jpeg(image.thumbnail, preview.thumbnail_of(picture))
