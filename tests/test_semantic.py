"""Models whose outputs are classes: from a YAML to labels that no tiling shows, and what is refused."""

from __future__ import annotations

import contextlib
import json
import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
import yaml
import zarr
from click.testing import CliRunner

import segpipe
from fields import labels_of, run, same_results, table_of
from segpipe.cli import main
from segpipe.errors import InputError, SettingsError
from segpipe.models.card import parse_card
from segpipe.models.modelfile import load_model, read_card, write_model
from segpipe.models.network import build_network
from segpipe.results import found_text
from segpipe.run import run_job
from segpipe.semantic import likeliest
from segpipe.settings import parse_project
from segpipe.stages.image import STAGES
from segpipe.training.batches import BatchMaker, Prepared
from segpipe.training.dataset import load_samples, split_samples
from segpipe.training.judging_classes import Classes, confusion, intersections_over_unions
from segpipe.training.run import first_card, train, weighing_of
from segpipe.training.settings import parse_train_settings
from segpipe.training.weights import Weighing
from segpipe.workflow import check, open_workflow

CLASSES = ["ground", "disc", "ring"]
LEVELS = (40, 120, 210)


def scene(shape, seed):
    """An image of dark ground, grey discs and bright rings, and the class of each pixel."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    truth = np.zeros(shape, np.uint8)
    for number in range(max(6, shape[0] * shape[1] // 1000)):
        far = np.hypot(y - random.uniform(0, shape[0]), x - random.uniform(0, shape[1]))
        radius = random.uniform(6, 11)
        truth[(far < radius) & ((far > radius - 4) | (number % 2 == 0))] = 1 + number % 2
    noise = random.normal(0, 12, shape)
    pixels = np.clip(np.take(LEVELS, truth) + noise, 0, 255).astype(np.uint8)
    return pixels, truth


@contextlib.contextmanager
def logged(name):
    """Lines that a logger gets, whoever else has set up logging."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger(name)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in range(5):
        pixels, truth = scene((80, 96), number)
        tifffile.imwrite(folder / "images" / f"s{number}.tif", pixels)
        tifffile.imwrite(folder / "masks" / f"s{number}.tif", truth)
    return folder


def tree(data, out, **sections):
    fields = {
        "name": "scenes",
        "output": str(out),
        "data": {"images": str(data / "images"), "masks": str(data / "masks"), "validation": 0.3},
        "network": {
            "architecture": {
                "name": "unet",
                "parameters": {"width": 4, "depth": 1, "padding": "same", "norm": "batch"},
            },
            "outputs": CLASSES,
            "normalisation": {"kind": "fixed", "low": 0, "high": 255},
        },
        "augment": {"gain": [0.9, 1.1], "offset": [0, 0]},
        "course": {
            "steps": 60,
            "batch": 4,
            "crop": 48,
            "validate_every": 30,
            "learning_rate": 0.02,
        },
        "threads": 1,
    }
    return fields | sections


def settings_of(data, out, **sections):
    return parse_train_settings(tree(data, out, **sections), "test")


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    """What `segpipe train` makes of the YAML."""
    folder = tmp_path_factory.mktemp("trained")
    config = folder / "config.yaml"
    loss = {"class_weights": "balanced"}
    config.write_text(yaml.safe_dump(tree(data, folder / "run", loss=loss)))
    result = CliRunner().invoke(main, ["train", str(config)])
    assert result.exit_code == 0, result.output
    return folder / "run" / "scenes.safetensors"


# --- training -------------------------------------------------------------------------------------


def test_a_yaml_of_three_classes_becomes_a_model_that_tells_them_apart(model, data):
    card = read_card(model)
    assert card.classes
    assert card.outputs == tuple(CLASSES)
    assert card.object_diameter_px is None
    assert card.figures["mean IoU"] > 0.8
    assert {f"IoU of {name}" for name in CLASSES} < card.figures.keys()
    pixels, truth = scene((120, 130), 77)
    labels = segpipe.segment(pixels, str(model))
    assert labels.dtype == np.uint32
    assert intersections_over_unions(confusion(truth, labels, 3)).min() > 0.5
    page = (model.parent / "report.html").read_text()
    assert page.count("<polyline") == 3
    assert "mean IoU" in page
    header = (model.parent / "history.csv").read_text().splitlines()[0]
    assert header.startswith("step,loss,learning rate,mean IoU,pixel accuracy,IoU of ground")


