"""A whole training: from a YAML to a model that `segment` takes, stopped and resumed, and what fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
import tifffile
import torch
import yaml
from click.testing import CliRunner

import segpipe
from segpipe.cli import main
from segpipe.errors import InputError, SettingsError, Stopped
from segpipe.geometry import Box
from segpipe.models.modelfile import load_model, read_card
from segpipe.models.network import NETWORKS, build_network
from segpipe.synthetic import NucleiField
from segpipe.training.batches import BatchMaker, Prepared, batches
from segpipe.training.course import CHECKPOINT, Course, input_size
from segpipe.training.dataset import load_samples, split_samples
from segpipe.training.run import first_card, train, weighing_of
from segpipe.training.settings import parse_train_settings
from segpipe.training.targets import interior_of
from segpipe.training.trainer import Trainer, learning_rate
from segpipe.training.weights import Weighing, weight_map


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six images of made nuclei with their masks, two of one field of view."""
    folder = tmp_path_factory.mktemp("data")
    field = NucleiField((192, 288), seed=3, empty=0.0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number in range(6):
        y, x = 96 * (number // 3), 96 * (number % 3)
        box = Box(y, x, y + 96, x + 96)
        pixels, labels = field.pixels(box), field.labels(box)
        tifffile.imwrite(folder / "images" / f"n{number}.tif", pixels)
        tifffile.imwrite(folder / "masks" / f"n{number}.tif", labels.astype(np.uint16))
    (folder / "index.csv").write_text(
        "id,fov\n" + "".join(f"n{number},{'f' if number < 2 else ''}\n" for number in range(6))
    )
    return folder


def tree(data, out, **course):
    """Settings of a training that takes seconds."""
    return {
        "name": "made",
        "output": str(out),
        "data": {
            "images": str(data / "images"),
            "masks": str(data / "masks"),
            "index": str(data / "index.csv"),
            "group": "fov",
            "validation": 0.3,
        },
        "network": {
            "architecture": {
                "name": "unet",
                "parameters": {"width": 4, "depth": 2, "padding": "same", "norm": "batch"},
            }
        },
        "course": {"steps": 12, "batch": 2, "crop": 64, "validate_every": 6} | course,
        "threads": 1,
    }


def settings_of(data, out, **course):
    return parse_train_settings(tree(data, out, **course), "test")


def weights(path):
    network, _ = load_model(path)
    return network.state_dict()


def same(first, second):
    return all(torch.equal(first[key], second[key]) for key in first)


def test_the_model_that_comes_out_segments(data, tmp_path):
    trained = train(settings_of(data, tmp_path / "run", steps=60, validate_every=30))
    card = read_card(trained.model)
    assert card.name == "made"
    assert card.figures["AP at IoU .50"] == pytest.approx(
        trained.figures["AP at IoU .50"], abs=6e-4
    )
    assert card.figures["AP at IoU .50"] > 0.3
    assert card.object_diameter_px > 0
    image = tifffile.imread(data / "images" / "n0.tif")
    labels = segpipe.segment(image, str(trained.model))
    assert labels.max() > 0
    page = trained.report.read_text()
    assert page.count("<polyline") == 4
    assert page.count("data:image/png") == 2  # as many as validation images
    assert "http" not in page.replace("http://www.w3.org", "")
    rows = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert len(rows) == 3
    assert rows[0].startswith("step,loss,learning rate,AP at IoU .50")


def test_the_figure_of_the_card_is_that_of_the_file(data, tmp_path):
    """The validation images through `segment` with the written model score what the card says."""
    from segpipe.evaluate import score_images

    settings = settings_of(data, tmp_path / "run", steps=40, validate_every=40)
    trained = train(settings)
    split = split_samples(load_samples(settings.data, 1), 0.3, settings.seed)
    eager = segpipe.load_settings(None, ["infer.backend=eager", "infer.skip_empty=false"])
    scores = score_images(
        (one.labels, segpipe.segment(one.pixels, str(trained.model), eager))
        for one in split.validation
    )
    assert scores.mean_ap() == pytest.approx(trained.figures["mean AP, IoU .50 to .90"], abs=0.01)


class _StopAt:
    """Stands for Ctrl-C after so many steps."""

    def __init__(self, monkeypatch, step):
        before = Trainer.step

        def stopping(trainer, batch, number):
            if number == step:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)
            return before(trainer, batch, number)

        monkeypatch.setattr(Trainer, "step", stopping)


@pytest.mark.parametrize("step", [3, 5, 6])
def test_stopped_and_resumed_it_comes_to_the_same_bytes(data, tmp_path, monkeypatch, step):
    whole = train(settings_of(data, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        _StopAt(patch, step)
        with pytest.raises(Stopped, match=f"step {step + 1} of 12"):
            train(settings_of(data, tmp_path / "parts"))
    resumed = train(settings_of(data, tmp_path / "parts"))
    assert same(weights(whole.model), weights(resumed.model))
    for name in ("history.csv",):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_after_kill_9_it_goes_on_to_the_same_curve(data, tmp_path):
    whole = train(settings_of(data, tmp_path / "whole", steps=40))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree(data, tmp_path / "killed", steps=40)))
    process = subprocess.Popen(
        [sys.executable, "-m", "segpipe.cli", "train", str(config)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    assert (tmp_path / "killed" / CHECKPOINT).exists()
    resumed = train(settings_of(data, tmp_path / "killed", steps=40))
    assert same(weights(whole.model), weights(resumed.model))
    assert (tmp_path / "whole" / "history.csv").read_text() == (
        tmp_path / "killed" / "history.csv"
    ).read_text()


def test_a_finished_training_is_not_done_again(data, tmp_path, monkeypatch):
    first = train(settings_of(data, tmp_path))
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("a step was made"))
    assert train(settings_of(data, tmp_path)).card == first.card


def test_an_output_of_other_settings_is_refused_and_restart_begins_anew(data, tmp_path):
    train(settings_of(data, tmp_path))
    other = settings_of(data, tmp_path, learning_rate=0.01)
    with pytest.raises(SettingsError, match="other settings"):
        train(other)
    train(other, restart=True)


def test_a_damaged_checkpoint_is_named(data, tmp_path):
    train(settings_of(data, tmp_path))
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    for damaged in (whole[:1000], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(SettingsError, match="damaged"):
            train(settings_of(data, tmp_path))


def test_a_loss_that_is_no_number_names_its_batch(data, tmp_path, monkeypatch):
    before = BatchMaker.__call__

    def poisoned(maker, step):
        batch = before(maker, step)
        if step == 4:
            batch.images.fill_(float("nan"))
        return batch

    monkeypatch.setattr(BatchMaker, "__call__", poisoned)
    with pytest.raises(InputError, match=r"loss of step 4 is nan; its batch was n\d, n\d"):
        train(settings_of(data, tmp_path))


def prepared(data, out):
    settings = settings_of(data, out)
    card = first_card(settings)
    samples = load_samples(settings.data, 1)
    return settings, [Prepared.of(one, card, Weighing(w0=10)) for one in samples]


def test_a_batch_is_a_function_of_the_step(data, tmp_path):
    settings, samples = prepared(data, tmp_path)
    maker = BatchMaker(samples, settings, 64)
    ahead = list(batches(maker, 3, 9, threads=3))
    for step, batch in zip(range(3, 9), ahead, strict=True):
        alone = maker(step)
        assert torch.equal(batch.images, alone.images)
        assert torch.equal(batch.maps, alone.maps)
        assert batch.names == alone.names
    assert not torch.equal(ahead[0].images, ahead[1].images)


def test_image_and_targets_of_a_batch_lie_at_the_same_places(tmp_path):
    """An image that is its own mask, through the whole making of a crop."""
    labels = np.zeros((96, 110), np.int32)
    labels[20:45, 15:60], labels[60:80, 50:95] = 1, 2
    pixels = np.where(labels > 0, 200, 10).astype(np.uint8)
    for name, array in (("images", pixels), ("masks", labels.astype(np.uint16))):
        (tmp_path / name).mkdir()
        for stem in "ab":
            tifffile.imwrite(tmp_path / name / f"{stem}.tif", array)
    fields = tree(tmp_path, tmp_path / "run")
    fields["data"] = {key: fields["data"][key] for key in ("images", "masks", "validation")}
    plain = {"gain": [1, 1], "offset": [0, 0], "noise": 0, "blur_px": 0}
    settings = parse_train_settings(fields | {"augment": plain}, "test")
    samples = load_samples(settings.data, 1)
    ready = [Prepared.of(one, first_card(settings), Weighing(w0=10)) for one in samples]
    batch = BatchMaker(ready, settings, 64)(1)
    assert 0.05 < batch.maps[:, 0].mean() < 0.95
    assert torch.equal(batch.images[:, 0] >= 0.5, batch.maps[:, 0] == 1)


@pytest.mark.parametrize("what", ["weight map", "interior"])
def test_weights_and_interior_of_a_batch_are_those_of_their_places(tmp_path, what):
    """An image that is its own weight map, or interior, through the whole making of a crop."""
    labels = np.zeros((96, 110), np.uint16)
    labels[20:45, 15:50], labels[20:45, 53:90], labels[48:80, 30:95] = 1, 2, 3
    shown = weight_map(labels, 20.0, 3.0) if what == "weight map" else interior_of(labels)
    for name, array in (("images", shown.astype(np.float32)), ("masks", labels)):
        (tmp_path / name).mkdir()
        for stem in "ab":
            tifffile.imwrite(tmp_path / name / f"{stem}.tif", array)
    fields = tree(tmp_path, tmp_path / "run")
    fields["data"] = {key: fields["data"][key] for key in ("images", "masks", "validation")}
    fields["network"]["normalisation"] = {"kind": "fixed", "low": 0, "high": 1}
    fields["augment"] = {"gain": [1, 1], "offset": [0, 0], "noise": 0, "blur_px": 0}
    fields["loss"] = {"w0": 20, "sigma_px": 3}
    settings = parse_train_settings(fields, "test")
    split = split_samples(load_samples(settings.data, 1), 0.5, 0)
    weighing = weighing_of(settings, split)
    ready = [Prepared.of(one, first_card(settings), weighing) for one in split.training]
    batch = BatchMaker(ready, settings, 64)(1)
    if what == "weight map":
        assert batch.weights.max() > 8
        assert torch.allclose(batch.weights, batch.images[:, 0], atol=0.02)
        off = parse_train_settings(fields | {"loss": {"weight_map": False}}, "test")
        assert weighing_of(off, split).w0 == 0
    else:
        inside = batch.maps[:, 0] == 1
        assert torch.allclose(batch.maps[:, 1][inside], batch.images[:, 0][inside], atol=2e-3)
        assert batch.maps[:, 1].max() > 0.8


def test_class_weights_are_those_of_background_and_objects(data, tmp_path):
    fields = tree(data, tmp_path) | {"loss": {"class_weights": {"objects": 3, "background": 0.5}}}
    settings = parse_train_settings(fields | {"loss": fields["loss"] | {"weight_map": False}}, "t")
    split = split_samples(load_samples(settings.data, 1), 0.3, 0)
    (one, *_) = split.training
    weights = Prepared.of(one, first_card(settings), weighing_of(settings, split)).targets[2]
    assert np.array_equal(weights, np.where(one.labels > 0, 3, 0.5))


def test_an_unpadded_network_is_asked_for_what_lies_in_the_middle_of_its_crop(tmp_path):
    """Image and target that its loss compares lie at the same places."""
    labels = np.zeros((200, 210), np.uint16)
    labels[20:85, 15:90], labels[100:180, 80:185] = 1, 2
    for name, array in (
        ("images", np.where(labels > 0, 200, 10).astype(np.uint8)),
        ("masks", labels),
    ):
        (tmp_path / name).mkdir()
        for stem in "ab":
            tifffile.imwrite(tmp_path / name / f"{stem}.tif", array)
    fields = tree(tmp_path, tmp_path / "run")
    fields["data"] = {key: fields["data"][key] for key in ("images", "masks", "validation")}
    fields["network"]["architecture"]["parameters"]["padding"] = "valid"
    fields["augment"] = {"gain": [1, 1], "offset": [0, 0], "noise": 0, "blur_px": 0}
    settings = parse_train_settings(fields, "test")
    card = first_card(settings)
    network = build_network(*card.network_arguments)
    ready = [Prepared.of(one, card, Weighing(w0=10)) for one in load_samples(settings.data, 1)]
    batch = BatchMaker(ready, settings, input_size(network, 64))(1)
    trainer = Trainer(network, settings, torch.device("cpu"))
    seen = {}
    loss = trainer._loss

    def spying(output, targets):
        seen.update(output=output, targets=targets)
        return loss(output, targets)

    trainer._loss = spying
    trainer.step(batch, 0)
    margin = network.margin
    middle = batch.images[:, 0, margin:-margin, margin:-margin] >= 0.5
    assert 0.05 < middle.float().mean() < 0.95
    assert torch.equal(seen["targets"].maps[:, 0] == 1, middle)
    assert torch.equal(seen["targets"].weights, batch.weights[:, margin:-margin, margin:-margin])
    assert seen["output"].sides[0].shape == seen["targets"].maps.shape


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_crop_counts_what_the_network_gives(padding, depth):
    """An unpadded network of depth 4 gives 4 pixels of an input of 188, and trained on those."""
    network = build_network("unet", {"width": 1, "depth": depth, "padding": padding}, 1, 1).eval()
    for crop in (16, 64, 100):
        size = input_size(network, crop)
        with torch.no_grad():
            given = network(torch.zeros(1, 1, size, size)).shape[-1]
        assert crop <= given < crop + network.stride


def test_the_seed_changes_the_crops(data, tmp_path):
    _, samples = prepared(data, tmp_path)
    made = [
        BatchMaker(samples, parse_train_settings(tree(data, tmp_path) | {"seed": seed}, "t"), 64)(0)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0].images, made[1].images)
    assert not torch.equal(made[0].images, made[2].images)


def test_the_average_lags_behind(data, tmp_path):
    """Weights that are validated are not those of the last step."""
    settings, samples = prepared(data, tmp_path)
    network = build_network(*first_card(settings).network_arguments)
    trainer = Trainer(network, settings, torch.device("cpu"))
    before = trainer.averaged.head.weight.clone()
    trainer.step(BatchMaker(samples, settings, 64)(0), 0)
    # at step 0 the memory is 1 / 10: see Trainer._average
    expected = before * 0.1 + network.head.weight.detach() * 0.9
    assert torch.allclose(trainer.averaged.head.weight, expected, atol=1e-7)
    assert not torch.equal(trainer.averaged.head.weight, network.head.weight)


def test_masks_that_changed_are_another_training(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    train(settings_of(tmp_path / "data", tmp_path / "run"))
    mask = tmp_path / "data" / "masks" / "n3.tif"
    labels = tifffile.imread(mask)
    tifffile.imwrite(mask, np.where(labels == labels.max(), 0, labels))
    with pytest.raises(SettingsError, match="other settings, images"):
        train(settings_of(tmp_path / "data", tmp_path / "run"))


def test_targets_of_a_batch(data, tmp_path):
    settings, samples = prepared(data, tmp_path)
    batch = BatchMaker(samples, settings, 64)(0)
    foreground, interior = batch.maps[:, 0], batch.maps[:, 1]
    assert set(foreground.unique().tolist()) == {0.0, 1.0}
    assert interior[foreground == 0].abs().max() == 0
    assert 0.5 < interior.max() <= 1
    assert batch.weights.min() > 0.999  # sampled between pixels


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "unet"])
def test_every_network_trains(data, tmp_path, name):
    """A few steps on one batch lower the loss, through whatever heads the network has."""
    settings, samples = prepared(data, tmp_path)
    narrow = {"unetplusplus": {"width": 2, "depth": 2}, "unet3plus": {"width": 2, "depth": 2}}
    narrow |= {"resunet": {"width": 4}}
    torch.manual_seed(0)
    network = build_network(name, narrow.get(name, {}), 1, 2)
    trainer = Trainer(network, settings, torch.device("cpu"))
    batch = BatchMaker(samples, settings, 64)(0)
    losses = [trainer.step(batch, 5) for _ in range(8)]
    assert losses[-1] < losses[0]


def test_the_unpadded_network_trains(data, tmp_path):
    fields = tree(data, tmp_path, crop=64, steps=2, validate_every=2)
    fields["network"]["architecture"]["parameters"]["padding"] = "valid"
    assert train(parse_train_settings(fields, "test")).model.exists()


def test_foreground_alone_trains(data, tmp_path):
    fields = tree(data, tmp_path, steps=2, validate_every=2)
    fields["network"]["outputs"] = ["foreground"]
    card = train(parse_train_settings(fields, "test")).card
    assert card.outputs == ("foreground",)
    assert card.decode.interior == ()


def test_the_rate_rises_and_falls(data, tmp_path):
    course = settings_of(data, tmp_path, steps=100, warmup=0.1, learning_rate=1e-3).course
    rates = [learning_rate(course, step) for step in range(100)]
    assert rates[9] == pytest.approx(1e-3)
    assert all(a < b for a, b in pairwise(rates[:10]))
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_crops_of_one_value_per_channel_are_refused_before_images_are_read(data, tmp_path):
    fields = tree(data, tmp_path, crop=16, batch=1)
    fields["data"]["images"] = str(tmp_path / "none")
    fields["network"]["architecture"]["parameters"]["depth"] = 4
    with pytest.raises(SettingsError, match=r"course\.batch 1 and course\.crop 16: .* batch norm"):
        train(parse_train_settings(fields, "test"))
    for change in ({"batch": 2}, {"crop": 32}):
        fits = fields | {"course": fields["course"] | change}
        with pytest.raises(SettingsError, match="none is not a folder"):
            train(parse_train_settings(fits, "test"))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_tried_for_its_crops(data, tmp_path, name):
    fields = tree(data, tmp_path, crop=64, batch=1)
    fields["data"]["images"] = str(tmp_path / "none")
    fields["network"]["architecture"] = {"name": name}
    with pytest.raises(SettingsError, match="none is not a folder"):
        train(parse_train_settings(fields, "test"))


def test_a_history_older_than_the_checkpoint_is_mended(data, tmp_path):
    """As a kill between the two at the last step leaves it."""
    train(settings_of(data, tmp_path))
    history = tmp_path / "history.csv"
    whole = history.read_text()
    history.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    train(settings_of(data, tmp_path))
    assert history.read_text() == whole


def test_ids_of_32_bits_train_as_small_ones_do(data, tmp_path):
    """Also their diameter: a table over all ids up to the largest would take 32 GB."""
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data" / "masks").iterdir():
        labels = tifffile.imread(path).astype(np.uint32)
        tifffile.imwrite(path, np.where(labels > 0, np.uint32(2**32 - 1) - labels, 0))
    course = {"steps": 2, "validate_every": 2}
    small = train(settings_of(data, tmp_path / "small", **course))
    large = train(settings_of(tmp_path / "data", tmp_path / "large", **course))
    assert large.card.object_diameter_px == small.card.object_diameter_px > 5
    assert large.figures == small.figures
    assert same(weights(small.model), weights(large.model))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"augment": {"stain": 0.3}}, "augment.stain is of red, green and blue images"),
        ({"augment": {"scale": [0.001, 1]}}, "augment.scale must lie within 0.1 and 10"),
        ({"augment": {"scale": [1, 1e6]}}, "augment.scale must lie within 0.1 and 10"),
        ({"augment": {"elastic_px": 1e4}}, "augment.elastic_px"),
        ({"loss": {"w0": -1}}, "loss.w0"),
        ({"loss": {"class_weights": {"nuclei": 1}}}, "must name background, objects"),
        ({"nmae": "x"}, "unknown key nmae (did you mean 'name'?)"),
        ({"course": {"stepz": 3}}, "unknown key course.stepz (did you mean 'steps'?)"),
        (
            {"course": {"steps": 0}},
            "course.steps: Input should be greater than or equal to 1, got 0",
        ),
        ({"data": {"images": "x"}}, "key data.masks is missing"),
        ({"augment": {"scale": [2, 1]}}, "augment.scale must be two rising positive numbers"),
        ({"network": {}}, "key network.architecture is missing"),
    ],
)
def test_a_wrong_key_is_one_line_and_exit_code_2(data, tmp_path, change, told):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree(data, tmp_path / "run") | change))
    result = CliRunner().invoke(main, ["train", str(config)])
    assert result.exit_code == 2
    assert told in result.output
    assert result.output.count("\n") == 1


