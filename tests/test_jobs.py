"""Jobs of the workflow, without Snakemake: what is done is known whoever did it, and nothing else is."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import tifffile
import yaml

from fields import labels_of, nuclei, run, same_results, threshold_model
from segpipe.cleaning import clean
from segpipe.errors import ModelError, SettingsError
from segpipe.inputs import find_inputs
from segpipe.jobs import read_job
from segpipe.numeric_plan import stage_digests
from segpipe.prepare import prepare
from segpipe.records import locked, read_json
from segpipe.run import run_job
from segpipe.settings import KNOWN_KEYS, load_project, parse_settings
from segpipe.stages.image import STAGES, settings_digest
from segpipe.workflow import check, open_workflow, project_of

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = yaml.safe_load((CONFIGS / "test.yaml").read_text())


def drive(folder: Path, out: Path, **config: object) -> tuple[int, list[str]]:
    """What Snakemake does, one job after the other: `check`'s exit code, and the jobs that were run."""
    tree = {**TINY, "input": str(folder), "output": str(out), "model": str(threshold_model())}
    workflow = open_workflow(tree | config, whole=True)
    project = load_project(workflow.out / workflow.project_file)
    ran = []
    for job in workflow.all_jobs():
        told = workflow.out / "manifests" / "jobs" / f"{job}.images.json"
        for stage in STAGES:
            manifest = workflow.out / workflow.manifest(stage, job)
            again = stage != "tile" and ran[-1:] == [f"{STAGES[STAGES.index(stage) - 1]} {job}"]
            if again or not manifest.exists():
                run_job(stage, told, manifest, workflow.out, project.settings)
                ran.append(f"{stage} {job}")
            told = manifest
    return check(project, workflow.out / workflow.check_manifest), ran


def stages_of(ran: list[str]) -> list[str]:
    return [one.split()[0] for one in ran]


@pytest.fixture
def folder(tmp_path):
    for number in range(5):
        nuclei(tmp_path / "in" / f"{number}.tif", (40 + 35 * number, 70), seed=number)
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_the_same_bytes_as_predict_and_then_nothing_to_do_for_either(folder, out, tmp_path):
    assert drive(folder, out)[0] == 0
    assert run(folder, tmp_path / "whole").exit_code == 0
    same_results(out, tmp_path / "whole")
    told, whole = read_json(out / "run.json"), read_json(tmp_path / "whole" / "run.json")
    for one in told["images"].values(), whole["images"].values():
        for entry in one:
            del entry["seconds"], entry["peak_memory_bytes"]
    assert told["images"] == whole["images"]
    assert drive(folder, out) == (0, [])
    assert {image.status for image in run(folder, out).images} == {"skipped"}
    assert drive(folder, tmp_path / "whole") == (0, []), "what predict did was not seen"
    assert drive(folder, out, batch=2)[1] == [], "nor in other batches"


def test_settings_redo_the_stages_that_they_concern(folder, out, tmp_path):
    assert drive(folder, out)[0] == 0
    first = {path: path.read_bytes() for path in out.rglob("*.parquet")}
    code, ran = drive(folder, out, stitch={"min_area": "60"})
    assert code == 0 and stages_of(ran) == ["stitch", "measure"] * 2
    code, ran = drive(folder, out, stitch={"min_area": "60"}, measure={"preview": "true"})
    assert code == 0 and stages_of(ran) == ["measure"] * 2
    assert (
        run(folder, tmp_path / "whole", "stitch.min_area=60", "measure.preview=true").exit_code == 0
    )
    same_results(out, tmp_path / "whole")
    # `predict` changes it back; then it is predict's results that must be known, not the jobs' own.
    assert run(folder, out).exit_code == 0
    assert {path: path.read_bytes() for path in out.rglob("*.parquet")} == first
    assert drive(folder, out) == (0, [])
    code, ran = drive(folder, out, stitch={"min_area": "60"})
    assert stages_of(ran) == ["stitch", "measure"] * 2
    assert labels_of(out, "4").max() < len(np.unique(labels_of(tmp_path / "whole", "4"))) + 1


