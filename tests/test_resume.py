"""Kill -9 at any moment: after a rerun the same bytes, and nothing done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from fields import SIZES, labels_of, nuclei, run, same_results, table_of
from segpipe.records import drop_records, read_records
from segpipe.stages.image import STAGES

SHAPE = (300, 420)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return nuclei(tmp_path_factory.mktemp("in") / "field.tif", SHAPE)


@pytest.fixture(scope="module")
def reference(image, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert run(image, out).exit_code == 0
    return out


DIE = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from fields import run
from segpipe import records

seen, add = 0, records.Records.add

def dying(self, region, shard=None, payload=None, **facts):
    global seen
    if self.name == {pass_name!r}:
        seen += 1
    last = self.name == {pass_name!r} and seen == {number}
    if last and {moment!r} == "before the record":
        os.kill(os.getpid(), signal.SIGKILL)
    made = add(self, region, shard, payload, **facts)
    if last and {moment!r} == "within the record":
        os.truncate(self.folder / made.file, made.offset + 60)
    if last and {moment!r} == "within its arrays":
        os.truncate(self.folder / made.file, (self.folder / made.file).stat().st_size - 1)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
    return made

records.Records.add = dying
run(Path({image!r}), Path({out!r}))
"""


PAUSE = """
import sys
sys.path.insert(0, {tests!r})
from fields import SIZES
from segpipe.cli import main
if __name__ == "__main__":
    sets = [part for size in (*SIZES, "tile.region=64") for part in ("-s", size)]
    main(["predict", sys.argv[1], "-o", sys.argv[2], *sets, "--engine", "{engine}", "--workers", "2"])
"""


def records_of(out: Path) -> Counter:
    """How often each region of each pass was recorded."""
    found: Counter = Counter()
    for folder in (out / ".segpipe").glob("*.work/records/*"):
        found.update((one.pass_name, one.region) for one in read_records(folder) if one.region)
    return found


@pytest.mark.parametrize(
    ("pass_name", "number", "moment"),
    [
        ("tile", 1, "before the record"),
        ("tile", 3, "after the record"),
        ("infer", 1, "before the record"),
        ("infer", 2, "within the record"),
        ("components", 1, "within its arrays"),
        ("components", 2, "after the record"),
        ("grow-0", 1, "before the record"),
        ("grow-0", 4, "after the record"),
        ("sums", 2, "before the record"),
        ("measure-level1", 1, "before the record"),
    ],
)
def test_the_whole_run_is_killed(image, reference, tmp_path, pass_name, number, moment):
    script = DIE.format(
        tests=str(Path(__file__).parent),
        pass_name=pass_name,
        number=number,
        moment=moment,
        image=str(image),
        out=str(tmp_path),
    )
    died = subprocess.run([sys.executable, "-c", script], check=False, timeout=300)
    assert died.returncode == -signal.SIGKILL
    before = records_of(tmp_path)
    assert run(image, tmp_path).exit_code == 0
    np.testing.assert_array_equal(labels_of(tmp_path, "field"), labels_of(reference, "field"))
    assert table_of(tmp_path, "field").equals(table_of(reference, "field"))
    after = records_of(tmp_path)
    assert set(before) <= set(after)
    assert set(after.values()) == {1}, "a region was done twice"


def test_a_worker_is_killed(image, tmp_path):
    """A worker dies in the middle of infer; the run goes on with another and gives the same bytes."""
    slow = "infer.model=nuclei-fluorescence"
    assert run(image, tmp_path / "whole", slow).exit_code == 0
    sets = [part for size in (*SIZES, slow) for part in ("-s", size)]
    command = [
        "predict",
        str(image),
        "-o",
        str(tmp_path / "out"),
        *sets,
        "--engine",
        "local",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "segpipe.cli", *command],
        stderr=subprocess.PIPE,
        text=True,
    )
    killed = False
    while process.poll() is None:
        done = Counter(pass_name for pass_name, _ in records_of(tmp_path / "out"))
        if done["infer"] >= 1 and not killed:
            workers = [
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if "spawn_main" in " ".join(child.cmdline())
            ]
            workers[0].send_signal(signal.SIGKILL)
            killed = True
        time.sleep(0.01)
    _, errors = process.communicate()
    assert killed
    assert process.returncode == 0, errors
    whole = labels_of(tmp_path / "whole", "field")
    np.testing.assert_array_equal(labels_of(tmp_path / "out", "field"), whole)


