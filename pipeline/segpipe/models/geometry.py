"""What the tiling needs to know of a network, and which windows it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelGeometry:
    """How far a network looks, and the sizes that it takes; pixels. See `segpipe.models.context`.

    Attributes
    ----------
    context
        Pixels around a core that the network must see.
    halo
        Pixels to read around a core: at least the context.
    stride
        Shifting the input by this many pixels shifts the output alike.
    margin
        By so many the output is smaller on each side.
    smallest
        The least size of an input; the others are this and multiples of the stride more.
    exact
        Whether tiling cannot be seen in the result.
    """

    context: int
    halo: int
    stride: int
    margin: int
    smallest: int
    exact: bool

    def admissible(self, size: int) -> bool:
        """Whether the network takes an input of `size` pixels along an axis."""
        return size >= self.smallest and (size - self.smallest) % self.stride == 0

    def next_admissible(self, size: int) -> int:
        """The smallest admissible size that is at least `size`.

        Examples
        --------
        >>> ModelGeometry(94, 96, 16, 0, 16, True).next_admissible(200)
        208
        """
        steps = max(0, -(-(size - self.smallest) // self.stride))
        return self.smallest + steps * self.stride