def test_one_bad_image_is_named_and_tried_again_alone(folder, out, tmp_path):
    good = (folder / "2.tif").read_bytes()
    (folder / "2.tif").write_bytes(good[:2000])
    (folder / "gone.tif").symlink_to(tmp_path / "nowhere.tif")
    code, ran = drive(folder, out)
    assert code == 1 and len(ran) == 8
    told = read_json(out / "run.json")
    assert told["failed"] == ["2", "gone"]
    assert "tile: 2.tif: ends at byte 2,000" in told["images"]["2"]["error"], (
        "not why it failed first"
    )
    assert sorted(path.stem for path in out.glob("*.parquet")) == ["0", "1", "3", "4"]
    done = {path: path.stat().st_mtime_ns for path in out.glob("manifests/[0-9]*.json")}
    assert drive(folder, out)[1], "what has failed was not tried again"
    (folder / "2.tif").write_bytes(good)
    (folder / "gone.tif").unlink()
    code, ran = drive(folder, out)
    assert code == 0 and stages_of(ran) == list(STAGES)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "others were done again"
    assert run(folder, tmp_path / "whole").exit_code == 0
    same_results(out, tmp_path / "whole")


def test_a_region_that_fails_does_not_end_its_image(folder, out, monkeypatch):
    """As with `predict`: later stages go on with the rest of it, and a rerun mends all."""
    from segpipe.stages import infer

    write = infer.write_shard

    def fail(path, box, *rest):
        if "4.work" in str(path) and box.y0 == 128:
            raise OSError("no")
        return write(path, box, *rest)

    monkeypatch.setattr(infer, "write_shard", fail)
    assert drive(folder, out)[0] == 1
    assert read_json(out / "run.json")["failed"] == ["4"]
    assert (out / "4.parquet").exists()
    monkeypatch.undo()
    code, ran = drive(folder, out)
    assert code == 0 and stages_of(ran) == ["infer", "stitch", "measure"]
    assert run(folder, out.with_name("whole")).exit_code == 0
    same_results(out, out.with_name("whole"))


def test_images_that_come_or_change_later_move_no_other(folder, out):
    assert drive(folder, out)[0] == 0
    nuclei(folder / "00.tif", (80, 80), seed=9)
    code, ran = drive(folder, out)
    assert code == 0 and ran == [f"{stage} 000004-4" for stage in STAGES]
    nuclei(folder / "1.tif", (90, 90), seed=10)
    code, ran = drive(folder, out)
    assert code == 0 and ran == [f"{stage} 000000-0" for stage in STAGES]
    assert labels_of(out, "1").shape == (90, 90)
    (folder / "4.tif").unlink()
    assert drive(folder, out)[0] == 0


def test_planes_are_images_of_a_job_as_files_are(tmp_path, out):
    folder = tmp_path / "stacks"
    folder.mkdir()
    planes = [tifffile.imread(nuclei(tmp_path / f"{n}.tif", (60, 80), seed=n)) for n in range(3)]
    tifffile.imwrite(folder / "a.tif", np.stack(planes), imagej=True, metadata={"axes": "ZYX"})
    code, _ = drive(folder, out)
    told = read_json(out / "run.json")
    assert code == 1 and told["failed"] == ["a"] and "3 z planes" in told["images"]["a"]["error"]
    each = {**TINY["tile"], "z": "each"}
    code, ran = drive(folder, out, tile=each, batch=2)
    assert code == 0 and len(ran) == 2 * len(STAGES)
    told = read_json(out / "run.json")
    assert told["failed"] == [] and told["images"]["a_z2"]["plane"] == {"z": 2}
    run(folder, tmp_path / "whole", "tile.z=each")
    same_results(out, tmp_path / "whole")
    assert drive(folder, out, tile=each, batch=2) == (0, [])
    assert drive(folder, tmp_path / "whole", tile=each) == (0, []), "what predict did was not seen"
    code, ran = drive(folder, out, tile={**TINY["tile"], "z": "max"}, batch=2)
    assert code == 0 and stages_of(ran) == list(STAGES)


def test_an_entry_of_run_json_from_before_a_killed_run_is_not_believed(folder, out):
    good = (folder / "2.tif").read_bytes()
    (folder / "2.tif").write_bytes(good[:2000])
    assert run(folder, out).exit_code == 1
    told = (out / "run.json").read_bytes()
    (folder / "2.tif").write_bytes(good)
    assert run(folder, out).exit_code == 0
    (out / "run.json").write_bytes(told)  # as if killed before it was written
    code, ran = drive(folder, out)
    assert code == 0 and stages_of(ran) == ["measure"]
    assert read_json(out / "run.json")["failed"] == []


