"""Who does the work: the same function over the same regions, in this process or in many.

The client owns a window of coarse tasks, a few per worker in flight. A task carries a small job and
names of regions, several where they are quick, and returns something small for each; pixels never
travel. Nothing here can change a result.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol, cast
from uuid import uuid4

from segpipe.backlog import Backlog
from segpipe.errors import ModelError, SegpipeError, SettingsError, Stopped
from segpipe.machine import peak_memory_bytes

log = logging.getLogger(__name__)

Task = Callable[[Any, Any], Any]
"""`task(job, region)`; what it returns is small, and goes through the scheduler. Regions are names, or
whatever else is small and says what is to be done."""
IN_FLIGHT_PER_WORKER = 2
ALONE_S = 120
"""A worker that dies is replaced in seconds, unless it dies while it starts: dask then gives it up."""
GIVEN_UP_AFTER = "1000h"
"""So long after a death dask looks whether the worker is there again, and gives it up if it is not just
then: by default after 15 s, in which an image that kills its worker may have done so many times."""
STOPPED = "stopped; run the same command to go on"
BAD_DATA = (SegpipeError, OSError, MemoryError)
"""What a region may fail by without the program being wrong."""
FATAL = (Stopped, SettingsError, ModelError)
"""What no other try and no other region would change."""


@dataclass(frozen=True)
class Outcome:
    """What became of one region: what the task found, or the error of its last try."""

    region: Any
    found: Any
    error: str | None
    peak_bytes: int = 0
    """Most memory that the process which did it ever had, where that is another than the client."""


class Engine(Protocol):
    """Runs a task over regions; outcomes come in any order.

    gpus
        Processes beside the workers that own one GPU each.
    """

    workers: int
    gpus: int

    def run(
        self, task: Task, job: Any, regions: Sequence[Any], *, on_gpu: bool = False
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
    gpus = 0

    def __init__(self, attempts: int = 3) -> None:
        self.attempts = attempts
        self._stop = threading.Event()

    def stop(self) -> None:
        self._stop.set()

    def run(
        self, task: Task, job: Any, regions: Sequence[Any], *, on_gpu: bool = False
    ) -> Iterator[Outcome]:
        for region in regions:
            if self._stop.is_set():
                raise Stopped(STOPPED)
            yield self._try(task, job, region)

    def _try(self, task: Task, job: Any, region: Any) -> Outcome:
        for _ in range(self.attempts):
            outcome = try_once(task, job, region)
            if outcome.error is None:
                break
        return outcome


def try_once(task: Task, job: Any, region: Any) -> Outcome:
    """What becomes of one region in one try; what is no bad data is raised."""
    try:
        return Outcome(region, task(job, region), None)
    except FATAL:
        raise
    except BAD_DATA as caught:  # a bug keeps its traceback
        return Outcome(region, None, describe(caught))


def try_several(task: Task, job: Any, regions: Sequence[Any]) -> tuple[list[Outcome], float]:
    """What becomes of some regions, one after the other, and the seconds they took."""
    started = time.perf_counter()
    outcomes = [try_once(task, job, region) for region in regions]
    outcomes[-1] = replace(outcomes[-1], peak_bytes=peak_memory_bytes())
    return outcomes, time.perf_counter() - started


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
        with contextlib.ExitStack() as held:
            held.enter_context(_given_up_late())
            self._pools = [_start_pool(workers)]
            if gpus:
                self._pools.append(_start_pool(gpus))
            self._settings = held.pop_all()  # until `close`; at once where nothing could be started

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        """End the processes."""
        for client, cluster in self._pools:
            client.close(timeout=5)
            cluster.close(timeout=10)
        self._settings.close()

    def run(
        self, task: Task, job: Any, regions: Sequence[Any], *, on_gpu: bool = False
    ) -> Iterator[Outcome]:
        client, cluster = self._pools[-1 if on_gpu else 0]
        workers = self.gpus if on_gpu and self.gpus else self.workers
        slots = IN_FLIGHT_PER_WORKER * workers
        todo = Backlog(regions, workers, slots)
        flying: dict[Any, list[tuple[Any, int]]] = {}
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # The scheduler assigns tasks one by one only where their keys make them one large group.
        group = f"{task.__name__}-{uuid4().hex}"
        keys = ((group, number) for number in count())
        try:
            while todo or flying:
                while todo and len(flying) < slots:
                    taken = todo.take()
                    names = [region for region, _ in taken]
                    future = client.submit(try_several, task, job, names, key=next(keys))
                    flying[future] = taken
                    future.add_done_callback(ended.put)
                future = self._wait(lambda: ended.get(timeout=0.05), cluster)
                taken = flying.pop(future)
                if future.status == "lost":  # done, but its worker died with what it had to say
                    for region, attempt in taken:
                        todo.put_back(region, attempt)
                    continue
                outcomes, seconds = self._outcomes(future, cluster) or _lost(future, taken)
                if seconds:
                    todo.learn(len(outcomes), seconds)
                # Where a worker died over several regions, which of them it was is not known.
                tries = self.attempts if seconds or len(taken) == 1 else max(2, self.attempts)
                for outcome, (region, attempt) in zip(outcomes, taken, strict=True):
                    if outcome.error is not None and attempt < tries:
                        todo.put_back(region, attempt + 1)
                    else:
                        yield outcome
        finally:
            if flying:
                client.cancel(list(flying))

    def _outcomes(self, future: Any, cluster: Any) -> tuple[list[Outcome], float] | None:
        """What a task brought and its seconds; None when it brought nothing."""
        from distributed.scheduler import KilledWorker

        if future.status == "finished":
            # It lies with the worker: if that dies just now, the task is done again by another.
            with contextlib.suppress(KilledWorker):
                found: tuple[list[Outcome], float] = self._wait(
                    lambda: future.result(timeout=5), cluster
                )
                return found
        return None

    def _wait(self, get: Callable[[], Any], cluster: Any) -> Any:
        """What `get` brings, looking up now and then whether to stop, and whether anyone works."""
        alone_since = None
        while not self._stop.is_set():
            with contextlib.suppress(queue.Empty, TimeoutError):
                return get()
            if cluster.scheduler.workers:
                alone_since = None
            elif alone_since is None:
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > ALONE_S:
                raise SegpipeError(
                    f"all workers ended and none came back in {ALONE_S} s; run the same command "
                    "to go on"
                )
        raise Stopped(STOPPED)


def _lost(future: Any, taken: Sequence[tuple[Any, int]]) -> tuple[list[Outcome], float]:
    """Outcomes of a task that brought none; an error wrong for all regions, or a bug, is raised."""
    from distributed.scheduler import KilledWorker

    error = future.exception() if future.status == "error" else None
    bad_data = isinstance(error, (*BAD_DATA, KilledWorker))
    if error is not None and (isinstance(error, FATAL) or not bad_data):
        raise error
    return [Outcome(region, None, describe(error)) for region, _ in taken], 0.0


def _given_up_late() -> contextlib.AbstractContextManager[Any]:
    """A setting of dask's that is asked for as long as the workers live."""
    import dask
    import distributed  # noqa: F401  its defaults would go with the setting if they came later

    setting = {"distributed.deploy.lost-worker-timeout": GIVEN_UP_AFTER}
    return cast("contextlib.AbstractContextManager[Any]", dask.config.set(setting))


