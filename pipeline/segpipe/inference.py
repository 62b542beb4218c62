"""Pixels of a region to the probabilities of its cores: window, network, crop, quantise.

The answer that every tiling must reproduce is `crop(network(mirror_pad(image, halo)))` on the
whole image. Per tile:

    pixels --read--> mirror at the image's border --> normalise --> network --> crop --> uint8

A tile's window is that of the mirrored image, all of it, also far beyond a ragged border. So at
such a border a tile reads pixels from further inside than its window reaches (`Tile.read`).
Mirroring the window clipped to the image is not enough: where the last core keeps fewer pixels
than the stride, the last of them look up to stride - 1 further than the halo beyond the image, at
what a mirror of so few pixels gets wrong (1e-3 of the standard deviation for a core of 3 pixels,
depth 3).

Invariant: the bytes of a tile are a function of image, ranges, grid and segmenter; the region that
asks for it does not enter. (Its batch-mates do not either where the segmenter is independent of
them; see `segpipe.segmenter`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from segpipe.errors import InputError, SettingsError
from segpipe.geometry import Box, Tile, TileGrid

Pixels = NDArray[Any]
"""An array of any real dtype."""
Output = TypeVar("Output", bound=np.floating[Any])


class WindowSegmenter(Protocol):
    """What inference needs of a `segpipe.segmenter.Segmenter`."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the K outputs."""

    @property
    def batch(self) -> int:
        """Windows that it likes in one call."""

    def __call__(self, windows: NDArray[np.float32], /) -> NDArray[np.float32]:
        """(N, C, H, W) normalised -> (N, K, H - 2 margin, W - 2 margin) in [0, 1]."""


def normalise(pixels: Pixels, ranges: Sequence[tuple[float, float]]) -> NDArray[np.float32]:
    """(value - low) / (high - low) per channel, not clipped: (..., C, Y, X) float32.

    Subtraction and division are in float64 and rounded to float32 once. So equal values give equal
    bytes whatever their dtype, and whatever tile they are in.

    Parameters
    ----------
    pixels
        (..., C, Y, X) of any real dtype. NaN and infinities become the low value.
    ranges
        (low, high) of each channel. Where they are equal the channel is constant, has no objects,
        and becomes zeros.

    Raises
    ------
    SettingsError
        When there is not one range per channel, or one is not finite or has low above high.
    """
    if len(ranges) != pixels.shape[-3]:
        raise SettingsError(
            f"{len(ranges)} normalisation ranges for an image of {pixels.shape[-3]} channels; "
            "give one [low, high] per channel"
        )
    result = np.zeros(pixels.shape, np.float32)
    for channel, (low, high) in enumerate(ranges):
        if not (np.isfinite(low) and np.isfinite(high) and low <= high):
            raise SettingsError(
                f"normalisation range [{low}, {high}] of channel {channel} must be finite, "
                "its low not above its high"
            )
        if low == high:
            continue
        values = pixels[..., channel, :, :].astype(np.float64)
        if not np.issubdtype(pixels.dtype, np.integer):
            values[~np.isfinite(values)] = low
        # a finite value beyond float32 becomes infinite; `tile_outputs` names the tile it spoils
        with np.errstate(over="ignore"):
            result[..., channel, :, :] = (values - low) / (high - low)
    return result


