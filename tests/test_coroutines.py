"""zarr's coroutines in the thread that asks: same pixels, in any thread, also in one whose own event
loop runs, and no thread and no loop that is left over."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from segpipe import coroutines
from segpipe.coroutines import run_here
from segpipe.errors import SegpipeError
from segpipe.geometry import Box
from segpipe.store import Grid, create_array, read_box, write_shard

ALL = Box(0, 0, 96, 80)


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "a"
    create_array(path, (2,), Grid((96, 80), (96, 96), (32, 32)), np.dtype(np.uint16))
    pixels = np.random.default_rng(0).integers(0, 9999, (2, 96, 80)).astype(np.uint16)
    write_shard(path, ALL, pixels)
    return path, pixels


async def thread_of_a_thread():
    return await asyncio.to_thread(threading.get_ident)


def test_what_would_go_to_another_thread_stays_in_this_one():
    assert run_here(thread_of_a_thread()) == threading.get_ident()


def test_pixels_are_read_where_an_event_loop_runs_as_in_a_notebook(stored):
    path, pixels = stored

    async def cell():
        return read_box(path, ALL)

    assert np.array_equal(asyncio.run(cell()), pixels)


def test_threads_read_at_the_same_time(stored):
    path, pixels = stored
    boxes = [Box(y, x, y + 30, x + 20) for y in range(0, 60, 7) for x in range(0, 60, 9)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda box: read_box(path, box), boxes * 4))
    for box, part in zip(boxes * 4, found, strict=True):
        assert np.array_equal(part, pixels[(..., *box.slices)])
    assert 1 <= len(coroutines._idle) <= 9


def test_an_error_takes_its_loop_along_and_the_next_call_works(stored):
    path, pixels = stored
    file = path / "c" / "0" / "0" / "0"
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))
    begun = []

    async def fails():
        begun.append(asyncio.ensure_future(asyncio.sleep(60)))
        await asyncio.sleep(0)
        raise OSError("no")

    with pytest.raises(SegpipeError, match="damaged"):
        read_box(path, ALL)
    with pytest.raises(OSError, match="no"):
        run_here(fails())
    assert begun[0].cancelled()
    file.write_bytes(whole)
    assert np.array_equal(read_box(path, ALL), pixels)
