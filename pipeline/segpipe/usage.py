"""What a command uses: seconds, seconds of CPU, and the memory of every process that it starts."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_S = 0.1


@dataclass(frozen=True)
class Usage:
    """Of one command with all its processes.

    seconds
        From start to end.
    cpu_seconds
        User and system, of the command and of every process that it waited for.
    peaks_bytes
        Of each process, largest first: the resident set, without pages of files and shared memory,
        which the kernel can take back or counts several times. Sampled, so a peak shorter than a
        tenth of a second may be missed.
    peak_bytes
        The peak of their sum.
    """

    seconds: float
    cpu_seconds: float
    peaks_bytes: tuple[int, ...]
    peak_bytes: int


def watch(
    command: Sequence[str], environment: Mapping[str, str] | None = None, log: Path | None = None
) -> Usage:
    """Run a command to its end; its output goes where this process's goes, or into `log`.

    Raises
    ------
    subprocess.CalledProcessError
        When it exits with another code than 0.
    """
    started = time.perf_counter()
    with (log or Path(os.devnull)).open("ab") as opened:
        target = None if log is None else opened
        process = subprocess.Popen(command, env=environment, stdout=target, stderr=target)  # noqa: S603
    peaks: dict[int, int] = {}
    together = 0
    try:
        root = psutil.Process(process.pid)
        # Not Popen.poll: what it reaps takes the seconds of CPU with it.
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            used = memory_of(root)
            together = max(together, sum(used.values()))
            peaks.update({pid: max(peaks.get(pid, 0), size) for pid, size in used.items()})
            time.sleep(SAMPLE_S)
    except BaseException:
        process.kill()
        process.wait()
        raise
    seconds = time.perf_counter() - started
    _, status, spent = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    ordered = tuple(sorted(peaks.values(), reverse=True))
    return Usage(seconds, spent.ru_utime + spent.ru_stime, ordered, together)


def why_it_ended(log: Path) -> str:
    """The first error in the log of a command that failed, or else its last line."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
    return next((line for line in lines if " ERROR " in line), lines[-1])


def memory_of(root: psutil.Process) -> dict[int, int]:
    """Bytes of a process and of all below it, by id; what has just ended is left out."""
    found: dict[int, int] = {}
    try:
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for one in family:
        try:
            memory = one.memory_info()
        except psutil.Error:
            continue
        found[one.pid] = memory.rss - getattr(memory, "shared", 0)  # Linux alone tells it
    return found
