"""Semantic labels: of each pixel the class that the network finds most likely."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def likeliest(probabilities: Array) -> tuple[Array, Array]:
    """The class of each pixel, (Y, X) uint32, by its place from 0, and its probability, (Y, X) uint8.

    Of equals the lowest place wins. Each pixel is by itself, so a cut into regions cannot show.

    Parameters
    ----------
    probabilities
        (K, Y, X) uint8, quantised.

    Examples
    --------
    >>> labels, certainty = likeliest(np.array([[[3, 9, 5]], [[7, 9, 0]]], np.uint8))
    >>> labels.tolist(), certainty.tolist()
    ([[1, 0, 0]], [[7, 9, 5]])
    """
    return probabilities.argmax(axis=0).astype(np.uint32), probabilities.max(axis=0)