def quantise(probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Probabilities in [0, 1] -> 0..255, rounded half up: floor(255 p + 1/2)."""
    levels = probabilities * np.float32(255) + np.float32(0.5)
    return levels.astype(np.uint8)  # truncates, which is floor for what is not negative


def read_box_of(grid: TileGrid, region: Box) -> Box:
    """The pixels that the tiles of `region` need: what to read before `predict_region`.

    Examples
    --------
    >>> read_box_of(TileGrid((100, 300), core=32, halo=16, stride=16), Box(0, 64, 64, 128))
    Box(y0=0, x0=48, y1=80, x1=144)

    A last core of 4 rows, whose window is mirrored from further inside:

    >>> read_box_of(TileGrid((100, 300), core=32, halo=16, stride=16), Box(96, 64, 100, 128))
    Box(y0=55, x0=48, y1=100, x1=144)
    """
    boxes = [tile.read for tile in grid.meeting(region)]
    if not boxes:
        raise ValueError(f"region {region} lies outside the image {grid.shape}")
    return Box(
        min(box.y0 for box in boxes),
        min(box.x0 for box in boxes),
        max(box.y1 for box in boxes),
        max(box.x1 for box in boxes),
    )


def predict_region(
    block: Pixels,
    read_box: Box,
    grid: TileGrid,
    region: Box,
    ranges: Sequence[tuple[float, float]],
    segmenter: WindowSegmenter,
    skip: Callable[[Tile], bool] | None = None,
) -> NDArray[np.uint8]:
    """Probabilities of a region: (K, region height, region width) uint8, 255 is certain.

    Parameters
    ----------
    block
        (C, Y, X) raw pixels of `read_box`, any real dtype; not modified.
    read_box
        Where the block lies in the image: at least `read_box_of(grid, region)`.
    grid
        The tiles of the image; halo and stride are the segmenter's.
    region
        Box inside the image.
    ranges
        (low, high) of each channel; see `normalise`.
    segmenter
        Called with up to `segmenter.batch` windows, in the raster order of the tiles.
    skip
        Tells which tiles hold nothing; they are zeros, and the network does not see them.

    Raises
    ------
    InputError
        When the network's answer for a tile is not a number.
    SettingsError
        When a range is not usable, or the segmenter does not take these windows.
    """
    result = np.zeros((len(segmenter.outputs), *region.shape), np.uint8)
    tiles = [tile for tile in grid.meeting(region) if skip is None or not skip(tile)]

    def probabilities(windows: Pixels) -> NDArray[np.float32]:
        return segmenter(normalise(windows, ranges))

    for tile, output in tile_outputs(block, read_box, tiles, probabilities, segmenter.batch):
        part = tile.keep.intersect(region)
        rows, columns = part.within(tile.keep).slices
        y, x = part.within(region).slices
        result[:, y, x] = quantise(output[:, rows, columns])
    return result


def tile_outputs(
    block: Pixels,
    read_box: Box,
    tiles: Iterable[Tile],
    network: Callable[[Pixels], NDArray[Output]],
    batch: int,
) -> Iterator[tuple[Tile, NDArray[Output]]]:
    """Each tile with the network's output on its `keep`: (K, keep height, keep width).

    Parameters
    ----------
    block, read_box
        As in `predict_region`.
    tiles
        In the order in which they fill the batches; their windows have one shape.
    network
        (N, C, H, W) of the block's dtype -> (N, K, H - 2 margin, W - 2 margin), any margin.
    batch
        Most windows in one call.

    Raises
    ------
    InputError
        When an output is not a number: values so large after normalisation that sums overflow.
    """
    if block.shape[-2:] != read_box.shape:
        raise ValueError(f"block of {block.shape[-2:]} pixels for the box {read_box}")
    remaining = iter(tiles)
    while group := list(islice(remaining, batch)):
        windows = np.stack([cut_window(block, read_box, tile) for tile in group])
        outputs = network(windows)
        margin = (windows.shape[-1] - outputs.shape[-1]) // 2
        for tile, output in zip(group, outputs, strict=True):
            y, x = tile.crop.shift(-margin, -margin).slices
            kept = output[:, y, x]
            if np.isnan(kept.min()):
                raise InputError(
                    f"the network's output for the tile at {tile.keep} is not a number: the image "
                    f"holds values up to {np.abs(block).max():.6g} there; give a normalisation "
                    "range [low, high] that fits them, or mend the image"
                )
            yield tile, kept


def cut_window(block: Pixels, read_box: Box, tile: Tile) -> Pixels:
    """A tile's window: (C, window height, window width), mirrored beyond the image's border.

    It equals that part of `numpy.pad(image, ..., mode="reflect")`: the edge pixel is not repeated,
    the mirror repeats where the image is smaller than what is missing, a single pixel is constant.
    """
    if not read_box.contains(tile.read):
        raise ValueError(f"tile {tile.index} reads {tile.read}, beyond the block {read_box}")
    if tile.read == tile.window:
        return block[:, *tile.read.within(read_box).slices]
    rows, columns = _mirrored_window(tile)
    return block.take(rows - read_box.y0, axis=1).take(columns - read_box.x0, axis=2)


def _mirrored_window(tile: Tile) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the image that a tile's window shows."""
    window, (height, width) = tile.window, tile.image.shape
    return (
        mirrored(np.arange(window.y0, window.y1), height),
        mirrored(np.arange(window.x0, window.x1), width),
    )


def mirrored(positions: NDArray[np.intp], size: int) -> NDArray[np.intp]:
    """As `segpipe.geometry.mirror`, of many positions."""
    if size == 1:
        return np.zeros_like(positions)
    places = positions % (2 * (size - 1))
    return np.minimum(places, 2 * (size - 1) - places)
