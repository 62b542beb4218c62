"""Coroutines of zarr, done by the thread that asks.

zarr's own way hands each of them to one thread, and from there each file and each chunk to another. Of
small arrays half of the time is then handing over, and of large ones about a quarter of the CPU's: to
read part of a chunk takes 1.0 ms in that way, .5 ms in this.
"""

from __future__ import annotations

import asyncio
import atexit
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")

_idle: list[asyncio.Runner] = []
"""Event loops that no thread uses now; to make one takes .1 ms, a fifth of a small read."""


class _Loop(asyncio.SelectorEventLoop):
    """What a coroutine asks another thread to do is done at once."""

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whatever it is, whoever awaits it gets it
            future.set_exception(error)
        return future


def run_here(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """What the coroutine brings; it must not wait for other threads or for the network.

    In a thread whose own event loop is running, as that of a notebook, another thread does it.
    """
    if asyncio._get_running_loop() is not None:
        with ThreadPoolExecutor(1) as other:
            return other.submit(lambda: run_here(coroutine)).result()
    try:
        runner = _idle.pop()
    except IndexError:
        runner = asyncio.Runner(loop_factory=_Loop)
    try:
        result = runner.run(coroutine)
    except BaseException:
        runner.close()  # with whatever else the coroutine had begun
        raise
    _idle.append(runner)
    return result


def _close_idle() -> None:
    while _idle:
        _idle.pop().close()


atexit.register(_close_idle)
os.register_at_fork(after_in_child=_idle.clear)  # the parent's
