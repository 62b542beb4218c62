"""`segpipe doctor`: what works is ok, what can be done without is missing, what is broken a problem."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from segpipe import doctor
from segpipe.cli import main
from segpipe.doctor import MISSING, OK, PROBLEM, examine

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def by_key(*arguments):
    return {one.key: one for one in examine(*arguments)}


def ask(*arguments):
    done = CliRunner().invoke(main, ["doctor", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_here_all_is_well_and_machines_are_told_the_same(tmp_path):
    done = ask("-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.stdout
    told = json.loads(done.stdout)
    assert told["problems"] == []
    assert told["versions"]["torch"] == metadata.version("torch")
    states = {one["key"]: one["state"] for one in told["findings"]}
    assert states["output"] == states["device"] == states["snakefile"] == OK
    assert list(tmp_path.iterdir()) == []
    models = next(one["text"] for one in told["findings"] if one["key"] == "models")
    assert models == "nuclei-fluorescence, nuclei-he"


def test_every_extra_for_users_is_looked_for_and_is_here():
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    assert set(doctor.EXTRAS) == set(extras) - {"test", "dev", "docs"}
    found = by_key()
    assert {found[f"[{extra}]"].state for extra in doctor.EXTRAS} == {OK}


def test_what_it_can_do_without_is_missing_and_no_problem(monkeypatch):
    here = importlib.util.find_spec
    absent = {"openvino", "snakemake", "bioimageio.spec"}
    monkeypatch.setitem(doctor.EXTRAS, "wsi", (("segpipe.slide.no_such_reader",), "slides"))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else here(name)
    )
    found = by_key()
    for key, remedy in {
        "backend": "pip install openvino",
        "[wsi]": "pip install 'segpipe[wsi]'",
        "[workflow]": "pip install 'segpipe[workflow]'",
        "[export]": "pip install 'segpipe[export]'",
    }.items():
        assert (found[key].state, found[key].remedy) == (MISSING, remedy)
        assert found[key].line().startswith(f"{key:<12}missing: ") and remedy in found[key].line()
    assert found["[anndata]"].state == OK
    assert ask().exit_code == 0


def test_whether_anything_can_be_kept_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("SEGPIPE_CACHE", str(tmp_path))
    assert by_key()["cache"].line() == f"cache       {tmp_path / 'segpipe'}: 0 kB"
    assert list((tmp_path / "segpipe").iterdir()) == []
    monkeypatch.setenv("SEGPIPE_CACHE", "/proc/none")
    found = by_key()["cache"]
    assert found.state == MISSING and "SEGPIPE_CACHE" in found.remedy


def test_a_gpu_that_torch_does_not_see_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path / "version")
    assert "gpu" not in by_key()
    (tmp_path / "version").write_text("NVRM")
    found = by_key()
    assert found["gpu"].state == MISSING and "CUDA_VISIBLE_DEVICES" in found["gpu"].remedy


def test_a_device_that_cannot_add_is_a_problem(monkeypatch):
    def broken(name):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr("segpipe.segmenter.devices.choose_device", broken)
    done = ask()
    assert done.exit_code == 1
    assert "device      problem: CUDA error: no kernel image is available; install" in done.stdout


def test_a_package_that_is_not_there_is_a_problem(monkeypatch):
    required = ["zarr>=3", "no-such-thing>=1", "x; extra == 'y'"]
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    found = by_key()
    assert found["packages"].state == PROBLEM
    assert found["packages"].remedy == "pip install no-such-thing"


def test_a_model_that_cannot_be_used_is_named(monkeypatch, tmp_path):
    (tmp_path / "mine.safetensors").write_bytes(b"\x00" * 20)
    monkeypatch.setenv("SEGPIPE_MODELS", str(tmp_path))
    done = ask()
    assert done.exit_code == 1 and str(tmp_path / "mine.safetensors") in done.stdout
    assert "models      nuclei-fluorescence, nuclei-he" in done.stdout
    monkeypatch.setenv("SEGPIPE_MODELS", str(tmp_path / "nowhere"))
    assert by_key()["models"].state == PROBLEM


def no_locks(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.mark.parametrize("case", ["a file", "no locks", "no room"])
def test_a_folder_in_which_runs_would_fail_is_a_problem(case, monkeypatch, tmp_path):
    out = tmp_path / "out"
    if case == "a file":
        out.write_bytes(b"")
    elif case == "no locks":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    else:
        monkeypatch.setattr(doctor, "LITTLE_BYTES", 1e30)
    found = by_key(out)["output"]
    assert found.state == PROBLEM and str(tmp_path) in found.line()
