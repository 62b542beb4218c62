"""Regions that wait for a worker, and how many of them make a task."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

TASK_S = 0.5
TASKS_PER_S = 40
MOST = 16


class Backlog:
    """Regions in their order, handed out several at a time where each is quick.

    A task costs the process that hands it out some 6 ms, however little it does (measured: Dask, client
    and scheduler together), and a region of labels may take no more than 50. So tasks of about half a
    second are made, longer ones for so many workers that these would be more than 40 tasks a second;
    what they are made of follows from the regions done so far. Towards the end tasks become smaller,
    so that the workers end together (guided self-scheduling: Polychronopoulos and Kuck, 1987). None
    of this can change a result.

    Parameters
    ----------
    regions
        What tasks are told of each.
    workers
        Processes that take part.
    slots
        Tasks that are handed out at a time.
    """

    def __init__(self, regions: Iterable[Any], workers: int, slots: int) -> None:
        self._waiting = deque((region, 1) for region in regions)
        self._slots = slots
        self._task_s = max(TASK_S, workers / TASKS_PER_S)
        self._region_s: float | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def take(self) -> list[tuple[Any, int]]:
        """The regions of the next task, each with the number of this attempt, from 1 on.

        A region that failed before is alone: whatever it does to its worker happens to no other.
        """
        taken = [self._waiting.popleft()]
        if taken[0][1] == 1:
            size = min(self._affordable(), len(self._waiting) // (2 * self._slots))
            while len(taken) < size and self._waiting[0][1] == 1:
                taken.append(self._waiting.popleft())
        return taken

    def _affordable(self) -> int:
        if self._region_s is None:
            return 1
        return MOST if self._region_s * MOST < self._task_s else int(self._task_s / self._region_s)

    def put_back(self, region: Any, attempt: int) -> None:
        """Have a region tried again, after all others."""
        self._waiting.append((region, attempt))

    def learn(self, regions: int, seconds: float) -> None:
        """Take note of how long a task of so many regions took."""
        each = seconds / regions
        self._region_s = each if self._region_s is None else (self._region_s + each) / 2
