"""Exact percentiles of an image that is never in memory: histograms of integer keys.

A percentile is an order statistic, never interpolated: the smallest value that at least q per cent
of the pixels do not exceed (R. Hyndman and Y. Fan 1996, definition 1). Pixels are counted in
squares of a core's size, over occupied squares only, so the cuts between regions do not show. One is
occupied when it is not constant: the empty glass or the black rim of a mosaic says nothing about
the stain. Counts add, so the order of tiles does not matter either.

Integers up to 16 bits are their own keys. A float32 has a 32-bit key in the order of its values;
one pass counts the upper halves, a second one the lower halves of the few that matter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Histogram:
    """How often each key occurs: `keys` ascending and different, `counts` int64."""

    keys: Array
    counts: Array

    @classmethod
    def of(cls, keys: Array) -> Histogram:
        """Of keys below 2**16."""
        counts = np.bincount(keys.ravel(), minlength=0).astype(np.int64)
        present = np.flatnonzero(counts)
        return cls(present, counts[present])

    @classmethod
    def sum(cls, parts: Iterable[Histogram]) -> Histogram:
        """All counts together."""
        counts = np.zeros(2**16, np.int64)
        for part in parts:
            counts[part.keys] += part.counts
        present = np.flatnonzero(counts)
        return cls(present, counts[present])

    @property
    def total(self) -> int:
        """Number of pixels."""
        return int(self.counts.sum())

    def order_statistic(self, rank: int) -> tuple[int, int]:
        """Key of the pixel of this rank (from 1), and how many pixels have smaller keys."""
        below = np.cumsum(self.counts)
        place = int(np.searchsorted(below, rank))
        return int(self.keys[place]), int(below[place] - self.counts[place])


def rank(percent: float, total: int) -> int:
    """Rank, from 1, of the percentile among `total` pixels."""
    return min(total, max(1, math.ceil(percent * total / 100 - 1e-9)))


def is_occupied(pixels: Array) -> bool:
    """Whether a tile (C, h, w) holds anything: some channel is not constant."""
    return any(bool(np.any(plane != plane.flat[0])) for plane in pixels)


def keys_of(pixels: Array) -> Array:
    """Integer keys in the order of the values; what is not finite is left out: 1-D."""
    if pixels.dtype.kind == "f":
        finite = pixels[np.isfinite(pixels)].astype(np.float32) + np.float32(0)  # -0.0 is 0.0
        bits = finite.view(np.uint32)
        return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return pixels.ravel()


def value_of(key: int, dtype: np.dtype[Any]) -> float:
    """The value whose key this is."""
    if dtype.kind == "f":
        bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
        return float(np.uint32(bits).view(np.float32))
    return float(key)


def upper(keys: Array) -> Array:
    """What the first pass counts: whole integers, the upper halves of floats' keys."""
    return keys >> 16 if keys.dtype == np.uint32 else keys


def lower(keys: Array, wanted: Sequence[int]) -> list[Histogram]:
    """What the second pass counts: the lower halves of keys with each of the wanted upper ones."""
    return [Histogram.of((keys[keys >> 16 == half] & 0xFFFF).astype(np.int64)) for half in wanted]
