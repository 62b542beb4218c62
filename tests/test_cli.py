"""The commands, as people type them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from fields import SIZES, labels_of, nuclei, table_of, threshold_model
from segpipe.cli import main
from segpipe.jobs import JobImage, read_job, write_job
from segpipe.models.card import parse_card
from segpipe.models.modelfile import load_model, write_model
from segpipe.models.network import build_network

CONFIG = Path(__file__).parents[1] / "configs" / "test.yaml"
SETS = [part for size in SIZES for part in ("-s", size)]


def segpipe(*arguments: object):
    """Run the command line in this process; a traceback fails the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("in")
    nuclei(made / "a.tif", (150, 200))
    nuclei(made / "sub" / "b.tif", (70, 90), seed=2)
    return made


def test_predict_then_info_then_clean_then_nothing_to_do(folder, tmp_path, capfd):
    out = tmp_path / "out"
    command = [
        "predict",
        folder,
        "-o",
        out,
        *SETS,
        "-s",
        "measure.preview=true",
        "--engine",
        "serial",
    ]
    assert segpipe(*command).exit_code == 0
    told = json.loads((out / "run.json").read_text())
    assert sorted(told["images"]) == ["a", "sub/b"] and told["failed"] == []
    assert told["images"]["a"]["objects"] == labels_of(out, "a").max() > 5
    assert told["images"]["a"]["plan"]["batch"] == 1
    assert (out / "sub" / "b.png").stat().st_size > 1000
    metadata = table_of(out, "a").schema.metadata
    assert metadata[b"pixel_size_um"] == b"0.5" and metadata[b"model"] == b"threshold"
    assert segpipe("clean", out).exit_code == 0
    assert not (out / ".segpipe").exists()
    assert segpipe(*command).exit_code == 0
    assert not (out / ".segpipe").exists(), "a finished folder was worked on"
    before = labels_of(out, "a")
    assert segpipe(*command, "-s", "stitch.min_area=200").exit_code == 0
    assert labels_of(out, "a").max() < before.max()
    assert segpipe(*command, "--restart").exit_code == 0
    np.testing.assert_array_equal(labels_of(out, "a"), before)


def test_a_project_names_input_and_output_and_the_command_line_wins(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(
        f"input: [{folder / 'sub'}]\noutput: out\nmodel: {threshold_model()}\n"
    )
    assert segpipe("predict", "-c", "mine.yaml").exit_code == 0
    assert table_of(tmp_path / "out", "b").num_rows > 0
    other = ("predict", folder / "a.tif", "-o", "other", "-c", "mine.yaml")
    assert segpipe(*other).exit_code == 0
    assert [path.name for path in (tmp_path / "other").glob("*.parquet")] == ["a.parquet"]


@pytest.mark.parametrize(("given", "lacking"), [(("-o", "out"), "INPUTS"), (("a.tif",), "OUT")])
def test_what_is_lacking_is_said_in_one_line(given, lacking):
    result = segpipe("predict", *given)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert f"segpipe: no {lacking}" in result.stderr


def test_stages_by_hand_give_what_predict_gives(folder, tmp_path):
    for stage in ("tile", "infer", "stitch", "measure"):
        result = segpipe("stage", stage, folder / "a.tif", "-o", tmp_path / "by hand", *SETS)
        assert result.exit_code == 0
    assert segpipe("predict", folder / "a.tif", "-o", tmp_path / "at once", *SETS).exit_code == 0
    by_hand, at_once = tmp_path / "by hand", tmp_path / "at once"
    np.testing.assert_array_equal(labels_of(by_hand, "a"), labels_of(at_once, "a"))
    assert table_of(by_hand, "a").equals(table_of(at_once, "a"))


def test_a_stage_without_the_one_before_says_so(folder, tmp_path):
    result = segpipe("stage", "stitch", folder / "a.tif", "-o", tmp_path, *SETS)
    assert result.exit_code == 1
    told = json.loads((tmp_path / "run.json").read_text())
    assert "segpipe stage infer" in told["images"]["a"]["error"]


def test_clean_leaves_what_is_not_finished(folder, tmp_path):
    assert segpipe("stage", "tile", folder / "a.tif", "-o", tmp_path, *SETS).exit_code == 0
    result = segpipe("clean", tmp_path)
    assert result.exit_code == 1 and "a is not finished" in result.stderr
    assert (tmp_path / ".segpipe").exists()
    assert segpipe("clean", folder).exit_code == 2


def test_info(folder):
    told = segpipe("info", folder / "a.tif").stdout
    assert "200 x 150 px, uint16" in told and "0.5 um" in told
    result = segpipe("info", folder / "none.tif")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1


def test_models_list_and_show():
    assert "nuclei-fluorescence" in segpipe("models", "list").stdout
    told = segpipe("models", "show", "nuclei-fluorescence").stdout
    assert "context    94 px" in told and "licence: CC0-1.0" in told and "exact      yes" in told
    assert segpipe("models", "show", "nuclei").exit_code == 2


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_the_list_of_models_fits_the_terminal(tmp_path, monkeypatch, rgb_model, width):
    shutil.copy(
        rgb_model, tmp_path / "a-model-whose-name-is-as-long-as-people-make-them.safetensors"
    )
    (tmp_path / "broken.safetensors").write_bytes(b"no model, and no line may be longer for it" * 9)
    monkeypatch.setenv("SEGPIPE_MODELS", str(tmp_path))
    monkeypatch.setenv("COLUMNS", str(width))
    lines = segpipe("models", "list").stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) == 1 + 3 + 1 and lines[-1].startswith("broken: ")
    assert [line.split()[0][:12] for line in lines[:3]] == ["name", "a-model-whos", "nuclei-fluor"]
    for column in ("params", "context", "exact"):
        assert column in lines[0]
    if width == 200:
        assert "M    94 px  96 px  yes    CC0-1.0" in lines[2]
        assert "red, green, blue" in lines[1] and "22 px  24 px  yes" in lines[1]


