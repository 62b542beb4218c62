"""Who does the work: the same function over the same regions, in this process or in many.

The client owns a window of coarse tasks, a few per worker in flight. A task carries a small job and
a region's name and returns a small dict; pixels never travel. Nothing here can change a result.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from segpipe.errors import ModelError, SegpipeError, SettingsError, Stopped

log = logging.getLogger(__name__)

Task = Callable[[Any, str], dict[str, Any]]
IN_FLIGHT_PER_WORKER = 2
STOPPED = "stopped; run the same command to go on"
BAD_DATA = (SegpipeError, OSError, MemoryError)
"""What a region may fail by without the program being wrong."""
FATAL = (Stopped, SettingsError, ModelError)
"""What no other try and no other region would change."""


@dataclass(frozen=True)
class Outcome:
    """What became of one region: facts, or the error of its last try."""

    region: str
    facts: dict[str, Any] | None
    error: str | None


class Engine(Protocol):
    """Runs a task over regions; outcomes come in any order."""

    workers: int

    def run(
        self, task: Task, job: Any, regions: Sequence[str], *, on_gpu: bool = False
    ) -> Iterator[Outcome]:
        """Outcomes of `task(job, region)`; a region that fails `attempts` times is an error.

        With `on_gpu`, where the engine has GPUs, only the workers that own one take part.

        Raises
        ------
        Stopped
            After `stop`.
        SettingsError, ModelError
            Of the task: they would hit every region.
        """
        ...

    def stop(self) -> None:
        """Take no more regions; running `run` calls raise Stopped."""
        ...


class SerialEngine:
    """One after the other in this process: the reference."""

    workers = 1

    def __init__(self, attempts: int = 3) -> None:
        self.attempts = attempts
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def run(
        self, task: Task, job: Any, regions: Sequence[str], *, on_gpu: bool = False
    ) -> Iterator[Outcome]:
        for region in regions:
            if self._stop.is_set():
                raise Stopped(STOPPED)
            yield self._try(task, job, region)

    def _try(self, task: Task, job: Any, region: str) -> Outcome:
        error = ""
        for _ in range(self.attempts):
            try:
                return Outcome(region, task(job, region), None)
            except FATAL:
                raise
            except BAD_DATA as caught:  # a bug keeps its traceback
                error = describe(caught)
        return Outcome(region, None, error)


class LocalEngine:
    """Dask processes on this machine, alive until closed, shared by threads of this process.

    Parameters
    ----------
    gpus
        Processes beside the workers that own one GPU each (`gpu_index`); tasks that use it go to
        them, so that a GPU has one process and the CPUs do the rest meanwhile. A pool of their own,
        because a task that is tied to a worker would wait for ever for one that died.
    """

    def __init__(self, workers: int, attempts: int = 3, gpus: int = 0) -> None:
        self.workers = workers
        self.gpus = gpus
        self.attempts = attempts
        self._stop = threading.Event()
        self._pools = [_start_pool(workers)]
        if gpus:
            self._pools.append(_start_pool(gpus))

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        """End the processes."""
        for client, cluster in self._pools:
            client.close(timeout=5)
            cluster.close(timeout=10)

    def run(
        self, task: Task, job: Any, regions: Sequence[str], *, on_gpu: bool = False
    ) -> Iterator[Outcome]:
        from distributed.scheduler import KilledWorker

        client, _ = self._pools[-1 if on_gpu else 0]
        slots = IN_FLIGHT_PER_WORKER * (self.gpus if on_gpu and self.gpus else self.workers)
        bad_data = (*BAD_DATA, KilledWorker)
        todo = deque((region, 1) for region in regions)
        flying: dict[Any, tuple[str, int]] = {}
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        try:
            while todo or flying:
                while todo and len(flying) < slots:
                    region, attempt = todo.popleft()
                    future = client.submit(task, job, region, pure=False)
                    flying[future] = (region, attempt)
                    future.add_done_callback(ended.put)
                future = self._next(ended)
                region, attempt = flying.pop(future)
                if future.status == "finished":
                    yield Outcome(region, future.result(), None)
                    continue
                error = future.exception() if future.status == "error" else None
                if error is not None and (
                    isinstance(error, FATAL) or not isinstance(error, bad_data)
                ):
                    raise error  # wrong for all regions, or a bug
                if attempt < self.attempts:
                    todo.append((region, attempt + 1))
                else:
                    yield Outcome(region, None, describe(error))
        finally:
            if flying:
                client.cancel(list(flying))

    def _next(self, ended: queue.SimpleQueue[Any]) -> Any:
        """The next task that ended, looking up now and then whether to stop."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty):
                return ended.get(timeout=0.05)
        raise Stopped(STOPPED)


def _start_pool(workers: int) -> tuple[Any, Any]:
    """A client, and the cluster of so many processes that it talks to."""
    import dask
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with dask.config.set(
        {
            # A death marks every task assigned to the worker; the window keeps those few.
            "distributed.scheduler.allowed-failures": 10,
            "distributed.scheduler.worker-ttl": None,  # numba and torch hold the GIL at first use
            "distributed.worker.memory.target": False,
            "distributed.worker.memory.spill": False,
            "distributed.worker.memory.pause": False,
            "distributed.worker.memory.terminate": False,
            "distributed.admin.tick.limit": "1h",
            "distributed.comm.timeouts.connect": "60s",
        }
    ):
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # None listens on all interfaces, on one fixed port
            worker_dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
            local_directory=None,
        )
        client = Client(cluster, set_as_default=False)
    client.register_plugin(_worker_plugin())
    return client, cluster


def describe(error: BaseException | None) -> str:
    """One line about an error."""
    if error is None:
        return "cancelled"
    if type(error).__name__ == "KilledWorker":
        return "its worker died again and again (out of memory?)"
    if isinstance(error, SegpipeError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _worker_plugin() -> Any:
    from distributed import WorkerPlugin

    class Quiet(WorkerPlugin):  # type: ignore[misc]
        """Ctrl-C reaches the whole process group: only the client decides what it means."""

        name = "segpipe-quiet"

        def setup(self, worker: Any) -> None:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.SIG_IGN)

    return Quiet()


def gpu_index() -> int:
    """The GPU of this process: its number in its pool, 0 where there are no workers."""
    from distributed import get_worker

    try:
        return int(get_worker().name)
    except ValueError:
        return 0


def usable_cores() -> int:
    """Cores that this process may use: affinity and cgroup quota."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, cores)


def usable_memory_bytes() -> int:
    """Memory that this process may use: what is available, and the cgroup's limit."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            available = min(available, int(limit))
    except (OSError, ValueError):
        pass
    return available


def default_workers(bytes_per_worker: int) -> int:
    """Processes that cores and memory allow. The number cannot change a result."""
    return max(1, min(usable_cores(), usable_memory_bytes() // bytes_per_worker))


@contextlib.contextmanager
def open_engine(
    kind: str, workers: int | None, attempts: int, bytes_per_worker: int, gpus: int = 0
) -> Iterator[Engine]:
    """An engine for as long as the block lasts.

    Raises
    ------
    SettingsError
        When the processes cannot be started.
    """
    if kind == "serial":
        yield SerialEngine(attempts)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ports and such: nothing the user can act on
        try:
            engine = LocalEngine(workers or default_workers(bytes_per_worker), attempts, gpus)
        except RuntimeError as error:
            raise SettingsError(
                f"processes cannot be started ({' '.join(str(error).split())}); in a script, call "
                "segpipe under `if __name__ == '__main__':`, or set engine.kind=serial"
            ) from error
    try:
        yield engine
    finally:
        engine.close()
