"""Objects in the order of their ids, band of regions by band, in memory that grows with a band.

Ids rank the anchors of seeds in raster order, so the objects that a band anchors are one range of ids.
What a band holds of other ranges are objects that crossed a seam, downwards, or upwards when a seed
grew: those of all bands are held at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from segpipe.properties import ObjectSums

MOST_ROWS = 2**15
"""Objects at once."""


@dataclass(frozen=True)
class Bands:
    """The objects of an image.

    first_ids
        The first id that is anchored in each band, and one more than the last id of all.
    regions_of_band
        Callables, one per band, that give what each of its regions knows; called again and again.
    most
        Objects at once; a band of more comes in parts, one of none as an empty part.
    """

    first_ids: Sequence[int]
    regions_of_band: Sequence[Callable[[], Iterable[ObjectSums]]]
    most: int = MOST_ROWS

    @cached_property
    def _crossing(self) -> ObjectSums:
        strays = []
        ends = zip(self.first_ids[:-1], self.first_ids[1:], self.regions_of_band, strict=True)
        for first, end, regions_of in ends:
            strays += [region.outside(first, end) for region in regions_of()]
        return ObjectSums.united(strays)

    def __iter__(self) -> Iterator[tuple[int, ObjectSums]]:
        """The number of a band, and some of its objects whole; ids ascend over all."""
        for band, regions_of in enumerate(self.regions_of_band):
            first, end = self.first_ids[band : band + 2]
            regions = [self._crossing, *regions_of()]
            for start in range(first, max(end, first + 1), self.most):
                stop = min(start + self.most, end)
                yield band, ObjectSums.united([one.between(start, stop) for one in regions])
