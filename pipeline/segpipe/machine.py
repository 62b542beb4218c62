"""How much of this machine this process may use."""

from __future__ import annotations

import functools
import os
import platform
import resource
from pathlib import Path


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
    available = memory_bytes()
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    limit = memory_limit_bytes()
    return available if limit is None else min(available, limit)


def memory_limit_bytes() -> int | None:
    """The cgroup's limit; None where there is none."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return None if limit == "max" else int(limit)
    except (OSError, ValueError):
        return None


def default_workers(bytes_per_worker: int, client_bytes: int = 0) -> int:
    """Processes that cores and memory allow beside the client. Their number cannot change a result."""
    return max(1, min(usable_cores(), (usable_memory_bytes() - client_bytes) // bytes_per_worker))


def memory_bytes() -> int:
    """Memory of this machine, used or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """Most memory that this process ever had: its resident set, pages of files included."""
    # On Linux this may tell of the process that started this one, while that was the larger one.
    told = _resource_peak_bytes()
    return told if told > _inherited_bytes() else _status_peak_bytes() or told


def _resource_peak_bytes() -> int:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@functools.cache
def _inherited_bytes() -> int:
    """The peak that is that of another process; 0 where it is this one's own."""
    told, own = _resource_peak_bytes(), _status_peak_bytes()
    return 0 if own is None or own >= told else told


def _status_peak_bytes() -> int | None:
    """The peak of this process alone, where the system tells it; takes twenty times as long."""
    try:
        with Path("/proc/self/status").open("rb", buffering=0) as file:
            _, _, told = file.read().partition(b"VmHWM:")
        return int(told.split(maxsplit=1)[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None


def cpu_name() -> str:
    """What the CPU calls itself; its architecture where it does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