def test_a_torn_shard_is_done_again_and_only_that(image, reference, tmp_path):
    assert run(image, tmp_path, stages=("tile", "infer")).exit_code == 0
    shards = sorted((tmp_path / ".segpipe/field.work/probabilities.zarr/c").rglob("*/*/*"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    (tmp_path / "manifests/field.infer.json").unlink()
    before = records_of(tmp_path)
    assert run(image, tmp_path).exit_code == 0
    assert shards[1].read_bytes() == whole
    infers = {key: count for key, count in records_of(tmp_path).items() if key[0] == "infer"}
    assert infers == {key: 1 for key in before if key[0] == "infer"}
    np.testing.assert_array_equal(labels_of(tmp_path, "field"), labels_of(reference, "field"))


DAMAGES = {
    "lost": lambda content: None,
    "empty": lambda content: b"",
    "torn": lambda content: content[: len(content) // 2],
    "zeros": lambda content: content[: len(content) // 2] + bytes(-(-len(content) // 2)),
}
"""What a power failure may leave of a file that nobody waited for."""


def damage(path: Path, how: str) -> None:
    content = DAMAGES[how](path.read_bytes())
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["empty", "torn", "zeros"])
def test_whatever_a_power_failure_leaves_of_what_is_not_waited_for(tmp_path, how):
    image, whole = nuclei(tmp_path / "field.tif", (140, 100)), tmp_path / "whole"
    assert run(image, whole, "measure.preview=true").exit_code == 0
    manifests = [f"manifests/field.{stage}.json" for stage in STAGES]
    records = [f".segpipe/field.work/records/{stage}/*" for stage in STAGES]
    results = ["field.parquet", "field.png"]
    for number, damaged in enumerate(
        [manifests, [*manifests, *records], results, [*manifests[2:], *records[2:], *results]]
    ):
        out = tmp_path / str(number)
        shutil.copytree(whole, out)
        files = [path for name in damaged for path in out.glob(name)]
        assert len(files) == len(damaged)
        for path in files:
            damage(path, how)
        assert run(image, out, "measure.preview=true").exit_code == 0
        same_results(out, whole)


@pytest.mark.parametrize("how", ["lost", "empty", "torn"])
@pytest.mark.parametrize("told", [True, False])
def test_a_shard_that_is_not_whole_is_missed_whatever_vouches_for_it(
    image, reference, tmp_path, how, told
):
    """By the record's length where the manifest is gone too, else by the manifest's bytes."""
    arrays = {
        "tile": "field.ome.zarr/0",
        "infer": ".segpipe/field.work/probabilities.zarr",
        "stitch": "field.ome.zarr/labels/instances/0",
    }
    for stage, array in arrays.items():
        out = tmp_path / stage
        shutil.copytree(reference, out)
        shard = sorted(path for path in (out / array / "c").rglob("*") if path.is_file())[2]
        damage(shard, how)
        if not told:
            (out / f"manifests/field.{stage}.json").unlink()
        # What reads the array is to be done again, or it would not be looked at.
        (out / "field.parquet").unlink()
        (out / "manifests/field.stitch.json").unlink(missing_ok=True)
        assert run(image, out).exit_code == 0
        same_results(out, reference)


@pytest.mark.parametrize("stage", ["tile", "infer", "stitch"])
def test_a_manifest_that_is_lost_is_written_again_from_records(image, reference, tmp_path, stage):
    """As after a power failure: none is waited for to be on disk."""
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / f"manifests/field.{stage}.json"
    token = json.loads(manifest.read_text())["token"]
    manifest.unlink()
    before = records_of(tmp_path)
    assert run(image, tmp_path).exit_code == 0
    assert json.loads(manifest.read_text())["token"] == token
    assert records_of(tmp_path) == before, "a region was done twice"
    np.testing.assert_array_equal(labels_of(tmp_path, "field"), labels_of(reference, "field"))


@pytest.mark.parametrize("file", ["ids.json", "seeds.bin", "seeds.offsets", "runs.places"])
@pytest.mark.parametrize("damage", ["lost", "torn", "zeros"])
def test_tables_of_seeds_that_are_damaged_are_made_again(image, reference, tmp_path, file, damage):
    shutil.copytree(reference, tmp_path, dirs_exist_ok=True)
    path = tmp_path / ".segpipe/field.work" / file
    whole = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        kept = len(whole) // 2
        path.write_bytes(whole[:kept] + bytes(len(whole) - kept) * (damage == "zeros"))
    (tmp_path / "manifests/field.stitch.json").unlink()
    folder = tmp_path / ".segpipe/field.work/records/stitch"
    drop_records(folder, [one for one in read_records(folder) if one.pass_name == "grow-0"])  # noqa: S105
    assert run(image, tmp_path).exit_code == 0
    assert path.read_bytes() == whole
    np.testing.assert_array_equal(labels_of(tmp_path, "field"), labels_of(reference, "field"))


@pytest.mark.parametrize("engine", ["serial", "local"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_and_says_how_to_go_on(image, reference, tmp_path, engine, number):
    script = PAUSE.format(tests=str(Path(__file__).parent), engine=engine)
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(image), str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not any(name == "infer" for name, _ in records_of(tmp_path)):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal and a scheduler do: the whole group
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command to go on" in errors
    assert "Traceback" not in errors
    assert run(image, tmp_path, "tile.region=64").exit_code == 0
    np.testing.assert_array_equal(labels_of(tmp_path, "field"), labels_of(reference, "field"))
    again = [key for key, times in records_of(tmp_path).items() if times > 1]
    assert len(again) <= 2 * (engine == "local"), "only what was in flight may be done again"


def test_a_second_run_does_nothing_and_new_settings_redo_what_they_concern(image, tmp_path, caplog):
    caplog.set_level("INFO")
    assert run(image, tmp_path).exit_code == 0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    caplog.clear()
    result = run(image, tmp_path)
    assert result.exit_code == 0 and result.images[0].status == "skipped"
    assert "nothing to do: 1 image finished" in caplog.text
    changed = {
        path.name
        for path in tmp_path.rglob("*")
        if path.is_file() and files.get(path) != path.stat().st_mtime_ns
    }
    assert changed - {".run.lock", ".images.lock", ".report.lock"} == {"run.json", "report.html"}
    inferred = (tmp_path / "manifests/field.infer.json").stat().st_mtime_ns
    assert run(image, tmp_path, "stitch.min_area=400").exit_code == 0
    assert (tmp_path / "manifests/field.infer.json").stat().st_mtime_ns == inferred
    labels = labels_of(tmp_path, "field")
    assert np.bincount(labels.ravel())[1:].min() >= 400
    assert table_of(tmp_path, "field").num_rows == labels.max()


def test_another_run_on_the_same_image_is_refused(image, tmp_path):
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(60)"
    )
    lock = tmp_path / ".segpipe/field.lock"
    lock.parent.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", code, os.fspath(lock)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        result = run(image, tmp_path)
        holder.kill()
    assert result.exit_code == 1
    assert "another segpipe is working on it" in str(result.images[0].error)
