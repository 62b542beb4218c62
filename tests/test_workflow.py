"""The Snakefile: the same job as `predict`, and each goes on where the other stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from fields import nuclei, run, same_results, threshold_model
from segpipe.records import locked, read_json, read_records
from segpipe.stages.image import STAGES
from segpipe.stages.places import work_folder

ROOT = Path(__file__).parents[1]
SNAKEMAKE = (sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"))
LOCAL = str(ROOT / "workflows" / "profiles" / "local")
ONE_THREAD = ("--set-threads", *(f"{stage}=1" for stage in ("tile", "infer", "stitch", "measure")))
RUN = ("--cores", "2", "--workflow-profile", LOCAL, *ONE_THREAD)
TEST_CONFIG = ("--configfile", str(ROOT / "configs" / "test.yaml"))
ODD_NAMES = ("a b.tif", "ü {x}.tif", "-n.tif", 'it\'s "$HOME".tif', "sub/a b.tif", "{job}.tif")


def snakemake(cwd: Path, *arguments: str, **config: object) -> tuple[int, str, Counter[str]]:
    """Exit code, all that it printed, and how many jobs of each rule it ran or would run."""
    given = {"input": "in", "output": "out", "model": threshold_model(), **config}
    command = [*SNAKEMAKE, *RUN, *TEST_CONFIG, *arguments]
    command += [
        "--config",
        *(f"{key}={value}" for key, value in given.items() if value is not None),
    ]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    told = done.stdout + done.stderr
    return done.returncode, told, Counter(re.findall(r"^(?:local)?rule (\w+):", told, re.M))


def test_lint_is_clean(tmp_path):
    done = subprocess.run(
        [*SNAKEMAKE, "--lint"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stitch": "{regoin: 2048}"}, "unknown setting 'stitch.regoin'; did you mean"),
        ({"input": None}, "no input: name it by --config input=PATH"),
    ],
)
def test_what_is_wrong_is_one_line_and_starts_nothing(tmp_path, config, message):
    nuclei(tmp_path / "in" / "a.tif", (70, 70))
    code, told, rules = snakemake(tmp_path, **config)
    ours = [line for line in told.splitlines() if line.startswith("segpipe: ")]
    assert code != 0 and not rules and "Traceback" not in told
    assert len(ours) == 1 and message in ours[0]


def test_ten_images_one_of_them_bad(tmp_path):
    """One after the other, because each start of Snakemake and of a job costs seconds."""
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(3):
        nuclei(folder / f"{number}.tif", (60 + 50 * number, 70), seed=number)
    for number, name in enumerate(ODD_NAMES):
        nuclei(folder / name, (50, 60 + 10 * number), seed=number)
    (folder / "bad.tif").write_bytes((folder / "2.tif").read_bytes()[:3000])

    code, told, rules = snakemake(tmp_path, "--dry-run")
    assert code == 0, told
    assert rules == {"tile": 3, "infer": 3, "stitch": 3, "measure": 3, "check": 1, "all": 1}
    assert not list(out.rglob("*.zarr"))

    code, told, rules = snakemake(tmp_path)
    assert code == 1 and "failed: bad; why is in" in told
    assert "Error in rule check" in told and "MissingOutput" not in told
    assert read_json(out / "run.json")["failed"] == ["bad"]
    assert len(list(out.rglob("*.parquet"))) == 9
    logs = sorted(path.name for path in (out / "logs" / "infer").iterdir())
    assert len(logs) == 3

    done = {path: path.stat().st_mtime_ns for path in out.glob("manifests/**/*.tile.json")}
    nuclei(folder / "bad.tif", (90, 90), seed=5)
    code, told, rules = snakemake(tmp_path)
    assert code == 0, told
    assert rules == {"tile": 1, "infer": 1, "stitch": 1, "measure": 1, "check": 1, "all": 1}
    assert {path: path.stat().st_mtime_ns for path in done} == done, "others were done again"

    whole = tmp_path / "whole"
    assert run(folder, whole).exit_code == 0
    same_results(out, whole)
    assert {image.status for image in run(folder, out).images} == {"skipped"}
    code, _, rules = snakemake(tmp_path)
    assert code == 0 and not rules

    # What `predict` finished is known, from whatever folder Snakemake is started.
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    code, told, rules = snakemake(elsewhere, "--dry-run", input=folder, output=whole)
    assert code == 0 and rules == {"check": 1, "all": 1}, told

    exports = {"export": "{formats: [csv, geojson, tiff]}"}
    code, told, rules = snakemake(elsewhere, "--dry-run", input=folder, output=whole, **exports)
    assert code == 0 and rules == {"measure": 3, "check": 1, "all": 1}, told
    changed = {"stitch": "{min_area: 60}", "batch": 100, **exports}
    code, told, rules = snakemake(elsewhere, input=folder, output=whole, **changed)
    assert code == 0, told
    assert rules == {"stitch": 1, "measure": 1, "check": 1, "all": 1}
    done = run(folder, out, "stitch.min_area=60", "export.formats=[csv, geojson, tiff]")
    assert done.exit_code == 0 and len(list(whole.rglob("*.geojson.gz"))) == 10
    same_results(out, whole)


def test_a_relative_mask_is_that_of_the_folder_in_which_it_was_started(tmp_path, monkeypatch):
    """Though jobs run in OUT: one file, and a folder of them, by --config and by a YAML elsewhere."""
    nuclei(tmp_path / "in" / "a.tif", (120, 140))
    (tmp_path / "masks").mkdir()
    triangle = {"type": "Polygon", "coordinates": [[[0, 0], [139, 10], [20, 119]]]}
    (tmp_path / "masks" / "a.geojson").write_text(json.dumps(triangle))
    (tmp_path / "elsewhere").mkdir()
    project = tmp_path / "elsewhere" / "project.yaml"
    project.write_text("tile: {mask: masks}\n")
    monkeypatch.chdir(tmp_path)
    assert run(Path("in"), Path("whole"), "tile.mask=masks").exit_code == 0
    assert run(Path("in"), Path("all")).exit_code == 0
    objects = [
        read_json(Path(out) / "run.json")["images"]["a"]["objects"] for out in ("whole", "all")
    ]
    assert 0 < objects[0] < objects[1]
    ways = {
        "one": ([], {"tile": "{mask: masks/a.geojson}"}),
        "folder": (["--configfile", str(TEST_CONFIG[1]), str(project)], {}),
    }
    for out, (arguments, config) in ways.items():
        code, told, _ = snakemake(tmp_path, *arguments, output=out, **config)
        assert code == 0, told
        for name in ("a.parquet", "a.ome.zarr/labels/instances/0/c/0/0"):
            assert (tmp_path / out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- interrupted by one, resumed by the other -----------------------------------------------------

DRIVERS = ("predict", "snakemake")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
EVERY = [(driver, number, stage) for driver in DRIVERS for number in SIGNALS for stage in STAGES]
SOME = [
    ("predict", signal.SIGINT, "measure"),
    ("predict", signal.SIGTERM, "infer"),
    ("predict", signal.SIGKILL, "stitch"),
    ("snakemake", signal.SIGINT, "stitch"),
    ("snakemake", signal.SIGTERM, "tile"),
    ("snakemake", signal.SIGKILL, "infer"),
]
"""Each signal and stage with each driver where it is most apt to go wrong; the rest by
`--every-interruption`."""

PAUSE = """
# Imported by Python at its start: a region of one stage waits, once recorded, until it may go on
# (no region: the record that says that the stage's arrays are made).
import os, sys, time
if {"stage", "predict"} & set(sys.argv):
    from pathlib import Path
    from segpipe.records import Records
    add = Records.add
    def pausing(self, region, *arguments, **facts):
        made = add(self, region, *arguments, **facts)
        if region and self.folder.name == os.environ["PAUSE_IN"]:
            here = Path(os.environ["PAUSE_AT"])
            (here / "paused").touch()
            while not (here / "go").exists():
                time.sleep(0.02)
        return made
    Records.add = pausing