def test_the_figure_of_the_card_is_that_of_the_file(model, data):
    settings = settings_of(data, "unused")
    split = split_samples(load_samples(settings.data, 1, CLASSES), 0.3, settings.seed)
    eager = segpipe.load_settings(None, ["infer.backend=eager"])
    counts = sum(
        confusion(one.labels, segpipe.segment(one.pixels, str(model), eager), 3)
        for one in split.validation
    )
    mean = intersections_over_unions(counts).mean()
    assert read_card(model).figures["mean IoU"] == pytest.approx(mean, abs=2e-3)


def test_targets_of_a_batch_are_the_classes_at_the_places_of_the_image(data, tmp_path):
    """The scenes' levels tell the class, so the image that is seen tells what its target must be."""
    plain = {"gain": [1, 1], "offset": [0, 0], "noise": 0, "blur_px": 0}
    settings = settings_of(data, tmp_path, augment=plain)
    samples = load_samples(settings.data, 1, CLASSES)
    weighing = Weighing((1.0, 2.0, 5.0))
    ready = [Prepared.of(one, first_card(settings), weighing) for one in samples]
    batch = BatchMaker(ready, settings, 48)(3)
    seen = (batch.images[:, 0] * 255 > torch.tensor([80.0, 165]).view(2, 1, 1, 1)).sum(0)
    assert (seen == batch.classes).float().mean() > 0.9
    assert torch.equal(batch.maps.argmax(1), batch.classes)
    assert torch.equal(batch.maps.sum(1), torch.ones(batch.classes.shape))
    assert torch.equal(batch.weights, torch.tensor([1.0, 2.0, 5.0])[batch.classes])


def test_balanced_weights_are_those_of_the_training_masks(data, tmp_path):
    settings = settings_of(data, tmp_path, loss={"class_weights": "balanced"})
    split = split_samples(load_samples(settings.data, 1, CLASSES), 0.3, 0)
    weights = weighing_of(settings, split).class_weights
    masks = np.concatenate([one.labels.ravel() for one in split.training])
    totals = [weight * (masks == number).sum() for number, weight in enumerate(weights)]
    assert totals == pytest.approx([masks.size / 3] * 3)
    named = {"ring": 5, "ground": 1, "disc": 2}
    settings = settings_of(data, tmp_path, loss={"class_weights": named})
    assert weighing_of(settings, split).class_weights == (1, 2, 5)
    assert weighing_of(settings, split).w0 == 0


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "soft_dice", "parameters": {"over_batch": True}},
        {"name": "unet3plus", "parameters": {"gamma": 1.0}},
        {"name": "unetplusplus", "class_weights": "balanced"},
        {"name": "focal", "parameters": {"alpha": 0.5}},
    ],
)
def test_other_losses_take_classes(data, tmp_path, loss):
    course = {"steps": 2, "batch": 2, "crop": 32, "validate_every": 2}
    assert train(settings_of(data, tmp_path, loss=loss, course=course)).model.exists()