def _start_pool(workers: int) -> tuple[Any, Any]:
    """A client, and the cluster of so many processes that it talks to."""
    import dask
    from distributed import Client, LocalCluster

    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(_tells_of_no_orphan)
    with dask.config.set(
        {
            "distributed.scheduler.allowed-failures": 10,
            # A death marks every task assigned to the worker: let that be the one it runs.
            "distributed.scheduler.worker-saturation": 1.0,
            "distributed.scheduler.worker-ttl": None,  # numba and torch hold the GIL at first use
            "distributed.worker.profile.enabled": False,  # of the dashboard, which nobody opens
            "distributed.worker.memory.target": False,
            "distributed.worker.memory.spill": False,
            "distributed.worker.memory.pause": False,
            "distributed.worker.memory.terminate": False,
            "distributed.admin.low-level-log-length": 100,  # messages kept, with the jobs in them
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


def _tells_of_no_orphan(record: logging.LogRecord) -> bool:
    """Whether asyncio has something to say besides that a wait for a lost task ended with the client.

    `Future.result` leaves such a wait behind when its time is up; its traceback came after Ctrl-C.
    """
    from distributed.client import AllExit

    return not (record.exc_info and isinstance(record.exc_info[1], AllExit))


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


@contextlib.contextmanager
def open_engine(kind: str, workers: int, attempts: int, gpus: int = 0) -> Iterator[Engine]:
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
            engine = LocalEngine(workers, attempts, gpus)
        except RuntimeError as error:
            raise SettingsError(
                f"processes cannot be started ({' '.join(str(error).split())}); in a script, call "
                "segpipe under `if __name__ == '__main__':`, or set engine.kind=serial"
            ) from error
    try:
        yield engine
    finally:
        engine.close()