"""


def pytest_generate_tests(metafunc):
    if "interruption" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_interruption")
        metafunc.parametrize(
            "interruption",
            EVERY if every else SOME,
            ids=lambda one: f"{one[0]}-{one[1].name}-{one[2]}",
        )


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder of three images, and the results of a run that nothing interrupted."""
    place = tmp_path_factory.mktemp("three")
    for number in range(3):
        nuclei(place / "in" / f"{number}.tif", (150, 140), seed=number)
    assert run(place / "in", place / "whole").exit_code == 0
    return place


def paused(command: list[str], cwd: Path, stage: str, place: Path) -> subprocess.Popen[str]:
    """A command that has been started and waits in the middle of a stage; all it prints is in `told`."""
    (place / "sitecustomize.py").write_text(PAUSE)
    path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (place / "told").open("w") as told:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": path, "PAUSE_IN": stage, "PAUSE_AT": str(place)},
            stdout=told,
            stderr=told,
            text=True,
            start_new_session=True,
        )
    while not (place / "paused").exists():
        assert process.poll() is None, (place / "told").read_text()
        time.sleep(0.02)
    return process


def test_interrupted_by_one_driver_and_resumed_by_the_other(three, tmp_path, interruption):
    driver, number, stage = interruption
    (tmp_path / "in").symlink_to(three / "in")
    out, pause = tmp_path / "out", tmp_path / "pause"
    pause.mkdir()
    if driver == "predict":
        command = [sys.executable, "-m", "segpipe.cli", "predict", "in", "-o", "out"]
        command += ["-c", str(ROOT / "configs" / "test.yaml"), "-m", str(threshold_model())]
    else:
        command = [*SNAKEMAKE, *RUN, *TEST_CONFIG, "--config", "input=in", "output=out"]
        command += [f"model={threshold_model()}"]
    process = paused(command, tmp_path, stage, pause)
    os.killpg(process.pid, number)  # as a terminal and a scheduler do: the whole group
    (pause / "go").touch()
    assert process.wait(timeout=120) != 0
    for image in range(3):  # of the group the first is gone; others may still be dying
        with locked(work_folder(out, str(image)), str(image), wait=True):
            pass
    assert "Traceback" not in (pause / "told").read_text()
    done = {path: path.stat().st_mtime_ns for path in out.glob("manifests/*.json")}
    folders = list(out.glob(f".segpipe/*.work/records/{stage}"))
    assert any(one.region for folder in folders for one in read_records(folder))
    assert len(list(out.glob("manifests/?.measure.json"))) < 3
    if driver == "predict":
        code, told, _ = snakemake(tmp_path)
        assert code == 0, told
    else:
        assert run(tmp_path / "in", out).exit_code == 0
    same_results(out, three / "whole")
    kept = {path for path, time_ns in done.items() if path.stat().st_mtime_ns == time_ns}
    assert {path.name for path in done} - {path.name for path in kept} <= {"images.json"}


def test_a_job_that_outlives_its_workflow_is_waited_for(three, tmp_path):
    """Snakemake alone is killed; its job goes on, and the next run's waits for it and finds it done."""
    (tmp_path / "in").symlink_to(three / "in")
    (tmp_path / "pause").mkdir()
    command = [*SNAKEMAKE, *RUN, *TEST_CONFIG, "--config", "input=in", "output=out"]
    command += [f"model={threshold_model()}"]
    process = paused(command, tmp_path, "infer", tmp_path / "pause")
    process.kill()
    process.wait()
    again = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "logs" / "infer" / "000000-0.log"
    while not log.exists() or "waiting for it" not in log.read_text():  # each start makes it anew
        assert again.poll() is None
        time.sleep(0.1)
    (tmp_path / "pause" / "go").touch()
    told = again.communicate(timeout=120)[1]
    assert again.returncode == 0, told
    same_results(tmp_path / "out", three / "whole")
