"""Boxes, tiles and regions: integer geometry of the plane, standard library only.

Everything is anchored at pixel (0, 0) of the image, half-open, and computed rather than stored.
One tile, whose core is kept and whose halo is read and thrown away:

        window
        +-----------------------+        window = core + halo on each side; constant shape,
        |  halo                 |                 may overhang the image, which is mirrored there
        |    +-------------+    |        read   = pixels of the image that the window shows
        |    |    core     |    |        keep   = core inside the image: what is written
        |    |             |    |        crop   = keep, seen from the window's corner
        |    +-------------+    |
        |                       |
        +-----------------------+

A region is a whole number of cores: the unit of work, of writing and of resuming.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from segpipe.errors import SettingsError


def ceil_to(value: int, step: int) -> int:
    """Smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step


def mirror(position: int, size: int) -> int:
    """Pixel of range(size) that a position shows: 2 1 |0 1 2 3| 2 1 0 1 ... (numpy's "reflect").

    The edge pixel is not repeated, the mirror is, and a single pixel is constant.
    """
    if size == 1:
        return 0
    place = position % (2 * (size - 1))
    return min(place, 2 * (size - 1) - place)


def _mirrored_span(start: int, stop: int, size: int) -> tuple[int, int]:
    """First and one past the last pixel of range(size) that positions [start, stop) show."""
    if size == 1:
        return 0, 1
    if start >= 0 and stop <= size:
        return start, stop
    ends = mirror(start, size), mirror(stop - 1, size)
    period = 2 * (size - 1)  # neighbours show neighbours, so only the turns are further out
    first = 0 if ceil_to(start, period) < stop else min(ends)
    last = size - 1 if ceil_to(start - size + 1, period) + size - 1 < stop else max(ends)
    return first, last + 1


@dataclass(frozen=True, order=True, slots=True)
class Box:
    """Half-open rectangle [y0, y1) x [x0, x1) of pixels; may be empty, may lie outside the image."""

    y0: int
    x0: int
    y1: int
    x1: int

    def __post_init__(self) -> None:
        if self.y1 < self.y0 or self.x1 < self.x0:
            raise ValueError(f"box {self} ends before it starts")

    def __str__(self) -> str:
        return f"[{self.y0}:{self.y1}, {self.x0}:{self.x1}]"

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.y1 - self.y0, self.x1 - self.x0

    @property
    def area(self) -> int:
        """Number of pixels."""
        return (self.y1 - self.y0) * (self.x1 - self.x0)

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of this box in an array whose pixel (0, 0) is the image's."""
        return slice(self.y0, self.y1), slice(self.x0, self.x1)

    def grow(self, margin: int) -> Box:
        """The box with `margin` pixels more on every side."""
        return Box(self.y0 - margin, self.x0 - margin, self.y1 + margin, self.x1 + margin)

    def intersect(self, other: Box) -> Box:
        """The common part; empty, and somewhere inside `other`'s range, when there is none."""
        y0 = min(max(self.y0, other.y0), other.y1)
        x0 = min(max(self.x0, other.x0), other.x1)
        return Box(y0, x0, max(y0, min(self.y1, other.y1)), max(x0, min(self.x1, other.x1)))

    def contains(self, other: Box) -> bool:
        """Whether every pixel of `other` is in this box."""
        return other.area == 0 or self.intersect(other) == other

    def shift(self, y: int, x: int) -> Box:
        """The box moved by (y, x)."""
        return Box(self.y0 + y, self.x0 + x, self.y1 + y, self.x1 + x)

    def within(self, outer: Box) -> Box:
        """This box in the coordinates of `outer`, whose corner becomes (0, 0)."""
        return self.shift(-outer.y0, -outer.x0)


@dataclass(frozen=True, slots=True)
class Tile:
    """Unit of inference: a core that is kept, and the window that the network sees.

    See the drawing at the top of the module. `image` is the whole image.
    """

    index: tuple[int, int]
    core: Box
    window: Box
    image: Box

    @property
    def read(self) -> Box:
        """The pixels of the image that the window shows, mirrored beyond the border.

        Not the window clipped: a ragged last tile is mirrored from further inside than its window
        reaches, and where it keeps fewer pixels than the stride, those look at what is mirrored.
        """
        window, (height, width) = self.window, self.image.shape
        y = _mirrored_span(window.y0, window.y1, height)
        x = _mirrored_span(window.x0, window.x1, width)
        return Box(y[0], x[0], y[1], x[1])

    @property
    def keep(self) -> Box:
        """The part of the core that exists: what this tile writes."""
        return self.core.intersect(self.image)

    @property
    def crop(self) -> Box:
        """`keep` in the coordinates of the window."""
        return self.keep.within(self.window)


