"""Test-time augmentation: the mean of the network's answers to the eight views of a window.

The views are the window turned by 0, 90, 180 and 270 degrees, and the same mirrored. Each answer is
turned back before the mean. A network is not symmetric, so its eight answers differ, and their mean is
better than each; it takes eight times as long.

Invariant: what holds of a network's tiling holds of the mean's. A window's length is that of its core
and two halos, and the core begins as far from one end as it ends from the other: in a view it lies
where it lay, so the view is a window of the turned image, on the turned image's lattice.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from segpipe.segmenter.forward import Forward

VIEWS = 8


class EightViews:
    """A Forward that asks another eight times."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward

    @property
    def made_by(self) -> str:
        """The other's, and that it is a mean."""
        return f"{self._forward.made_by}, mean of {VIEWS} views"

    def __call__(self, windows: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Mean probabilities, as `Forward`; added in a fixed order, in float32."""
        total = turned_back(self._forward(view(windows, 0)), 0)
        for number in range(1, VIEWS):
            total = total + turned_back(self._forward(view(windows, number)), number)
        mean: NDArray[np.float32] = total / np.float32(VIEWS)
        return mean


def view(windows: NDArray[np.float32], number: int) -> NDArray[np.float32]:
    """(..., H, W) turned by `number` mod 4 right angles, after mirroring columns from 4 on; a copy."""
    mirrored = windows[..., ::-1] if number >= VIEWS // 2 else windows
    return np.ascontiguousarray(np.rot90(mirrored, number % 4, axes=(-2, -1)))


def turned_back(outputs: NDArray[np.float32], number: int) -> NDArray[np.float32]:
    """What `view` made of an array, as it was; a copy."""
    back = np.rot90(outputs, -(number % 4), axes=(-2, -1))
    return np.ascontiguousarray(back[..., ::-1] if number >= VIEWS // 2 else back)
