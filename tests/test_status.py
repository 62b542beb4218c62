"""`segpipe status`: each image's state is what predict would find, whoever was stopped where."""

from __future__ import annotations

import fcntl
import json
import threading
import time

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from fields import nuclei, run
from segpipe.cli import main
from segpipe.inputs import find_inputs
from segpipe.jobs import FOLDER, JobImage, write_job
from segpipe.records import is_locked, locked
from segpipe.stages.image import STAGES
from segpipe.stages.places import work_folder
from segpipe.status import read_status


def told(out):
    """State and stage of each image, in the order in which they are listed."""
    return {one.name: (one.state, one.at) for one in read_status(out).images}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One image in each state but `running`."""
    folder = tmp_path_factory.mktemp("in")
    nuclei(folder / "a.tif", (100, 120))
    nuclei(folder / "b.tif", (100, 120))
    torn = nuclei(folder / "torn.tif", (200, 300))
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size * 2 // 3])
    (folder / "lost.tif").write_bytes(b"II*\x00")
    nuclei(folder / "waits.tif", (100, 120))
    out = folder / "out"
    for name in ("a", "torn", "lost"):
        run(folder / f"{name}.tif", out)
    run(folder / "b.tif", out, stages=("tile",))
    find_inputs([folder / "waits.tif"], out)
    return out


def test_what_needs_a_look_comes_first_and_says_why(out):
    assert list(told(out).items()) == [
        ("lost", ("failed", None)),
        ("torn", ("failed", "tile")),
        ("b", ("unfinished", "infer")),
        ("waits", ("waiting", "tile")),
        ("a", ("done", None)),
    ]
    done = CliRunner().invoke(main, ["status", str(out)])
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("failed             lost   lost.tif: is damaged")
    assert "regions failed, the rest is done; first: tile at [" in lines[1]
    assert lines[2].split() == ["unfinished", "infer", "b", "tile", "done"]
    assert lines[-1] == "5 images: 2 failed, 1 unfinished, 1 waiting, 1 done"


def test_machines_are_told_the_same(out):
    done = CliRunner().invoke(main, ["status", str(out), "--json"])
    assert done.exit_code == 1
    content = json.loads(done.stdout)
    assert content["counts"] == {"failed": 2, "unfinished": 1, "waiting": 1, "done": 1}
    images = {one["name"]: one for one in content["images"]}
    entries = json.loads((out / "run.json").read_text())["images"]
    assert images["a"]["objects"] == entries["a"]["objects"] > 0
    assert list(images["a"]["stages"]) == list(STAGES) and images["a"]["error"] is None
    assert images["torn"]["failed_regions"] == entries["torn"]["failed_regions"]
    for name in ("torn", "lost"):
        assert images[name]["error"] in entries[name]["error"]


def test_an_image_that_a_process_holds_is_running(out):
    with locked(work_folder(out, "b"), "b"):
        assert told(out)["b"] == ("running", "infer")
        with locked(work_folder(out, "waits"), "waits"):
            assert told(out)["waits"] == ("running", "tile")
    assert told(out)["b"] == ("unfinished", "infer")


def test_to_look_is_to_write_nothing_and_to_stop_nobody(out):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    read_status(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    folder, held = work_folder(out, "a"), threading.Event()

    def glance():
        with folder.with_suffix(".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            held.set()
            time.sleep(0.02)

    looking = threading.Thread(target=glance)
    looking.start()
    held.wait()
    with locked(folder, "a"):
        assert is_locked(folder)
    looking.join()
    assert not is_locked(folder)


def test_changed_settings_leave_it_unfinished_until_measure_is_done(tmp_path):
    image, out = nuclei(tmp_path / "a.tif", (100, 120)), tmp_path / "out"
    run(image, out)
    assert told(out) == {"a": ("done", None)}
    run(image, out, "stitch.min_area=40", stages=("stitch",))
    assert told(out) == {"a": ("unfinished", "measure")}
    done = CliRunner().invoke(main, ["status", str(out)])
    assert done.exit_code == 0


def test_a_job_of_the_workflow_tells_why_before_its_end(tmp_path):
    source, out = tmp_path / "a.tif", tmp_path / "out"
    source.write_bytes(b"II*\x00")
    find_inputs([source], out)
    assert told(out) == {"a": ("waiting", "tile")}
    entry = {"status": "failed", "error": "a.tif: is damaged", "failed_regions": []}
    job = out / FOLDER / "000000-a.tile.0123.json"
    write_job(job, [JobImage("a", source, entry=entry)])
    assert told(out) == {"a": ("failed", None)}
    assert read_status(out).images[0].error == "a.tif: is damaged"


def test_a_file_that_was_refused_as_one_image_waits_no_more(tmp_path):
    stack, out = tmp_path / "s.tif", tmp_path / "out"
    pixels = np.random.default_rng(0).integers(0, 200, (2, 64, 64), np.uint8)
    tifffile.imwrite(stack, pixels, imagej=True, metadata={"axes": "ZYX"})
    assert run(stack, out).exit_code == 1
    assert told(out) == {"s": ("failed", None)}
    assert run(stack, out, "tile.z=each").exit_code == 0
    assert told(out) == {"s_z0": ("done", None), "s_z1": ("done", None)}


def test_a_folder_without_results_is_named(tmp_path):
    done = CliRunner().invoke(main, ["status", str(tmp_path)])
    assert done.exit_code == 2 and "holds no results of segpipe" in done.output
