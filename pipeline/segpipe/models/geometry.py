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

    def __post_init__(self) -> None:
        sizes = self.context, self.halo, self.stride, self.margin, self.smallest
        if not all(type(size) is int for size in sizes) or type(self.exact) is not bool:
            raise TypeError(f"{self} is not of integers and a bool")
        if not (self.halo >= self.context >= 0 <= self.margin <= self.halo and self.stride >= 1):
            raise ValueError(f"{self}: a halo is at least the context and the margin")

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
