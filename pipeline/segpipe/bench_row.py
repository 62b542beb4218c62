"""One line of `segpipe bench`: figures of a stage, as they are printed and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from segpipe.floors import Floor
from segpipe.usage import Usage


@dataclass(frozen=True)
class Row:
    """One stage, or all of them.

    Attributes
    ----------
    seconds, cpu_seconds
        Of the whole command, starting included.
    start_s, floor_s
        Seconds of `clock`: of starting, and of the floor.
    mpx_per_s
        Megapixels of the field per second on the wall, starting included.
    mpx_per_core_s
        Per second of CPU, starting not included; None where that is not measurable.
    share
        Floor over what was spent besides starting, in seconds of `clock`; 1: nothing is lost.
    clock
        "cpu", or "wall" for infer on a GPU.
    peak_bytes, peak_all_bytes
        Memory of the largest process; of all processes at once.
    """

    stage: str
    seconds: float
    cpu_seconds: float
    start_s: float
    floor_s: float
    mpx_per_s: float
    mpx_per_core_s: float | None
    share: float | None
    clock: str
    peak_bytes: int
    peak_all_bytes: int

    @classmethod
    def of(
        cls, stage: str, pixels: int, used: Usage, start: Usage, floor: Floor, clock: str = "cpu"
    ) -> Row:
        """The row of a stage."""
        wall = clock == "wall"
        spent = used.seconds - start.seconds if wall else used.cpu_seconds - start.cpu_seconds
        floor_s = floor.seconds if wall else floor.cpu_seconds
        cpu = used.cpu_seconds - start.cpu_seconds
        return cls(
            stage,
            _rounded(used.seconds),
            _rounded(used.cpu_seconds),
            _rounded(start.seconds if wall else start.cpu_seconds),
            _rounded(floor_s),
            _rounded(pixels / 1e6 / used.seconds),
            _rounded(pixels / 1e6 / cpu) if cpu > 0 else None,
            _rounded(floor_s / spent) if spent > 0 else None,
            clock,
            max(used.peaks_bytes, default=0),
            used.peak_bytes,
        )

    def line(self) -> str:
        """The row as text, under HEADER."""
        rate = "-" if self.mpx_per_core_s is None else f"{self.mpx_per_core_s:.2f}"
        share = "-" if self.share is None else f"{self.share:.1%}"
        return (
            f"{self.stage:<8}{self.seconds:>9.2f}{self.cpu_seconds:>9.2f}{self.start_s:>9.2f}"
            f"{self.mpx_per_s:>9.2f}{rate:>10}{self.floor_s:>9.2f}{share:>9}"
            f"{self.peak_bytes / 1e6:>9.0f}{self.peak_all_bytes / 1e6:>8.0f}"
        )


HEADER = (
    f"{'stage':<8}{'seconds':>9}{'CPU s':>9}{'start s':>9}{'Mpx/s':>9}{'per core':>10}{'floor s':>9}"
    f"{'share':>9}{'peak MB':>9}{'all MB':>8}"
)


def _rounded(value: float) -> float:
    """Four digits: enough for any of these, and what is printed is what is written."""
    return float(f"{value:.4g}")


def together(
    parts: Sequence[tuple[Usage, Usage, Floor]],
) -> tuple[Usage, Usage, Floor]:
    """One after the other: seconds add, peaks do not."""

    def added(several: Sequence[Usage]) -> Usage:
        return Usage(
            math.fsum(one.seconds for one in several),
            math.fsum(one.cpu_seconds for one in several),
            (max(max(one.peaks_bytes, default=0) for one in several),),
            max(one.peak_bytes for one in several),
        )

    used, start, floors = zip(*parts, strict=True)
    floor = Floor(
        math.fsum(one.seconds for one in floors), math.fsum(one.cpu_seconds for one in floors)
    )
    return added(used), added(start), floor