def test_show_says_why_a_model_is_not_exact(tmp_path):
    fields = {
        "name": "gated",
        "architecture": {"name": "unet3plus", "parameters": {"width": 1, "classification": True}},
        "channels": ["nuclei"],
        "outputs": ["foreground"],
        "normalisation": {"kind": "percentile"},
        "licence": "CC0-1.0",
        "training_data": "none",
    }
    card = parse_card(fields, "fields")
    write_model(tmp_path / "x.safetensors", build_network(*card.network_arguments), card, "float16")
    told = segpipe("models", "show", tmp_path / "x.safetensors").stdout
    assert "exact      no: Guide looks at the whole window, so tiles may show" in told
    assert "kernels in float16" in told


def test_models_import_of_a_state_dict(tmp_path):
    network, card = load_model(threshold_model())
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    fields = card.model_dump(mode="json") | {"name": "mine"}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(fields))
    destination = tmp_path / "mine.safetensors"
    command = ["models", "import", tmp_path / "weights.pt", destination]
    assert segpipe(*command, "--card", tmp_path / "card.yaml").exit_code == 0
    assert load_model(destination)[1].name == "mine"
    assert segpipe(*command).exit_code == 2  # a state dict says nothing of itself


def test_demo(tmp_path):
    assert segpipe("demo", "-o", tmp_path, "--size", "600").exit_code == 0
    for name in ("field", "section"):
        assert (tmp_path / "results" / f"{name}.png").exists()
        assert labels_of(tmp_path / "results", name).max() > 20


def test_the_snakefile_is_found():
    told = segpipe("workflow").stdout.strip()
    assert told.endswith("Snakefile") and "rule all" in Path(told).read_text()


def test_a_stage_of_a_job_exits_0_with_a_bad_image_and_1_by_hand(folder, tmp_path):
    (tmp_path / "bad.tif").write_bytes(b"II*\0")
    by_hand = segpipe("stage", "tile", tmp_path / "bad.tif", "-o", tmp_path / "out", *SETS)
    assert by_hand.exit_code == 1
    job, manifest = tmp_path / "job.json", tmp_path / "manifest.json"
    write_job(job, [JobImage("bad", tmp_path / "bad.tif"), JobImage("a", folder / "a.tif")])
    command = ["stage", "tile", "--job", job, "-o", tmp_path / "out", *SETS]
    assert segpipe(*command).exit_code == 2  # and no --manifest
    assert segpipe(*command, "--manifest", manifest).exit_code == 0
    bad, good = read_job(manifest)
    assert bad.lost and "bad.tif" in bad.entry["error"] and not good.failed and good.token
    assert segpipe("check", "-c", CONFIG, "--manifest", manifest).exit_code == 2