def test_figures_by_hand():
    truth = np.array([[0, 0, 1, 1]], np.uint8)
    labels = np.array([[0, 1, 1, 3]], np.uint32)
    counts = confusion(truth, labels, 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0] * 4, [0] * 4]
    shares = intersections_over_unions(counts)
    assert np.allclose(shares, [1 / 2, 1 / 3, np.nan, 0], equal_nan=True)
    assert Classes().score(truth, labels) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"network": {"outputs": ["a"]}}, "network.outputs must be"),
        ({"network": {"outputs": ["a", "a"]}}, "network.outputs must be"),
        ({"network": {"outputs": ["interior", "foreground"]}}, "network.outputs must be"),
        ({"network": {"outputs": ["foreground", "ring"]}}, "network.outputs must be"),
        ({"loss": {"weight_map": True}}, "loss.weight_map is between objects"),
        ({"loss": {"class_weights": {"ring": 2}}}, "must name ground, disc, ring"),
        (
            {"loss": {"class_weights": {"ring": -2}}},
            "expected balanced, or numbers from 0 to 1000 by class",
        ),
        ({"loss": {"class_weights": "even"}}, "expected balanced, or numbers"),
        ({"loss": {"sigma_px": 0}}, "loss.sigma_px"),
        ({"loss": {"name": "instance"}}, "loss.name instance is of foreground and interior"),
        ({"loss": {"name": "focal", "parameters": {"gama": 1}}}, "did you mean 'gamma'?"),
        (
            {"loss": {"name": "focal", "class_weights": "balanced"}},
            "loss.class_weights weighs pixels, which focal does not",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(data, tmp_path, sections, told):
    fields = tree(data, tmp_path / "run")
    for section, values in sections.items():
        fields[section] = fields.get(section, {}) | values
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(fields))
    result = CliRunner().invoke(main, ["train", str(config)])
    assert result.exit_code == 2
    assert told in result.output
    assert result.output.count("\n") == 1


def test_a_class_that_occurs_nowhere_or_hardly_is_named(data, tmp_path):
    fields = tree(data, tmp_path)
    fields["network"] = fields["network"] | {"outputs": [*CLASSES, "star"]}
    settings = parse_train_settings(fields, "test")
    with pytest.raises(InputError, match="no mask of the training images holds star"):
        train(settings)
    split = split_samples(load_samples(settings.data, 1, settings.network.classes), 0.3, 0)
    split.training[0].labels[0, 0] = 3
    balanced = parse_train_settings(fields | {"loss": {"class_weights": "balanced"}}, "test")
    with pytest.raises(InputError, match=r"star makes up .* give numbers for loss.class_weights"):
        weighing_of(balanced, split)


# --- prediction -----------------------------------------------------------------------------------


def test_predict_gives_the_likeliest_class_whatever_the_regions(model, tmp_path):
    pixels, truth = scene((150, 140), 5)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    settings = [f"infer.model={model}", "measure.preview=true"]
    outs = {region: tmp_path / str(region) for region in (64, 128)}
    with logged("segpipe.results") as lines:
        for region, out in outs.items():
            run(tmp_path / "a.tif", out, *settings, f"tile.region={region}")
    assert ["pixels in 3 classes (ground, disc, ring), 0 failed" in one for one in lines] == [1, 1]
    assert not any("object" in one for one in lines)
    found = labels_of(outs[64], "a")
    assert np.array_equal(labels_of(outs[128], "a"), found)
    assert table_of(outs[128], "a") == table_of(outs[64], "a")
    probabilities = zarr.open_array(
        outs[128] / ".segpipe" / "a.work" / "probabilities.zarr", mode="r"
    )[:]
    assert probabilities.shape == (3, 150, 140)
    assert np.array_equal(found, np.argmax(probabilities, axis=0))
    assert intersections_over_unions(confusion(truth, found, 3)).min() > 0.5
    table = table_of(outs[64], "a").to_pydict()
    assert table["id"] == [1, 2]
    assert table["area_px"] == [(found == 1).sum(), (found == 2).sum()]
    means = [probabilities[one][found == one].mean() / 255 for one in (1, 2)]
    assert table["mean_probability"] == pytest.approx(means, abs=1e-5)
    metadata = pq.read_schema(outs[64] / "a.parquet").metadata
    assert metadata[b"classes"] == b"0 ground, 1 disc, 2 ring"
    group = json.loads((outs[64] / "a.ome.zarr" / "labels" / "instances" / "zarr.json").read_text())
    named = group["attributes"]["ome"]["image-label"]["properties"]
    assert named[2] == {"label-value": 2, "class": "ring"}
    assert (outs[64] / "a.png").stat().st_size > 1000
    report = (outs[64] / "report.html").read_text()
    assert '<b class="">0</b><span class="pale">objects</span>' in report
    assert "2 classes" in report and "median diameter" not in report and "Size of obj" not in report
    assert np.array_equal(
        segpipe.segment(
            pixels, str(model), segpipe.load_settings(None, ["tile.core=64", "tile.chunk=32"])
        ),
        found,
    )


