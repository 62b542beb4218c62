"""How large the objects of an image are: a histogram that fills batch by batch, and sums."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

PER_OCTAVE = 4
"""Bins from a diameter to twice that."""
_BINS = 24 * PER_OCTAVE  # up to 16 million pixels


@dataclass
class SizeHistogram:
    """Objects by the diameter of the circle of their area. Bin k: 2^(k/4) <= diameter < 2^((k+1)/4)."""

    counts: Array = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    area_px: int = 0

    def add(self, area_px: Array) -> None:
        """Add objects by their area in pixels: (n,) numbers."""
        diameter = np.sqrt(4 * area_px.astype(np.float64) / np.pi)
        place = np.floor(PER_OCTAVE * np.log2(np.maximum(diameter, 1))).astype(np.int64)
        self.counts += np.bincount(np.minimum(place, _BINS - 1), minlength=_BINS)
        self.area_px += int(area_px.sum())

    def to_json(self) -> dict[str, Any]:
        """Plain values: the bins from the first to the last that holds an object."""
        filled = np.flatnonzero(self.counts)
        first, end = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
        edges = [round(float(edge), 4) for edge in diameter_of(np.arange(first, end + 1))]
        counts = [int(count) for count in self.counts[first:end]]
        return {"diameter_edges_px": edges, "counts": counts, "area_px": self.area_px}


def diameter_of(place: Array) -> Array:
    """Lower edge of a bin."""
    edges: Array = 2.0 ** (place / PER_OCTAVE)
    return edges


def quantile(edges: list[float], counts: list[int], share: float) -> float | None:
    """The diameter below which this share of the objects lies, to a part of a bin; None of none."""
    total = sum(counts)
    if total == 0:
        return None
    below, wanted = 0, share * total
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if below + count >= wanted and count:
            return float(low * (high / low) ** ((wanted - below) / count))
        below += count
    return edges[-1]
