"""What a command used, and what this process did: against what is known to use as much."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from segpipe.usage import watch

PARENT_AND_CHILD = """
import multiprocessing, time
def work(size):
    held = b"x" * size
    end = time.process_time() + 0.5
    while time.process_time() < end:
        pass
    time.sleep(0.4)
if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=work, args=(90_000_000,))
    child.start()
    work(40_000_000)
    child.join()
"""


def test_seconds_and_memory_of_a_command_and_its_child():
    used = watch([sys.executable, "-c", PARENT_AND_CHILD])
    assert 1.0 <= used.cpu_seconds < 2.0
    assert used.seconds >= 0.9
    child, parent = used.peaks_bytes
    assert 90e6 < child < 120e6 and 40e6 < parent < 70e6
    assert 130e6 < used.peak_bytes <= child + parent


def test_output_goes_into_the_log_and_a_failure_is_an_error(tmp_path):
    log = tmp_path / "log"
    watch([sys.executable, "-c", "print('first')"], log=log)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        watch([sys.executable, "-c", "import sys; sys.exit('second')"], log=log)
    assert caught.value.returncode == 1
    assert log.read_text() == "first\nsecond\n"


def test_the_peak_is_that_of_this_process_and_not_of_the_one_that_started_it():
    program = (
        "from segpipe.machine import peak_memory_bytes as peak\n"
        "first = peak()\n"
        "held = b'x' * 300_000_000\n"
        "second = peak()\n"
        "del held\n"
        "print(first, second, peak())"
    )
    large = np.ones(10**8)  # 800 MB
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert large.all()
    first, second, third = map(int, done.stdout.split())
    assert first < 300_000_000
    assert first + 250_000_000 < second < 700_000_000
    assert abs(third - second) < 0.01 * second  # the system counts pages in lots
