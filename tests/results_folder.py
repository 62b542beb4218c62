"""An OUT as a run leaves it, made of arrays in memory: for what reads results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from segpipe import store
from segpipe.columns import Frame, instance_columns
from segpipe.export.parquet import TableWriter
from segpipe.geometry import Box
from segpipe.properties import ObjectSums, sum_region
from segpipe.records import read_json, write_json
from segpipe.stages.image import STAGES
from segpipe.stages.manifest import Manifest
from segpipe.stages.places import manifest_path

Array = np.ndarray[Any, np.dtype[Any]]


def add_image(
    out: Path,
    name: str,
    pixels: Array,
    labels: Array | None,
    *,
    grid: tuple[int, int] = (256, 128),
    ranges: list[tuple[float, float]] | None = None,
    pixel_size_um: float | None = None,
    rgb: bool = False,
    failed: tuple[dict[str, Any], ...] = (),
    finest: int = 0,
    scale: float = 1.0,
    classes: tuple[str, ...] = (),
) -> None:
    """Add an image to an OUT; without labels it is one whose run has come as far as `tile`.

    Parameters
    ----------
    pixels
        (C, Y, X).
    labels
        (Y, X) uint32.
    grid
        Sizes of shards and of chunks.
    finest
        The first level that there is of the image, which was not copied where it is above 0.
    scale
        Full-resolution pixels for each pixel of `pixels`.
    classes
        What the labels stand for where they are no objects.
    """
    channels = ["red", "green", "blue"] if rgb else [f"channel {n}" for n in range(len(pixels))]
    path, shape = out / f"{name}.ome.zarr", store.Grid.fitting(pixels.shape[1:], *grid)
    path.parent.mkdir(parents=True, exist_ok=True)
    store.create_image(
        path,
        channels,
        shape,
        pixels.dtype,
        pixel_size_um=pixel_size_um,
        name=name,
        rgb=rgb,
        scale=scale,
        finest=finest,
    )
    if ranges:
        store.set_contrast(path, range(len(pixels)), ranges)
    _write_pyramid(path, shape, pixels, store.halve_mean, finest)
    stages = STAGES[:1]
    if labels is not None:
        stages = STAGES
        store.create_labels(path, shape, pixel_size_um=pixel_size_um, scale=scale, classes=classes)
        _write_pyramid(path / store.LABEL_GROUP, shape, labels, store.halve_nearest)
        sums = sum_region(labels, np.full(labels.shape, 200, np.uint8), Box(0, 0, *labels.shape))
        size = "" if pixel_size_um is None else repr(pixel_size_um)
        with TableWriter(out / f"{name}.parquet", {"pixel_size_um": size}, {}) as writer:
            for start in range(0, max(len(sums), 1), 3):  # several groups of rows
                rows = ObjectSums.of_rows(sums[start : start + 3]).closed()
                full = (round(labels.shape[0] * scale), round(labels.shape[1] * scale))
                frame = Frame(labels.shape, full, pixel_size_um, scale)
                writer.write(instance_columns(rows, frame))
    for stage in stages:
        objects = 0 if labels is None else len(np.unique(labels[labels > 0]))
        facts = {"objects": objects, "scale": scale, "image": {"classes": list(classes)}}
        made = Manifest(stage, "f", "t", failed if stage == stages[-1] else (), facts)
        made.write(manifest_path(out, name, stage))
    know(out, name)


def know(out: Path, name: str, **entry: Any) -> None:
    """Give a name in OUT; with an entry, run.json has it."""
    registry, run = out / "manifests" / "images.json", out / "run.json"
    write_json(registry, {**(content_of(registry)), name: f"/images/{name}.tif"})
    if entry:
        images = content_of(run).get("images", {})
        write_json(run, {"images": {**images, name: {"source": name, **entry}}})


def content_of(path: Path) -> dict[str, Any]:
    """Content of a JSON file; nothing when it is not there."""
    return dict(read_json(path) or {})


def discs(shape: tuple[int, int], pitch: int = 40) -> Array:
    """(Y, X) uint32: a disc of its own id in each square of `pitch` pixels; some lie across tiles."""
    y, x = np.indices(shape)
    columns = -(-shape[1] // pitch)
    inside = (y % pitch - pitch / 2) ** 2 + (x % pitch - pitch / 2) ** 2 < (0.4 * pitch) ** 2
    return np.where(inside, 1 + (y // pitch) * columns + x // pitch, 0).astype(np.uint32)


def _write_pyramid(
    path: Path, grid: store.Grid, pixels: Array, halve: Any, finest: int = 0
) -> None:
    for level in range(len(grid.levels)):
        height, width = grid.level(level).shard
        for y in range(0, pixels.shape[-2] if level >= finest else 0, height):
            for x in range(0, pixels.shape[-1], width):
                part = pixels[..., y : y + height, x : x + width]
                box = Box(y, x, y + part.shape[-2], x + part.shape[-1])
                store.write_shard(path / str(level), box, part)
        pixels = halve(pixels)
