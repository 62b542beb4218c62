"""What a command used: against commands that use a known amount."""

from __future__ import annotations

import subprocess
import sys

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