def test_an_unknown_loss_suggests_the_nearest(data, tmp_path):
    fields = tree(data, tmp_path) | {"loss": {"name": "instances"}}
    with pytest.raises(SettingsError, match="did you mean 'instance'"):
        train(parse_train_settings(fields, "test"))


def test_a_best_that_came_early_is_kept(data, tmp_path, monkeypatch):
    """The model file holds the weights of the best validation, not of the last."""
    kept = {}
    before = Course._validate

    def validating(course):
        before(course)
        if course.step == 6:
            kept.update({k: v.clone() for k, v in course.trainer.averaged.state_dict().items()})
            course.history.validations[6]["mean AP, IoU .50 to .90"] = 2.0
            course.best = dict(kept)

    monkeypatch.setattr(Course, "_validate", validating)
    trained = train(settings_of(data, tmp_path))
    found = weights(trained.model)
    assert all(torch.equal(found[key], kept[key]) for key in found if not key.endswith("tracked"))


def test_a_training_starts_with_the_weights_of_a_model(data, tmp_path, monkeypatch):
    before = train(settings_of(data, tmp_path / "before")).model
    told = tree(data, tmp_path / "out", steps=1, validate_every=1, learning_rate=1e-9)
    del told["network"]
    trained = train(parse_train_settings(told | {"start": str(before)}, "test"))
    network, card = load_model(before)
    after, became = load_model(trained.model)
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and "running" not in key:
            torch.testing.assert_close(after.state_dict()[key], tensor, rtol=0, atol=1e-6)
    assert (became.architecture, became.outputs) == (card.architecture, card.outputs)
    assert became.figures["trained from"].startswith("made, ")
    anew = tree(data, tmp_path / "out", steps=1, validate_every=1, learning_rate=1e-9)
    with pytest.raises(SettingsError, match="other settings"):  # the start is part of them
        train(parse_train_settings(anew, "test"))


def test_a_start_that_is_another_network_is_named(data, tmp_path):
    before = train(settings_of(data, tmp_path / "before", steps=1, validate_every=1)).model
    told = tree(data, tmp_path / "out") | {"start": str(before)}
    told["network"]["architecture"]["parameters"]["width"] = 8
    with pytest.raises(SettingsError, match=r"another network\.architecture .*leave network out"):
        train(parse_train_settings(told, "test"))


def test_a_start_that_is_not_there_is_one_line(data, tmp_path):
    told = tree(data, tmp_path / "out") | {"start": "nuclei-flourescence"}
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(told))
    result = CliRunner().invoke(main, ["train", str(path)])
    assert result.exit_code == 2
    assert "did you mean 'nuclei-fluorescence'" in result.output
    del told["network"]
    path.write_text(yaml.safe_dump(told))
    again = CliRunner().invoke(main, ["train", str(path)])
    assert again.exit_code == 2 and len(again.output.strip().splitlines()) == 1, again.output