@pytest.mark.parametrize(
    ("lost", "stages"),
    [
        ("3.parquet", ["measure"]),
        ("3.ome.zarr/labels", ["stitch", "measure"]),
        ("3.ome.zarr/0/c/0/0/0", list(STAGES)),
        ("manifests/3.infer.json", ["infer", "stitch", "measure"]),
        (".segpipe", []),
    ],
)
def test_what_is_lost_is_missed(folder, out, lost, stages):
    assert drive(folder, out)[0] == 0
    before = labels_of(out, "3")
    shutil.rmtree(out / lost) if (out / lost).is_dir() else (out / lost).unlink()
    code, ran = drive(folder, out)
    assert code == 0 and stages_of(ran) == stages
    np.testing.assert_array_equal(labels_of(out, "3"), before)


def test_after_clean_other_settings_make_the_probabilities_again(folder, out, tmp_path):
    assert drive(folder, out)[0] == 0 and clean(out) == []
    assert drive(folder, out) == (0, [])
    code, ran = drive(folder, out, stitch={"min_area": "60"})
    assert code == 0 and stages_of(ran) == ["infer", "stitch", "measure"] * 2
    assert run(folder, tmp_path / "whole", "stitch.min_area=60").exit_code == 0
    same_results(out, tmp_path / "whole")


def test_a_finished_image_of_a_batch_is_not_inferred_again_because_it_was_cleaned(folder, out):
    assert drive(folder, out)[0] == 0 and clean(out) == []
    nuclei(folder / "1.tif", (90, 90), seed=10)
    assert drive(folder, out)[0] == 0
    assert not (out / ".segpipe" / "0.work").exists()


def test_a_damaged_job_manifest_is_no_manifest(folder, out):
    assert drive(folder, out)[0] == 0
    for path in (out / "manifests" / "jobs").glob("*.stitch.*.json"):
        path.write_text(path.read_text()[:50])
    assert drive(folder, out) == (0, []), "the images' manifests still say that all is done"
    assert read_job(next((out / "manifests" / "jobs").glob("*.stitch.*.json")))


