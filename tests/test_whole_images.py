"""Images of one region are done whole by one worker: the same bytes, errors, and lines in the log as
pass by pass, also when the worker dies."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from dataclasses import replace

import pytest

import segpipe.run
from fields import SIZES, nuclei, run, same_results
from segpipe.compute import LocalEngine, SerialEngine
from segpipe.errors import SegpipeError, SettingsError, Stopped
from segpipe.image_run import Work
from segpipe.inputs import find_inputs
from segpipe.prepare import prepare
from segpipe.records import locked
from segpipe.settings import load_settings
from segpipe.stages.image import STAGES
from segpipe.whole_images import divided, run_whole

LOCAL = ("engine.kind=local", "engine.workers=2")
WORK = Work(STAGES, restart=False, attempts=2, wait=False)


class Seen:
    """Progress that is kept."""

    def __init__(self) -> None:
        self.pixels: dict[tuple[str, str], int] = {}

    def start(self, image, stage):
        pass

    def advance(self, image, stage, pixels):
        self.pixels[image, stage] = self.pixels.get((image, stage), 0) + pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten small images, one of several regions, one of which the pixels are lacking."""
    folder = tmp_path_factory.mktemp("small")
    for number in range(10):
        nuclei(folder / f"{number}.tif", (100 + number, 120), seed=number)
    nuclei(folder / "large.tif", (300, 200), seed=20)
    data = nuclei(folder / "bad.tif", (128, 128), seed=21).read_bytes()
    (folder / "bad.tif").write_bytes(data[: len(data) // 2])
    return folder


@pytest.fixture(scope="module")
def serial(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("serial")
    return out, run(folder, out)


@pytest.fixture(scope="module")
def engine():
    engine = LocalEngine(1, attempts=3)
    yield engine
    engine.close()


def prepared_todo(folder, out):
    settings = load_settings(None, SIZES)
    prepared = prepare(find_inputs([folder], out), out, settings)
    return [(image, list(STAGES)) for image in prepared.images]


def test_same_bytes_errors_and_lines_as_pass_by_pass(folder, serial, tmp_path, caplog):
    caplog.set_level(logging.INFO, "segpipe")
    result = run(folder, tmp_path / "out", *LOCAL)
    reference, expected = serial
    same_results(tmp_path / "out", reference)
    assert [one.name for one in result.failed] == ["bad"]
    assert [one.error for one in result.failed] == [one.error for one in expected.failed]
    assert len(result.images) == 12
    told = [record.getMessage() for record in caplog.records]
    for name in [*map(str, range(10)), "large"]:
        for stage in STAGES:
            lines = [one for one in told if one.startswith(f"{name}: {stage}: regions")]
            assert len(lines) == 1, (name, stage)
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert any("bad" in one.getMessage() for one in errors)


def test_which_images_are_handed_out_whole(folder, tmp_path, engine):
    todo = prepared_todo(folder, tmp_path)
    whole, passes = divided(todo, WORK, engine)
    assert {image.name for image, _ in passes} == {"large"}
    assert len(whole) + len(passes) == len(todo) >= 11
    assert divided(todo, WORK, SerialEngine()) == ([], todo)
    waits = replace(WORK, wait=True)
    three = next(image for image, _ in todo if image.name == "3")
    with locked(three.work, three.name):  # by what may be another job: no worker waits for it
        for work, expected in ((WORK, {"large"}), (waits, {"large", "3"})):
            _, passes = divided(todo, work, engine)
            assert {image.name for image, _ in passes} == expected


def test_a_worker_that_dies_over_images_loses_none(folder, serial, tmp_path, engine, caplog):
    whole, _ = divided(prepared_todo(folder, tmp_path), WORK, engine)
    whole = [one for one in whole if one[0].name != "bad"]
    client, _ = engine._pools[0]
    killed = []

    def kill() -> None:
        while not list((tmp_path / "manifests").glob("*.tile.json")):
            time.sleep(0.002)
        for worker in client.run(os.getpid).values():
            os.kill(worker, signal.SIGKILL)
            killed.append(worker)

    killer = threading.Thread(target=kill)
    killer.start()
    seen = Seen()
    caplog.set_level(logging.INFO, "segpipe")
    results = run_whole(whole, WORK, engine, seen)
    killer.join()
    told = [record.getMessage() for record in caplog.records]
    for number in range(10):
        assert any(line.startswith(f"{number}: ") for line in told), number
    assert killed
    assert sorted(one.name for one in results) == [str(number) for number in range(10)]
    assert {one.status for one in results} == {"done"}
    areas = {image.name: image.layout.plane[0] * image.layout.plane[1] for image, _ in whole}
    assert seen.pixels == {(name, stage): areas[name] for name in areas for stage in STAGES}
    reference, _ = serial
    for name in areas:
        ours, theirs = (out / f"{name}.parquet" for out in (tmp_path, reference))
        assert ours.read_bytes() == theirs.read_bytes()


def test_an_image_that_another_process_holds_is_refused_or_waited_for(folder, tmp_path, engine):
    whole, _ = divided(prepared_todo(folder, tmp_path), WORK, engine)
    image, stages = next(one for one in whole if one[0].name == "3")
    waits = replace(WORK, wait=True)
    with locked(image.work, image.name):
        (refused,) = run_whole([(image, stages)], WORK, engine, Seen())
        waiter = threading.Thread(
            target=lambda: done.extend(run_whole([(image, stages)], waits, engine, Seen()))
        )
        done: list = []
        waiter.start()
        time.sleep(1)
        assert not done
    waiter.join(60)
    assert "another segpipe is working on it" in refused.error
    assert [one.status for one in done] == ["done"]


def test_with_gpus_infer_goes_to_their_workers_and_the_rest_to_others(
    folder, serial, tmp_path, monkeypatch
):
    engine = LocalEngine(1, attempts=2, gpus=1)
    asked: list[tuple[tuple[str, ...], bool, int]] = []
    do = engine.run

    def note(task, work, images, *, on_gpu=False):
        asked.append((work.stages, on_gpu, len(images)))
        return do(task, work, images, on_gpu=on_gpu)

    monkeypatch.setattr(engine, "run", note)
    whole, _ = divided(prepared_todo(folder, tmp_path), WORK, engine)
    try:
        results = run_whole(whole, WORK, engine, Seen())
    finally:
        engine.close()
    done = [one.name for one in results if one.status == "done"]
    assert sorted(done) == [str(number) for number in range(10)]
    assert [one.name for one in results if one.status == "failed"] == ["bad"]
    assert sorted(asked) == sorted(
        [(("tile",), False, 2)] * 5
        + [(("tile",), False, 1)]
        + [(("infer",), True, count) for count in sent(asked)]
        + [(("stitch", "measure"), False, count) for count in sent(asked)]
    )
    assert sum(sent(asked)) == 10
    reference, _ = serial
    for name in done:
        ours, theirs = (out / f"{name}.parquet" for out in (tmp_path, reference))
        assert ours.read_bytes() == theirs.read_bytes()


def sent(asked):
    """How many images of each batch were inferred: those that could be read."""
    return sorted(count for _, on_gpu, count in asked if on_gpu)


def test_restart_forgets_once_and_not_whenever_a_worker_dies(folder, tmp_path, engine, monkeypatch):
    whole, _ = divided(prepared_todo(folder, tmp_path), WORK, engine)
    assert len(run_whole(whole, WORK, engine, Seen())) == 11
    work_seen = []
    do = engine.run

    def note(task, work, images, *, on_gpu=False):
        work_seen.append(work)
        left = [path.name for path in (tmp_path / "manifests").glob("*.tile.json")]
        assert left == [f"{held.name}.tile.json"]
        return do(task, work, images, on_gpu=on_gpu)

    monkeypatch.setattr(engine, "run", note)
    held = whole[0][0]
    with locked(held.work, held.name):
        results = run_whole(whole[1:] + whole[:1], replace(WORK, restart=True), engine, Seen())
    assert [one.restart for one in work_seen] == [False]
    failed = {one.name for one in results if one.status == "failed"}
    assert failed == {"bad", held.name} and len(results) == 11


def test_when_no_workers_are_left_the_rest_is_named(folder, tmp_path, engine, monkeypatch):
    whole, _ = divided(prepared_todo(folder, tmp_path), WORK, engine)
    do = engine.run

    def run_two(task, work, images, *, on_gpu=False):
        yield from do(task, work, images[:2], on_gpu=on_gpu)
        raise SegpipeError("all workers ended")

    monkeypatch.setattr(engine, "run", run_two)
    results = run_whole(whole, WORK, engine, Seen())
    assert len(results) == 11
    assert sum(one.status == "done" for one in results) == 2
    assert sum("all workers ended" in (one.error or "") for one in results) == 9


@pytest.mark.parametrize(("asked", "error"), [(True, Stopped), (False, SettingsError)])
def test_ctrl_c_while_the_workers_start_is_no_wrong_setting(
    folder, tmp_path, monkeypatch, asked, error
):
    """It reaches the processes that start too, and ends them."""

    def fails(*_):
        if asked:
            signal.raise_signal(signal.SIGINT)
        raise SettingsError("processes cannot be started")

    monkeypatch.setattr(segpipe.run, "open_engine", fails)
    with pytest.raises(error):
        run(folder, tmp_path / "out", *LOCAL)
