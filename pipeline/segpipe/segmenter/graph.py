"""The graph that OpenVINO compiles: made by torch once, then read by processes that do without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 1e-3
"""Difference to eager, relative to the largest logit, from which a compiled network is another one;
rounding makes 1e-6."""


@dataclass(frozen=True)
class Graph:
    """A network for batches of one size, and an example of what it does.

    Attributes
    ----------
    structure, weights
        OpenVINO's two files of a graph, XML and numbers: uint8 (bytes,).
    windows
        Of a shape other than that at which the network was traced: (N, C, H, W) float32.
    logits
        What torch makes of them: (N, K, h, w) float32.
    """

    structure: NDArray[np.uint8]
    weights: NDArray[np.uint8]
    windows: NDArray[np.float32]
    logits: NDArray[np.float32]

    def to_bytes(self) -> bytes:
        """As one file: a line of JSON that tells dtypes and shapes, then the arrays in C order."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        told = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
        parts = [array.tobytes() for array in arrays.values()]
        return b"".join([json.dumps(told).encode(), b"\n", *parts])

    @classmethod
    def from_bytes(cls, content: bytes | memoryview) -> Graph:
        """What `to_bytes` wrote; its arrays are views of the content."""
        line = bytes(content[:4096]).partition(b"\n")[0]
        start = len(line) + 1
        arrays = {}
        for name, (dtype, shape) in json.loads(line).items():
            count = int(np.prod(shape))
            arrays[name] = np.frombuffer(content, dtype, count, start).reshape(shape)
            start += arrays[name].nbytes
        return cls(**arrays)

    def compare(self, compiled: Any) -> None:
        """Refuse what was compiled of a graph that is not the network.

        A trace is blind to what depends on data or shape, and a compiler may be wrong on some CPU.

        Raises
        ------
        ValueError
            When it gives other numbers than torch.
        """
        found = compiled(np.array(self.windows))[0]
        if found.shape != self.logits.shape:
            raise ValueError(f"it gives an output of shape {found.shape}, not {self.logits.shape}")
        apart = float(np.abs(found - self.logits).max() / max(1, np.abs(self.logits).max()))
        if not apart <= TOLERANCE:
            raise ValueError(f"its numbers are {apart:.2g} of the largest away from those of torch")
