"""Engines: the same outcomes, whatever does the work."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import dask
import psutil
import pytest
from distributed import get_worker
from distributed.client import AllExit

from segpipe.compute import (
    LocalEngine,
    SerialEngine,
    gpu_index,
)
from segpipe.errors import InputError, SegpipeError, Stopped
from segpipe.machine import default_workers, usable_cores


def double(job, region):
    return {"value": job * 2, "region": region, "pid": os.getpid()}


def fail_on_two(job, region):
    with (Path(job) / region).open("a") as tries:
        tries.write("x")
    if region == "0_2":
        raise InputError("bad\nregion")
    return {}


def wrong(job, region):
    raise KeyError("a bug")


def die_once(job, region):
    mark = Path(job) / "died"
    if region == "0_1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


NAMES = [f"0_{number}" for number in range(9)]


@pytest.fixture(scope="module")
def local():
    engine = LocalEngine(2, attempts=2, gpus=1)
    yield engine
    engine.close()


@pytest.fixture(params=["serial", "local"])
def engine(request):
    return (
        SerialEngine(attempts=2) if request.param == "serial" else request.getfixturevalue("local")
    )


def test_every_region_once_with_its_facts(engine):
    outcomes = list(engine.run(double, 21, NAMES))
    assert sorted(outcome.region for outcome in outcomes) == NAMES
    assert all(outcome.found["value"] == 42 for outcome in outcomes)
    here = {outcome.found["pid"] for outcome in outcomes} == {os.getpid()}
    assert here == isinstance(engine, SerialEngine)


def test_a_bad_region_is_tried_again_then_given_up_and_the_others_are_done(engine, tmp_path):
    outcomes = {one.region: one for one in engine.run(fail_on_two, str(tmp_path), NAMES)}
    assert outcomes["0_2"].error == "bad\nregion" and outcomes["0_2"].found is None
    assert all(outcomes[name].error is None for name in NAMES if name != "0_2")
    assert (tmp_path / "0_2").read_text() == "xx"
    assert (tmp_path / "0_3").read_text() == "x"


def test_a_bug_is_not_taken_for_bad_data(engine):
    with pytest.raises(KeyError, match="a bug"):
        list(engine.run(wrong, None, NAMES))


def test_a_worker_that_dies_is_replaced(local, tmp_path):
    outcomes = list(local.run(die_once, str(tmp_path), NAMES))
    assert sorted(one.region for one in outcomes if one.error is None) == NAMES


MANY = [f"0_{number}" for number in range(60)]


def die_on_fifty(job, region):
    if region == "0_50":
        time.sleep(0.2)  # dask does not replace a worker that dies while it starts
        os.kill(os.getpid(), signal.SIGKILL)
    with (Path(job) / region).open("a") as tries:
        tries.write("x")
    return {}


def test_a_region_that_kills_its_worker_takes_no_other_with_it(local, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "attempts", 1)  # so that nothing is forgiven
    monkeypatch.setattr(local._pools[0][1].scheduler, "allowed_failures", 0)
    outcomes = {one.region: one for one in local.run(die_on_fifty, str(tmp_path), MANY)}
    assert outcomes.keys() == set(MANY)
    assert [name for name, one in outcomes.items() if one.error] == ["0_50"]
    assert "its worker died" in outcomes["0_50"].error


class Scripted:
    """A client, and the cluster that it talks to, whose tasks end as told."""

    def __init__(self, statuses):
        self.statuses = iter(statuses)
        self.scheduler = self
        self.workers = ["one"]

    def submit(self, function, *arguments, key):
        client = self

        class Future:
            status = next(client.statuses)

            def add_done_callback(self, call):
                call(self)

            def result(self, timeout):
                return function(*arguments)

        return Future()

    def cancel(self, futures):
        pass


def scripted_engine(monkeypatch, statuses):
    client = Scripted(statuses)
    monkeypatch.setattr("segpipe.compute._start_pool", lambda workers: (client, client))
    return LocalEngine(1, attempts=1), client


def die_after_a_while(job, region):
    if region == "0_3":
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_a_worker_that_dies_again_and_again_is_replaced_as_often():
    """Dask looks once, 15 s after a death, whether the worker is there, and would give it up."""
    before = dask.config.get("distributed.deploy.lost-worker-timeout")
    engine = LocalEngine(1, attempts=3)
    try:
        outcomes = list(engine.run(die_after_a_while, None, NAMES))
    finally:
        engine.close()
    assert dask.config.get("distributed.deploy.lost-worker-timeout") == before
    assert sorted(one.region for one in outcomes) == NAMES
    assert [one.region for one in outcomes if one.error is not None] == ["0_3"]


def test_a_result_that_dies_with_its_worker_is_no_failed_try(monkeypatch):
    engine, _ = scripted_engine(monkeypatch, ["lost", "lost", *["finished"] * 9])
    outcomes = list(engine.run(double, 21, NAMES))
    assert sorted(outcome.region for outcome in outcomes) == NAMES
    assert all(outcome.found["value"] == 42 for outcome in outcomes)


def test_a_pool_that_is_empty_for_good_is_an_error_and_no_endless_wait(monkeypatch):
    engine, client = scripted_engine(monkeypatch, ["finished"])
    client.workers = []
    monkeypatch.setattr("segpipe.compute.ALONE_S", 0.2)
    monkeypatch.setattr(client, "submit", lambda *_, **__: Mock())  # never ends
    with pytest.raises(SegpipeError, match="none came back"):
        list(engine.run(double, 21, NAMES))


def which_task(job, region):
    return {"task": get_worker().get_current_task()}


def test_quick_regions_share_a_task(local):
    names = [f"0_{number}" for number in range(400)]
    outcomes = list(local.run(which_task, None, names))
    assert sorted(one.region for one in outcomes) == sorted(names)
    assert len({one.found["task"] for one in outcomes}) < len(names) / 2


def test_a_bad_region_among_quick_ones_is_tried_as_often_as_alone(engine, tmp_path):
    outcomes = {one.region: one for one in engine.run(fail_on_fifty, str(tmp_path), MANY)}
    assert outcomes.keys() == set(MANY)
    assert [name for name, one in outcomes.items() if one.error] == ["0_50"]
    tries = {path.name: len(path.read_text()) for path in tmp_path.iterdir()}
    assert tries == dict.fromkeys(MANY, 1) | {"0_50": 2}


def fail_on_fifty(job, region):
    with (Path(job) / region).open("a") as tries:
        tries.write("x")
    if region == "0_50":
        raise InputError("bad")
    return {}


def gpu_of(job, region):
    return {"pid": os.getpid(), "gpu": gpu_index()}


def test_what_needs_a_gpu_goes_to_the_worker_that_owns_it_also_after_its_death(local, tmp_path):
    before = list(local.run(gpu_of, None, NAMES, on_gpu=True))
    assert {one.found["gpu"] for one in before} == {0}
    assert len({one.found["pid"] for one in before}) == 1
    assert len(list(local.run(die_once, str(tmp_path), NAMES, on_gpu=True))) == len(NAMES)
    after = list(local.run(gpu_of, None, NAMES, on_gpu=True))
    assert {one.found["gpu"] for one in after} == {0}
    assert {one.found["pid"] for one in after} != {one.found["pid"] for one in before}
    others = {one.found["pid"] for one in local.run(gpu_of, None, NAMES * 3)}
    assert len(others) == 2 and not others & {one.found["pid"] for one in [*before, *after]}


def test_everything_listens_on_the_loopback_alone(local):
    here = psutil.Process()
    listening = [
        connection.laddr.ip
        for process in [here, *here.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 4
    assert set(listening) <= {"127.0.0.1", "::1"}


def test_a_wait_that_a_lost_task_leaves_behind_is_no_traceback(local, caplog):
    """After Ctrl-C in a process group, asyncio told of it as of an exception that nobody retrieved."""
    asyncio_log = logging.getLogger("asyncio")
    for error in (AllExit(), ValueError("of another kind")):
        asyncio_log.error("never retrieved", exc_info=(type(error), error, None))
    assert [record.exc_info[0] for record in caplog.records] == [ValueError]


def test_stop_takes_no_more_regions():
    engine = SerialEngine()
    seen = []
    with pytest.raises(Stopped):
        for outcome in engine.run(double, 1, NAMES):
            seen.append(outcome.region)
            engine.stop()
    assert seen == ["0_0"]


def test_the_number_of_workers_follows_cores_and_memory():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert default_workers(1) == usable_cores()
    assert default_workers(10**18) == 1