def words_in(annotation: object) -> list[object]:
    """The values of the Literals in a type."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for inner in get_args(annotation) for word in words_in(inner)]


def other_value(key: str) -> dict[str, dict[str, object]]:
    """Settings in which one key is not what it is by default, and that are valid."""
    section, name = key.split(".")
    default = getattr(getattr(parse_settings({}), section), name)
    field = type(getattr(parse_settings({}), section)).model_fields[name]
    pairs = ([0.2, 0], [10, 20])
    for value in (
        *words_in(field.annotation)[::-1],
        0,
        False,
        1,
        2,
        3,
        256,
        512,
        2048,
        0.3,
        *pairs,
        "other",
    ):
        try:
            settings = parse_settings({section: {name: value}})
        except SettingsError:
            continue
        if getattr(getattr(settings, section), name) != default:
            return {section: {name: value}}
    raise AssertionError(f"no other value for {key}")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """One image by itself, and the folder of its results."""
    folder = tmp_path_factory.mktemp("one")
    return nuclei(folder / "in" / "0.tif", (70, 70)), folder / "out"


@pytest.mark.parametrize("key", [key for key in KNOWN_KEYS if not key.startswith("engine")])
def test_what_changes_a_result_changes_the_digest(prepared, key, request):
    """The digest may also change where the result does not: a job then finds nothing to do."""
    image, out = prepared
    found = find_inputs([image], out)
    model = {"infer": {"model": str(threshold_model(diameter_px=2.0))}}
    if key == "tile.mask":
        mask = out.parent / "mask.geojson"
        mask.write_text('{"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9]]]}')
        other = model | {"tile": {"mask": str(mask)}}
    elif key == "infer.model":
        other = {"infer": {"model": str(request.getfixturevalue("other_model"))}}
    else:
        other = other_value(key)
        other["infer"] = model["infer"] | other.get("infer", {})
    before, after = parse_settings(model), parse_settings(other)
    images = [prepare(found, out, settings).images[0] for settings in (before, after)]
    digests = [stage_digests(settings) for settings in (before, after)]
    for place, stage in enumerate(STAGES):
        ours, theirs = ([one.fingerprint(s) for s in STAGES[: place + 1]] for one in images)
        assert ours == theirs or digests[0][stage] != digests[1][stage]
    section = STAGES.index(key.split(".")[0].replace("export", "measure"))  # its last part
    for stage in STAGES[:section]:
        if key not in ("infer.model", "infer.normalise"):
            assert digests[0][stage] == digests[1][stage], f"{key} concerns {stage}?"


@pytest.fixture
def other_model(tmp_path):
    from segpipe.models.modelfile import load_model, write_model

    network, card = load_model(threshold_model())
    path = tmp_path / "other.safetensors"
    write_model(path, network, card.model_copy(update={"name": "other"}))
    return path


def test_a_version_of_a_stage_is_in_the_digest(monkeypatch):
    settings = parse_settings({})
    before = [settings_digest(stage, settings, []) for stage in STAGES]
    monkeypatch.setitem(settings_digest.__globals__["VERSION"], "stitch", 1000)
    after = [settings_digest(stage, settings, []) for stage in STAGES]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, False]


# --- the configuration ----------------------------------------------------------------------------


def test_what_snakemake_reads_from_its_command_line(tmp_path):
    project = project_of(
        {
            "input": ["a b", "/abs"],
            "output": "out",
            "batch": 2,
            "model": "null",
            "stitch": {"region": "2048", "interior": ["0.7", "0.5"], "min_area": "null"},
            "measure": "{preview: no}",
        },
        tmp_path,
    )
    assert project.input == (tmp_path / "a b", Path("/abs"))
    assert project.output == tmp_path / "out"
    assert project.stitch.region == 2048 and project.stitch.interior == (0.7, 0.5)
    assert project.stitch.min_area is None and project.measure.preview is False
    assert project.infer.model == "auto"


def test_a_process_that_runs_one_job_sees_the_same_from_where_it_starts(folder, out, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "model.safetensors").symlink_to(threshold_model())
    config = {"input": "in", "output": "out", "model": "model.safetensors"}
    whole = open_workflow(config, whole=True)
    files = whole.project_file, whole.manifest("stitch", "0")
    monkeypatch.chdir(out)
    job = open_workflow(config, whole=False)
    assert (job.out, job.project) == (whole.out, whole.project)
    assert (job.project_file, job.manifest("stitch", "0")) == files
    assert not (out / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stitch": {"regoin": "1"}}, "did you mean 'stitch.region'?"),
        ({"stitch": "2048"}, "'stitch' must hold keys, such as stitch='{region: 2048}'"),
        ({"stitch": "{region: 2048"}, "the value of 'stitch' is not YAML"),
        ({"inptu": "a"}, "did you mean 'input'?"),
        ({"input": 7}, "input: should be a path; one that looks like a number"),
        ({"model": "nuclei-flourescence"}, "nuclei-fluorescence"),
        ({"model": "none/there.safetensors"}, "no such model file"),
        ({"model": "nuclei-fluorescence", "tile": {"core": "1032", "chunk": "516"}}, "stride"),
        ({"stitch": {"interior": ["0.5", "0.5"]}}, "fall"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_job(folder, out, config, message):
    with pytest.raises((SettingsError, ModelError)) as caught:
        open_workflow({"input": str(folder), "output": str(out)} | config, whole=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list(out.glob("manifests/jobs/*"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_projects_that_ship_are_valid(path):
    load_project(path)
    if path.name not in ("he.yaml", "default.yaml"):  # its model is the user's; theirs is auto
        stage_digests(load_project(path).settings)


def test_names_that_are_no_unicode_and_other_odd_ones(out, tmp_path):
    folder = tmp_path / "in \udcff {x}"
    image = nuclei(tmp_path / "a.tif", (70, 70))
    folder.mkdir()
    for name in ("\udcfe.tif", "{job}.tif", "-o.tif", "a\nb.tif", "sub/{x}.tif", "$HOME '\".tif"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(image, folder / name)
    assert drive(folder, out)[0] == 0
    assert run(folder, tmp_path / "whole").exit_code == 0
    same_results(out, tmp_path / "whole")
    assert drive(folder, out) == (0, [])


def test_an_image_that_another_process_holds_is_waited_for(folder, out, tmp_path):
    held = threading.Event()

    def hold() -> None:
        with locked(out / ".segpipe" / "0.work", "0"):
            held.set()
            time.sleep(1.0)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    started = time.monotonic()
    assert drive(folder / "0.tif", out)[0] == 0
    assert time.monotonic() - started >= 0.9
    holder.join()


def test_current_manifests_tell_digest_and_source(folder, out):
    result = run(folder / "0.tif", out)
    assert result.exit_code == 0
    manifest = read_json(out / "manifests" / "0.stitch.json")
    assert manifest["facts"]["settings"] and manifest["facts"]["source"]