@dataclass(frozen=True, slots=True)
class Region:
    """Unit of work, of writing and of resuming: one shard, a whole number of cores."""

    index: tuple[int, int]
    box: Box
    """The region's pixels inside the image."""

    @property
    def name(self) -> str:
        """`y_x` of the index: the key in records and messages."""
        return f"{self.index[0]}_{self.index[1]}"


@dataclass(frozen=True, slots=True)
class Lattice:
    """Partition of an image into equal cells anchored at (0, 0); the last ones may be ragged."""

    shape: tuple[int, int]
    cell: tuple[int, int]

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or min(self.cell) < 1:
            raise SettingsError(
                f"image {self.shape} and cell {self.cell} must be at least one pixel"
            )

    @property
    def count(self) -> tuple[int, int]:
        """Cells along y and x."""
        return -(-self.shape[0] // self.cell[0]), -(-self.shape[1] // self.cell[1])

    def __len__(self) -> int:
        return self.count[0] * self.count[1]

    def __iter__(self) -> Iterator[Region]:
        rows, columns = self.count
        return (self[row, column] for row in range(rows) for column in range(columns))

    def __getitem__(self, index: tuple[int, int]) -> Region:
        rows, columns = self.count
        row, column = index
        if not (0 <= row < rows and 0 <= column < columns):
            raise IndexError(f"cell {index} of a lattice of {self.count}")
        y, x = row * self.cell[0], column * self.cell[1]
        box = Box(y, x, min(y + self.cell[0], self.shape[0]), min(x + self.cell[1], self.shape[1]))
        return Region(index, box)

    def named(self, name: str) -> Region:
        """The region whose `name` this is."""
        row, column = name.split("_")
        return self[int(row), int(column)]

    def meeting(self, box: Box) -> Iterator[Region]:
        """The cells that share a pixel with `box`, in raster order."""
        part = box.intersect(Box(0, 0, *self.shape))
        if part.area == 0:
            return
        for row in range(part.y0 // self.cell[0], -(-part.y1 // self.cell[0])):
            for column in range(part.x0 // self.cell[1], -(-part.x1 // self.cell[1])):
                yield self[row, column]


@dataclass(frozen=True, slots=True)
class TileGrid:
    """The tiles of an image: cores partition it, windows have one shape and one phase.

    Parameters
    ----------
    shape
        Image height and width in pixels.
    core, halo, stride
        Pixels. The core must be a multiple of the stride. An axis shorter than the core gets a
        core of its own length, one shorter than two cores gets two that share it, both rounded up
        to the stride: a function of the image's shape alone.

    Raises
    ------
    SettingsError
        When the core is not a multiple of the stride: pooling would change its phase from tile to
        tile, and no halo could mend that.
    """

    shape: tuple[int, int]
    core: int
    halo: int
    stride: int = 1

    def __post_init__(self) -> None:
        if self.stride < 1 or self.halo < 0 or self.core < 1:
            raise SettingsError(
                f"core {self.core}, halo {self.halo} and stride {self.stride} must be positive"
            )
        if self.core % self.stride:
            raise SettingsError(
                f"core {self.core} is not a multiple of the model's stride {self.stride}; "
                f"set tile.core to {ceil_to(self.core, self.stride)}"
            )

    @property
    def core_shape(self) -> tuple[int, int]:
        """Height and width of a core."""
        y, x = (self._along(size) for size in self.shape)
        return y, x

    def _along(self, size: int) -> int:
        if size > 2 * self.core:
            return self.core
        # Two tiles of a camera's 1,392 x 1,040 would otherwise be little but padding.
        count = max(1, -(-size // self.core))
        return min(self.core, ceil_to(-(-size // count), self.stride))

    @property
    def window_shape(self) -> tuple[int, int]:
        """Height and width of a window."""
        y, x = self.core_shape
        return y + 2 * self.halo, x + 2 * self.halo

    @property
    def lattice(self) -> Lattice:
        """The cores, clipped to the image."""
        return Lattice(self.shape, self.core_shape)

    def __len__(self) -> int:
        return len(self.lattice)

    def __iter__(self) -> Iterator[Tile]:
        return (self[cell.index] for cell in self.lattice)

    def __getitem__(self, index: tuple[int, int]) -> Tile:
        rows, columns = self.lattice.count
        if not (0 <= index[0] < rows and 0 <= index[1] < columns):
            raise IndexError(f"tile {index} of a grid of {(rows, columns)}")
        height, width = self.core_shape
        y, x = index[0] * height, index[1] * width
        core = Box(y, x, y + height, x + width)
        return Tile(index, core, core.grow(self.halo), Box(0, 0, *self.shape))

    def meeting(self, box: Box) -> Iterator[Tile]:
        """The tiles whose cores share a pixel with `box`, in raster order."""
        return (self[cell.index] for cell in self.lattice.meeting(box))
