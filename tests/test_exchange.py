"""Models for other programs: what is described is what other software then gets."""

from __future__ import annotations

import io
import sys
import warnings
import zipfile
from pathlib import Path

import bioimageio.spec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from segpipe.cli import main
from segpipe.errors import ModelError
from segpipe.exchange import graphs
from segpipe.exchange.example import example_image
from segpipe.exchange.package import (
    bioimageio_package,
    describe_package,
    described_scaling,
    load_quietly,
)
from segpipe.inference import normalise
from segpipe.memory import find_ranges
from segpipe.models.card import parse_card
from segpipe.models.modelfile import import_model, load_model, model_geometry, write_model
from segpipe.models.network import build_network
from segpipe.models.onnx_weights import read_onnx
from segpipe.models.tensors import storage_of
from segpipe.segmenter.openvino import import_quietly
from segpipe.settings import Settings

FIELDS = {
    "name": "small",
    "architecture": {
        "name": "unet",
        "parameters": {"width": 3, "depth": 2, "padding": "same", "norm": "batch"},
    },
    "channels": ["nuclei"],
    "outputs": ["foreground", "interior"],
    "normalisation": {"kind": "percentile", "low": 1.0, "high": 99.8},
    "licence": "CC0-1.0",
    "training_data": "none",
    "limits": "It was never trained.",
}
RGB = {"channels": ["red", "green", "blue"], "normalisation": {"kind": "fixed"}}
VALID = {"architecture": {"name": "unet", "parameters": {"width": 1, "depth": 3}}}
CLASSES = {"outputs": ["stroma", "tumour", "other"]}
GATED = {"architecture": {"name": "unet3plus", "parameters": {"width": 1, "classification": True}}}