def test_the_workflow_tells_classes_too(model, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", scene((70, 80), 6)[0])
    settings = parse_project(
        {"input": [str(tmp_path / "a.tif")], "output": str(tmp_path / "out"), "model": str(model)}
    )
    workflow = open_workflow(settings.model_dump(mode="json"), whole=True)
    (job,) = workflow.jobs
    told = workflow.out / "manifests" / "jobs" / f"{job.id}.images.json"
    for stage in STAGES:
        made = workflow.out / workflow.manifest(stage, job.id)
        run_job(stage, told, made, workflow.out, settings.settings)
    with logged("segpipe.workflow") as lines:
        assert check(settings, tmp_path / "check.json") == 0
    assert "1 image done, pixels in 3 classes (ground, disc, ring), 0 failed" in lines[0]


def test_objects_and_classes_are_told_apart():
    assert found_text([]) == "0 objects"
    assert found_text([(3, ()), (None, ()), (1200, ())]) == "1,203 objects"
    names = [f"class {number}" for number in range(40)]
    assert found_text([(3, names[:2]), (1, ()), (2, names[:3])]) == (
        "1 object, pixels in 3 classes (class 0, class 1, class 2)"
    )
    assert found_text([(40, names)]).endswith("class 11, ...)")


def test_a_lost_shard_is_made_again(model, tmp_path):
    pixels, _ = scene((130, 140), 6)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    for out in ("whole", "torn"):
        run(tmp_path / "a.tif", tmp_path / out, f"infer.model={model}", "tile.region=64")
    labels = tmp_path / "torn" / "a.ome.zarr" / "labels" / "instances" / "0"
    shards = sorted(path for path in (labels / "c").rglob("*") if path.is_file())
    shards[1].unlink()
    run(tmp_path / "a.tif", tmp_path / "torn", f"infer.model={model}", "tile.region=64")
    same_results(tmp_path / "torn", tmp_path / "whole")


def test_ties_go_to_the_lowest_place():
    every = np.random.default_rng(0).integers(0, 3, (5, 40, 40)).astype(np.uint8)
    labels, certainty = likeliest(every)
    for y, x in np.ndindex(40, 40):
        values = every[:, y, x].tolist()
        assert labels[y, x] == values.index(max(values))
        assert certainty[y, x] == max(values)


def test_bench_is_of_objects(model):
    ran = CliRunner().invoke(main, ["bench", "-m", str(model), "--size", "64"])
    assert ran.exit_code == 2 and "gives classes" in ran.output


def test_settings_of_objects_are_refused(model):
    for asked in ("stitch.min_area=5", "stitch.max_hole=9", "stitch.foreground=0.4"):
        with pytest.raises(SettingsError, match=r"is of objects; model scenes gives each pixel"):
            settings = segpipe.load_settings(None, [asked])
            segpipe.segment(np.zeros((9, 9), np.uint8), str(model), settings)


def test_an_imported_model_of_eleven_classes_predicts(tmp_path):
    """The article's U-Net has as many."""
    fields = {
        "name": "eleven",
        "architecture": {"name": "unet", "parameters": {"width": 2, "depth": 1, "padding": "same"}},
        "channels": ["grey"],
        "outputs": [f"class{number}" for number in range(11)],
        "normalisation": {"kind": "fixed"},
        "licence": "CC0-1.0",
        "training_data": "none",
    }
    card = parse_card(fields, "test")
    torch.manual_seed(0)
    path = tmp_path / "eleven.safetensors"
    write_model(path, build_network(*card.network_arguments), card)
    pixels, _ = scene((100, 70), 1)
    labels = segpipe.segment(pixels, str(path))
    assert load_model(path)[1].classes
    assert labels.max() < 11
    assert len(np.unique(labels)) > 1
