"""What a backend is: windows in, probabilities out; and the last step that all share on the CPU."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MEMORY_FORMATS = ("channels_last", "contiguous")
PRECISIONS = ("float32", "float16", "bfloat16")


class Forward(Protocol):
    """A network on its device, for batches of one size."""

    @property
    def made_by(self) -> str:
        """What the bytes depend on besides image, model and settings: library, version, device."""

    def __call__(self, windows: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Probabilities of what lies `halo` inside the windows, all computed at once.

        (N, C, H, W) float32 -> (N, K, H - 2 halo, W - 2 halo) float32 in [0, 1].

        Raises
        ------
        OutOfMemory
            When a GPU has not enough for so many windows.
        """


class OutOfMemory(Exception):
    """What so many windows take is more than the GPU has left."""


def activate(logits: NDArray[np.float32], classes: bool) -> NDArray[np.float32]:
    """Softmax over axis 1 or sigmoid, each pixel by itself: see the top of the package."""
    result: NDArray[np.float32]
    with np.errstate(over="ignore"):  # exp of a large number: infinity, and so 0
        if classes:
            result = np.exp(logits - logits.max(axis=1, keepdims=True))
            result /= result.sum(axis=1, keepdims=True)
        else:
            one = np.float32(1)
            result = one / (one + np.exp(-logits))
    return result