def make(**fields):
    return parse_card({**FIELDS, **fields}, "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model file whose weights nobody trained, batch norm's statistics included."""
    torch.manual_seed(0)
    network, random = build_network(*make().network_arguments), np.random.default_rng(0)
    for key, tensor in network.state_dict().items():
        if key.endswith(("norm.weight", "norm.bias", "running_mean", "running_var")):
            tensor[:] = torch.from_numpy(random.uniform(0.5, 1.5, tensor.shape))
    path = tmp_path_factory.mktemp("models") / "small.safetensors"
    write_model(path, network, make())
    return path


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "small.zip"
    path.write_bytes(bioimageio_package(model, ["Someone"]))
    return path


@pytest.fixture(scope="module")
def unpacked(package):
    with zipfile.ZipFile(package) as archive:
        archive.extractall(package.parent / "unpacked")
    return package.parent / "unpacked"


@pytest.fixture(scope="module")
def described(unpacked):
    return yaml.safe_load((unpacked / "rdf.yaml").read_text())


def onnxruntime_of(unpacked):
    session = onnxruntime.InferenceSession(
        unpacked / "weights.onnx", providers=["CPUExecutionProvider"]
    )
    return lambda windows: session.run(None, {session.get_inputs()[0].name: windows})[0]


def openvino_of(unpacked):
    compiled = (
        import_quietly()
        .Core()
        .compile_model(str(unpacked / "weights.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    )
    return lambda windows: compiled(windows)[0]


def torchscript_of(unpacked):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript's deprecation
        loaded = torch.jit.load(unpacked / "weights.pt")
    return lambda windows: loaded(torch.from_numpy(windows)).detach().numpy()


RUNNERS = [onnxruntime_of, openvino_of, torchscript_of]


# --- the package ----------------------------------------------------------------------------------


def test_the_package_is_valid(package):
    with zipfile.ZipFile(package) as archive:
        found = load_quietly(bioimageio.spec, archive)
    assert isinstance(found, bioimageio.spec.model.v0_5.ModelDescr)
    assert found.validation_summary.status != "failed"
    assert found.name == "small (segpipe)" and found.license == "CC0-1.0"
    assert [author.name for author in found.authors] == ["Someone"]
    assert "It was never trained." in found.description


@pytest.mark.parametrize("runner", RUNNERS)
def test_whoever_does_what_is_described_gets_the_test_output(unpacked, described, runner):
    """Pre- and post-processing here are written from the format's rules, not from our code."""
    image, output = described["inputs"][0], described["outputs"][0]
    windows = np.load(unpacked / image["test_tensor"]["source"])
    assert windows.dtype == np.float32 and windows.max() > 255  # as a camera gives it
    for step in image["preprocessing"]:
        assert step["id"] == "scale_range"
        kwargs = step["kwargs"]
        axes = tuple(
            [axis.get("id") for axis in image["axes"]].index(name) for name in kwargs["axes"]
        )
        low, high = (
            np.percentile(windows, kwargs[key], axis=axes, keepdims=True)
            for key in ("min_percentile", "max_percentile")
        )
        windows = ((windows - low) / (high - low + kwargs["eps"])).astype(np.float32)
    assert [step["id"] for step in output["postprocessing"]] == ["sigmoid"]
    with torch.no_grad():
        logits = runner(unpacked)(windows)
    found = 1 / (1 + np.exp(-logits.astype(np.float64)))
    expected = np.load(unpacked / output["test_tensor"]["source"])
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("runner", RUNNERS)
def test_batch_and_sizes_are_free_and_the_numbers_those_of_the_network(
    model, unpacked, described, runner
):
    network, _ = load_model(model)
    run, size = runner(unpacked), described["inputs"][0]["axes"][2]["size"]
    random = np.random.default_rng(0)
    for count, rows, columns in ((1, 0, 0), (3, 2, 7)):
        shape = (count, 1, *(size["min"] + n * size["step"] for n in (rows, columns)))
        windows = random.standard_normal(shape, np.float32)
        with torch.no_grad():
            expected, found = graphs.eager_logits(network, windows), run(windows)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_tiles_without_the_described_halo_are_those_of_the_whole(unpacked, described):
    run, axis = onnxruntime_of(unpacked), described["outputs"][0]["axes"][2]
    step = described["inputs"][0]["axes"][2]["size"]["step"]
    window, halo = 2 * axis["halo"] + 4 * step, axis["halo"]
    image = np.random.default_rng(0).standard_normal((1, 1, window, window + 6 * step), np.float32)
    whole, tile = run(image), run(np.ascontiguousarray(image[..., 4 * step : 4 * step + window]))
    apart = np.abs(whole[..., 4 * step : 4 * step + window] - tile)[..., halo:-halo, :]
    scale = np.abs(whole).max()
    assert apart[..., halo:-halo].max() < 1e-5 * scale
    assert apart[..., : halo // 2].max() > 1e-3 * scale


def test_the_cover_is_twice_as_wide_as_high_and_small(unpacked):
    content = (unpacked / "cover.png").read_bytes()
    width, height = Image.open(io.BytesIO(content)).size
    assert width == 2 * height and len(content) < 500_000


def test_the_readme_says_what_the_card_says(unpacked):
    text = (unpacked / "README.md").read_text()
    for part in ("It was never trained.", "CC0-1.0", "halo is 24 px", "`foreground` >= 0.5"):
        assert part in text


@pytest.mark.parametrize("fields", [{}, RGB, VALID, CLASSES, GATED])
def test_sizes_and_halo_that_are_described_are_the_networks(fields):
    card = make(**fields)
    geometry = model_geometry(card)
    with torch.device("meta"):
        network = build_network(*card.network_arguments)
    told = describe_package(card, geometry, [])
    image, output = told["inputs"][0], told["outputs"][0]
    for axis, made in zip(image["axes"][2:], output["axes"][2:], strict=True):
        for number in range(6):
            size = axis["size"]["min"] + number * axis["size"]["step"]
            assert network.admissible(size)
            assert made["size"]["offset"] == -2 * geometry.margin
            left = size + made["size"]["offset"] - 2 * made.get("halo", 0)
            assert left == size - 2 * geometry.halo > 0
    assert image["axes"][1]["channel_names"] == list(card.channels)
    assert [step["id"] for step in output["postprocessing"]] == [
        "softmax" if card.classes else "sigmoid"
    ]


@pytest.mark.parametrize(("fields", "tolerance"), [(RGB, 1e-6), ({}, 0.02)])
def test_the_described_scaling_is_nearly_that_of_segpipe(fields, tolerance):
    """Fixed scaling is the same; percentiles are interpolated there, and not here."""
    card = make(**fields)
    image = example_image(card, 96)
    ours = normalise(image, find_ranges(image, card, Settings()))
    theirs = described_scaling(image[np.newaxis].astype(np.float32), card)[0]
    assert 0.5 < np.abs(ours).max() < 3
    np.testing.assert_allclose(theirs, ours, atol=tolerance)


def test_an_image_of_stained_tissue_is_bright_and_of_fluorescence_dark():
    stained, glowing = example_image(make(**RGB), 128), example_image(make(), 128)
    assert stained.dtype == np.uint8 and np.median(stained, axis=(1, 2)).min() > 100
    assert glowing.dtype == np.uint16 and np.median(glowing) < 0.5 * np.percentile(glowing, 99)


# --- back again -----------------------------------------------------------------------------------


def test_what_was_exported_comes_back_bit_for_bit(model, unpacked, tmp_path):
    card = import_model(unpacked / "weights.onnx", tmp_path / "back.safetensors", {})
    assert card == make()
    assert (tmp_path / "back.safetensors").read_bytes() == model.read_bytes()


def test_import_of_onnx_by_the_command_line_as_float16(unpacked, tmp_path):
    command = ["models", "import", unpacked / "weights.onnx", tmp_path / "x.safetensors"]
    done = CliRunner().invoke(main, [*map(str, command), "--storage", "float16"])
    assert done.exit_code == 0, done.output
    assert storage_of(tmp_path / "x.safetensors") == "float16"


def changed(path: Path, change, target: Path) -> Path:
    proto = onnx.load(path)
    change(proto)
    target.write_bytes(proto.SerializeToString())
    return target


def rename(proto):
    proto.graph.initializer[0].name = "onnx::Conv_31"


def cut_short(proto):
    entry = proto.graph.initializer[0]
    entry.raw_data = entry.raw_data[:-4]


def outside(proto):
    entry = proto.graph.initializer[0]
    entry.data_location = onnx.TensorProto.EXTERNAL
    place = entry.external_data.add()
    place.key, place.value = "location", "../../etc/passwd"


def as_integers(proto):
    proto.graph.initializer[0].data_type = onnx.TensorProto.INT8


def without_card(proto):
    del proto.metadata_props[:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"tensor \S+ is missing \(1 of \d+ are\)"),
        (cut_short, "is damaged"),
        (outside, "keeps its weights in other files"),
        (as_integers, "is neither float32 nor float16"),
        (without_card, "key name is missing"),
        (lambda proto: proto.graph.ClearField("initializer"), "an ONNX file without weights"),
    ],
)
def test_another_graph_is_refused_in_one_line(unpacked, tmp_path, change, message):
    source = changed(unpacked / "weights.onnx", change, tmp_path / "other.onnx")
    with pytest.raises(ModelError, match=message) as caught:
        import_model(source, tmp_path / "out.safetensors", {})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_damaged_onnx_file_is_one_line(unpacked, tmp_path):
    data = (unpacked / "weights.onnx").read_bytes()
    for content in (b"", b"no model", data[: len(data) // 2], data[:-1]):
        (tmp_path / "x.onnx").write_bytes(content)
        with pytest.raises(ModelError) as caught:
            import_model(tmp_path / "x.onnx", tmp_path / "out.safetensors", FIELDS)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="cannot be read"):
        import_model(tmp_path / "none.onnx", tmp_path / "out.safetensors", FIELDS)


def test_weights_that_the_graph_does_not_use_are_kept(tmp_path):
    """Heads of deep supervision: only a training looks at them."""
    network = build_network(*make().network_arguments).requires_grad_(False)
    proto = onnx.ModelProto()
    graphs._keep_all_weights(onnx, proto, network)
    (tmp_path / "x.onnx").write_bytes(proto.SerializeToString())
    _, found = read_onnx(tmp_path / "x.onnx")
    state = network.state_dict()
    expected = {key: state[key] for key in state if not key.endswith("num_batches_tracked")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# --- what goes wrong ------------------------------------------------------------------------------


def test_a_graph_that_is_not_the_network_is_not_handed_out(model):
    network, card = load_model(model)
    geometry = model_geometry(card)

    def right(windows):
        return graphs.eager_logits(network, windows)

    graphs._compare(right, network, geometry, "small")
    with pytest.raises(ModelError, match="of the largest away from"):
        graphs._compare(lambda windows: right(windows) * 1.01, network, geometry, "small")
    with pytest.raises(ModelError, match="the graph gives"):
        graphs._compare(lambda windows: right(windows)[..., 1:], network, geometry, "small")


@pytest.mark.parametrize(
    ("package_name", "suffix"),
    [("onnx", ".onnx"), ("onnxscript", ".onnx"), ("bioimageio.spec", ".zip")],
)
def test_a_package_that_is_not_installed_is_named(
    model, tmp_path, monkeypatch, package_name, suffix
):
    monkeypatch.setitem(sys.modules, package_name, None)
    done = CliRunner().invoke(main, ["models", "export", str(model), str(tmp_path / f"x{suffix}")])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert f"{package_name}; install it with pip install 'segpipe[export]'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_export_needs_to_know_the_format(model, tmp_path):
    done = CliRunner().invoke(main, ["models", "export", str(model), str(tmp_path / "x.bin")])
    assert done.exit_code == 2 and "which format? give it with --format" in done.stderr


def test_export_of_torchscript_with_its_card(model, tmp_path):
    target = tmp_path / "x.pt"
    done = CliRunner().invoke(main, ["models", "export", str(model), str(target)])
    assert done.exit_code == 0 and "logits of foreground, interior" in done.stdout
    extra = {"card.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript's deprecation
        torch.jit.load(target, _extra_files=extra)
    assert parse_card(yaml.safe_load(extra["card.json"]), "card") == make()
