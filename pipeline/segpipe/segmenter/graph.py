"""The graph that OpenVINO compiles: made by torch once, then read by processes that do without torch."""

from __future__ import annotations

import io
import zipfile
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
        """As one file."""
        file = io.BytesIO()
        np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> Graph:
        """What `to_bytes` wrote.

        Raises
        ------
        ValueError
            When the content is damaged or something else.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as found:
                return cls(**{field.name: found[field.name] for field in fields(cls)})
        except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
            raise ValueError(f"no graph ({error})") from error

    def compare(self, compiled: Any) -> None:
        """Refuse what was compiled of a graph that is not the network.

        A trace is blind to what depends on data or shape, and a compiler may be wrong on some CPU.

        Raises
        ------
        ValueError
            When it gives other numbers than torch.
        """
        found = compiled(self.windows)[0]
        if found.shape != self.logits.shape:
            raise ValueError(f"it gives an output of shape {found.shape}, not {self.logits.shape}")
        apart = float(np.abs(found - self.logits).max() / max(1, np.abs(self.logits).max()))
        if not apart <= TOLERANCE:
            raise ValueError(f"its numbers are {apart:.2g} of the largest away from those of torch")
