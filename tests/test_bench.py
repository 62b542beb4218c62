"""`segpipe bench`: what it prints is what it writes; shares are what they are said to be."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fields import SIZES, nuclei, run, threshold_model
from segpipe import bench
from segpipe.bench_row import HEADER, Row
from segpipe.cli import main
from segpipe.floors import Floor, measure_floor
from segpipe.inputs import Input
from segpipe.prepare import prepare
from segpipe.settings import load_settings
from segpipe.stages.image import STAGES
from segpipe.usage import Usage


def run_bench(*arguments: object):
    return CliRunner().invoke(main, ["bench", *(str(argument) for argument in arguments)])


def test_the_json_holds_what_was_printed_and_neither_host_nor_path(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "STARTS", 1)
    told, model = tmp_path / "bench.json", threshold_model()
    sets = ("-s", "infer.backend=eager", "-s", "stitch.min_area=7")
    result = run_bench(
        *("--size", 512, "--workers", 1, "-m", model, "--device", "cpu", "-o", told, *sets)
    )
    assert result.exit_code == 0, result.output
    content = json.loads(told.read_text())
    rows = [Row(**row) for row in content["stages"]]
    assert [row.stage for row in rows] == [*STAGES, "all"]
    lines = result.stdout.splitlines()
    assert lines[lines.index(HEADER) + 1 :] == [row.line() for row in rows]
    for row in rows:
        assert row.clock == "cpu" and row.floor_s > 0 and row.start_s > 0
        assert math.isclose(row.mpx_per_s, 0.512**2 / row.seconds, rel_tol=2e-3)
        assert 20e6 < row.peak_bytes <= row.peak_all_bytes
        # with so few pixels, starting again may take longer than starting and the work
        assert row.share is None or (math.isfinite(row.share) and row.share > 0)
    assert content["model"]["name"] == "threshold" and len(content["model"]["hash"]) >= 16
    assert content["size"] == 512 and content["workers"] == 1
    assert content["settings"] == {
        "infer.device": "cpu",
        "infer.backend": "eager",
        "stitch.min_area": 7,
    }
    assert content["versions"]["numpy"] == np.__version__
    assert content["machine"]["gpu"] is None and content["machine"]["cores"] >= 1
    for secret in (str(Path.home()), str(tmp_path), str(model.parent), "/tmp"):  # noqa: S108
        assert secret not in told.read_text()


def test_floors_of_several_processes(tmp_path):
    source = nuclei(tmp_path / "a.tif", (150, 200))
    run(source, tmp_path / "out")
    settings = load_settings(overrides=[*SIZES, "infer.device=cpu"])
    image = prepare([Input("a", source)], tmp_path / "out", settings).images[0]
    for stage in STAGES:
        floor = measure_floor(stage, image, source, tmp_path, 2)
        assert 0 < floor.cpu_seconds < 60 and 0 < floor.seconds < 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tif", "out"]


def used(seconds: float, cpu: float, *peaks: int) -> Usage:
    return Usage(seconds, cpu, peaks, sum(peaks))


def test_rate_and_share_leave_starting_out():
    row = Row.of("tile", 8_000_000, used(4, 6, 30, 20), used(2, 2), Floor(0.5, 1))
    assert (row.mpx_per_s, row.mpx_per_core_s, row.share) == (2.0, 2.0, 0.25)
    assert (row.start_s, row.floor_s, row.peak_bytes, row.peak_all_bytes) == (2.0, 1.0, 30, 50)
    assert "25.0%" in row.line()


def test_a_gpu_is_measured_by_the_wall():
    row = Row.of("infer", 8_000_000, used(4, 6, 30), used(2, 2), Floor(0.5, 1), "wall")
    assert (row.start_s, row.floor_s, row.share, row.mpx_per_core_s) == (2.0, 0.5, 0.25, 2.0)


def test_what_drowns_in_starting_is_not_told():
    row = Row.of("tile", 1000, used(2, 2, 30), used(2, 2.1), Floor(0.5, 1))
    assert row.share is None and row.mpx_per_core_s is None
    assert row.line().count(" -") == 2


@pytest.fixture
def unstarted(monkeypatch):
    def rows_of(*_: object):
        raise AssertionError("the job was started")

    monkeypatch.setattr(bench, "rows_of", rows_of)


@pytest.mark.parametrize("where", ["none/bench.json", "."])
def test_a_json_that_cannot_be_written_is_said_first(where, tmp_path, unstarted):
    result = run_bench("--size", 512, "-o", tmp_path / where)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"cannot write {tmp_path / where}" in result.stderr


def test_no_space_is_said_first(tmp_path, unstarted, monkeypatch):
    space = namedtuple("space", "total used free")
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda _: space(10**9, 0, 10**7))
    result = run_bench("--size", 4096, "--workers", 1)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert "TMPDIR" in result.stderr and "0.3 GB" in result.stderr


def test_a_model_of_other_channels_is_refused_first(rgb_model, unstarted):
    result = run_bench("-m", rgb_model)
    assert result.exit_code == 2 and "untrained-rgb takes 3" in result.stderr


def test_a_stage_that_fails_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(bench, "STARTS", 1)
    result = run_bench("--size", 64, "-m", threshold_model(), "-s", "tile.channel=DAPI")
    assert result.exit_code == 2 and "segpipe: " in result.stderr.splitlines()[-1]
    assert "DAPI" in result.stderr.splitlines()[-1]
