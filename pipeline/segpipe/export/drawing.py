"""Pixels and labels as colours: contrast, outlines, one colour per id. Pure functions on arrays."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""(height, width, 3) RGB."""

_LARGE = 60  # pixels of an object that is outlined; smaller ones are filled
_DUST = 4  # when half of the objects have fewer pixels than this, only their density is drawn

_DENSITY = np.array((0, 210, 160), np.float32)
_CHANNELS = np.array(
    [(0, 1, 0), (1, 0, 1), (0, 0.6, 1), (1, 0.7, 0), (1, 0, 0), (0.6, 0.6, 0.6)], np.float32
)
# Hues that neither DAPI's grey nor the pinks and purples of H&E have.
PALETTE = np.array(
    [
        (255, 214, 10), (255, 149, 0), (48, 209, 88), (0, 225, 190), (64, 200, 255),
        (50, 130, 255), (170, 230, 40), (255, 100, 60), (0, 190, 120), (120, 240, 220),
    ],
    np.uint8,
)  # fmt: skip


def contrast(
    pixels: NDArray[Any], ranges: Sequence[tuple[float, float]], rgb: bool, gamma: float = 1.0
) -> Picture:
    """The image as it is shown: (h, w, 3) uint8.

    Parameters
    ----------
    pixels
        (C, h, w), any number type. NaN is shown as `low`.
    ranges
        (low, high) of each channel: what becomes dark and bright; beyond is clipped.
    rgb
        Whether the three channels are red, green and blue. Otherwise one channel is grey, and
        several are added, each in a colour of its own.
    gamma
        Below 1 lifts the dark parts.
    """
    if len(ranges) != len(pixels) or (rgb and len(pixels) != 3):
        raise ValueError(f"{len(pixels)} channels, {len(ranges)} ranges, rgb {rgb} do not match")
    if rgb:
        tints = np.eye(3, dtype=np.float32)
    elif len(pixels) == 1:
        tints = np.ones((1, 3), np.float32)
    else:
        tints = _CHANNELS[np.arange(len(pixels)) % len(_CHANNELS)]
    shares = [
        _share(channel, low, high, gamma)
        for channel, (low, high) in zip(pixels, ranges, strict=True)
    ]
    columns = [tuple(column) for column in tints.T]
    shown = {column: _light(shares, column) for column in columns}  # of grey, all three are one
    return np.stack([shown[column] for column in columns], axis=2)


def _share(channel: NDArray[Any], low: float, high: float, gamma: float) -> NDArray[np.float32]:
    """What of its range each pixel of a channel has: in [0, 1]."""
    span = high - low if high > low else np.inf
    # 16 bits and less are exact in float32, of which a pass takes half as long
    wide = np.float32 if channel.dtype.itemsize <= 2 else np.float64
    share = np.subtract(channel, low, dtype=wide)
    with np.errstate(invalid="ignore"):  # infinite over infinite
        share /= wide(span)
    if channel.dtype.kind == "f":
        np.nan_to_num(share, copy=False, nan=0.0)
    found: NDArray[np.float32] = np.clip(share, 0, 1, out=share).astype(np.float32, copy=False)
    return found if gamma == 1 else found**gamma


def _light(shares: Sequence[NDArray[np.float32]], tint: Sequence[float]) -> NDArray[np.uint8]:
    """One of red, green and blue: (h, w), of channels that have so much of it each."""
    parts = [
        share * np.float32(255 * part) for share, part in zip(shares, tint, strict=True) if part
    ]
    if not parts:
        return np.zeros(shares[0].shape, np.uint8)
    light: NDArray[np.float32] = functools.reduce(np.add, parts)
    light += np.float32(0.5)
    return np.minimum(light, np.float32(255)).astype(np.uint8)


def outline(labels: NDArray[Any]) -> NDArray[np.bool_]:
    """(h, w): pixels of an object with a 4-neighbour that is not of it; the border is no edge."""
    edge = np.zeros(labels.shape, np.bool_)
    vertical, horizontal = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= vertical
    edge[:-1] |= vertical
    edge[:, 1:] |= horizontal
    edge[:, :-1] |= horizontal
    edge &= labels != 0
    return edge


def colours(ids: NDArray[Any]) -> Picture:
    """(n, 3) uint8: the colour of each id, the same in every picture, readable on grey and H&E."""
    mixed = np.asarray(ids).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    chosen: Picture = np.take(PALETTE, (mixed >> np.uint64(33)) % np.uint64(len(PALETTE)), axis=0)
    return chosen


def draw_outlines(display: Picture, labels: NDArray[Any], width: int = 1) -> Picture:
    """A copy of `display` with the objects' outlines, `width` pixels wide, inside the objects."""
    picture, rest = np.ascontiguousarray(display).copy(), labels.copy()
    pixels, left = picture.reshape(-1, 3), rest.reshape(-1)
    for _ in range(width):
        edge = np.flatnonzero(outline(rest))
        pixels[edge] = colours(left[edge])
        left[edge] = 0
    return picture


def draw_overview(display: Picture, labels: NDArray[Any]) -> Picture:
    """A copy of `display`, (h, w, 3), with the objects of `labels`, (h, w), as their size allows.

    Outlines for those of 60 pixels or more, a translucent fill for smaller ones. When half of them
    have fewer than 4 pixels, which a shrunken label image hits or misses by chance, one colour shows
    how dense they are.
    """
    ids, inverse, areas = np.unique(labels, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(labels.shape)
    counts = areas[ids != 0]
    if counts.size and np.median(counts) < _DUST:
        padded = np.pad(labels != 0, 1, mode="edge").astype(np.float32)
        rows = padded[:-2] + padded[1:-1] + padded[2:]
        share = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:])[..., None] * np.float32(0.5 / 9)
        tinted: Picture = (display * (1 - share) + _DENSITY * share + 0.5).astype(np.uint8)
        return tinted
    small = (labels != 0) & (areas < _LARGE)[inverse]
    picture = draw_outlines(display, np.where(small, 0, labels))
    picture[small] = (picture[small] * 0.45 + colours(labels[small]) * 0.55 + 0.5).astype(np.uint8)
    return picture
