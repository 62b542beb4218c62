"""Intensities of objects as integers that add up: sums, sums of squares, extremes.

Integers are taken as they are. Floats are taken in fixed point: as multiples of a power of two, one
per image and channel, such that the largest intensity in an object has 28 bits. That is finer than the
24 bits of a float32 for what is within 1/16 of the largest. Extremes are exact for both.

Pixels that are NaN or infinite are left out, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from segpipe.object_runs import ObjectRuns

Array = np.ndarray[Any, np.dtype[Any]]
BITS = 28
"""Of the largest float: 10^10 pixels of it are still within int64."""


@dataclass(frozen=True)
class PlaneSums:
    """Sums over the pixels of each object in one channel.

    total
        (n,) int64, in units of the fixed point.
    squares_high, squares_low
        (n,) int64: squares_high * 2^32 + squares_low, in units of its square.
    missing
        (n,) int64: pixels that are not finite.
    least, most
        (n,) float64: extremes of the others; inf and -inf where there are none.
    """

    total: Array
    squares_high: Array
    squares_low: Array
    missing: Array
    least: Array
    most: Array


def unit_of(largest: float) -> float:
    """The unit of the fixed point for floats of at most this absolute value: a power of two."""
    return 2.0 ** (math.frexp(largest)[1] - BITS) if largest > 0 else 1.0


def sum_plane(plane: Array, objects: ObjectRuns, unit: float = 1.0) -> PlaneSums:
    """Sums over the objects' pixels in one channel: (h, w) of up to 16 bits, or floats."""
    sums = np.zeros((4, len(objects.ids)), np.int64)
    extremes = np.empty((2, len(objects.ids)))
    if plane.dtype.kind == "f":
        _sum_floats(plane, objects.starts, objects.runs, 1 / unit, sums, extremes)
    else:
        _sum_integers(plane, objects.starts, objects.runs, sums, extremes)
    return PlaneSums(*sums, *extremes)


def add_up(plane: Array, objects: ObjectRuns) -> Array:
    """Sum of a plane (h, w) of integers over the pixels of each object: (n,) int64."""
    total = np.zeros(len(objects.ids), np.int64)
    _add_up(plane, objects.starts, objects.runs, total)
    return total


def largest_of(sums: Sequence[PlaneSums]) -> list[float]:
    """The largest absolute intensity of an object in each channel; 0 where there is none."""
    extremes = [np.r_[one.least, one.most] for one in sums]
    return [float(np.abs(one[np.isfinite(one)]).max(initial=0.0)) for one in extremes]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _add_up(plane: Array, starts: Array, runs: Array, total: Array) -> None:
    for number in range(total.size):
        summed = np.int64(0)
        for place in range(starts[number], starts[number + 1]):
            y = runs[place, 0]
            for x in range(runs[place, 1], runs[place, 2]):
                summed += plane[y, x]
        total[number] = summed


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sum_integers(plane: Array, starts: Array, runs: Array, sums: Array, extremes: Array) -> None:
    for number in range(sums.shape[1]):
        total = high = low = np.int64(0)
        least, most = np.int64(2**62), np.int64(-(2**62))
        for place in range(starts[number], starts[number + 1]):
            row = plane[runs[place, 0], runs[place, 1] : runs[place, 2]]
            squares = np.int64(0)  # of a run: within 2^31 pixels of 16 bits
            for x in range(row.size):
                value = np.int64(row[x])
                least, most = min(least, value), max(most, value)
                total += value
                squares += value * value
            low += squares & 0xFFFFFFFF
            high += (squares >> 32) + (low >> 32)
            low &= 0xFFFFFFFF
        sums[0, number], sums[1, number], sums[2, number] = total, high, low
        extremes[0, number], extremes[1, number] = least, most


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _sum_floats(
    plane: Array, starts: Array, runs: Array, per_unit: float, sums: Array, extremes: Array
) -> None:
    for number in range(sums.shape[1]):
        total = high = low = missing = np.int64(0)
        least, most = np.inf, -np.inf
        for place in range(starts[number], starts[number + 1]):
            y = runs[place, 0]
            for x in range(runs[place, 1], runs[place, 2]):
                value = np.float64(plane[y, x])
                if not np.isfinite(value):
                    missing += 1
                    continue
                least, most = min(least, value), max(most, value)
                units = np.int64(np.rint(value * per_unit))
                total += units
                square = units * units
                high += square >> 32
                low += square & 0xFFFFFFFF
            high += low >> 32
            low &= 0xFFFFFFFF
        sums[0, number], sums[1, number], sums[2, number] = total, high, low
        sums[3, number] = missing
        extremes[0, number], extremes[1, number] = least, most
