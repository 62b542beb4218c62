"""What a task is made of: every region once, quick ones together, the last ones apart."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from segpipe.backlog import MOST, TASK_S, Backlog


def emptied(backlog: Backlog, region_s: float) -> list[list[str]]:
    """All tasks, one after the other, of regions that take so long."""
    tasks = []
    while backlog:
        tasks.append([region for region, _ in backlog.take()])
        backlog.learn(len(tasks[-1]), region_s * len(tasks[-1]))
    return tasks


@given(st.integers(0, 300), st.integers(1, 20), st.floats(1e-4, 10))
def test_every_region_once_and_in_order(count, workers, region_s):
    names = [str(number) for number in range(count)]
    tasks = emptied(Backlog(names, workers, 2 * workers), region_s)
    assert [name for task in tasks for name in task] == names
    for task in tasks:
        assert 1 <= len(task) <= MOST
        assert len(task) == 1 or len(task) * region_s <= max(TASK_S, workers / 40) * 1.001


def test_quick_regions_go_together_and_the_last_ones_apart():
    tasks = emptied(Backlog(map(str, range(400)), 2, 4), 0.05)
    assert len(tasks[0]) == 1, "nothing is known yet"
    assert len(tasks[1]) == TASK_S / 0.05
    assert [len(task) for task in tasks[-8:]] == [1] * 8
    assert len(emptied(Backlog(map(str, range(400)), 2, 4), 0.6)) == 400


def test_many_workers_are_not_asked_for_more_tasks_than_one_process_can_hand_out():
    tasks = emptied(Backlog(map(str, range(20_000)), 100, 200), 0.5)
    assert len(tasks[1]) == 5


def test_what_failed_is_alone_and_comes_last():
    backlog = Backlog(map(str, range(40)), 1, 2)
    (first,) = backlog.take()
    backlog.learn(1, 0.001)
    backlog.put_back(first[0], 2)
    tasks = []
    while backlog:
        tasks.append(backlog.take())
    assert tasks[-1] == [("0", 2)]
    assert all(attempt == 1 for task in tasks[:-1] for _, attempt in task)
