"""A model file to probabilities: bytes that depend on nothing they should not."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from segpipe.backend import BACKENDS, EAGER
from segpipe.errors import ModelError, SettingsError
from segpipe.inference import quantise
from segpipe.models.card import parse_card
from segpipe.models.modelfile import find_model, load_model, write_model
from segpipe.models.network import build_network
from segpipe.segmenter import (
    Segmenter,
    choose_device,
    device_type,
    devices,
    load_segmenter,
)

Windows = NDArray[np.float32]


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write_random_model(path: Path, parameters: dict[str, Any], **fields: Any) -> Path:
    torch.manual_seed(7)
    card = parse_card(
        {
            "name": "random",
            "architecture": {"name": "unet", "parameters": parameters},
            "channels": ["nuclei"],
            "outputs": ["foreground", "interior"],
            "normalisation": {"kind": "percentile"},
            "licence": "CC0-1.0",
            "training_data": "none",
            **fields,
        },
        "test",
    )
    write_model(path, build_network(*card.network_arguments), card)
    return path


@pytest.fixture(scope="module")
def shipped() -> Path:
    return find_model("nuclei-fluorescence")


both = pytest.mark.parametrize("backend", BACKENDS)


def random_windows(count: int, channels: int, height: int, width: int) -> Windows:
    return np.random.default_rng(0).random((count, channels, height, width), np.float32)


def test_attributes(shipped):
    segmenter = load_segmenter(shipped, "cpu", threads=1, batch=2)
    assert (segmenter.context, segmenter.halo, segmenter.stride, segmenter.margin) == (
        94,
        96,
        16,
        0,
    )
    assert segmenter.outputs == ("foreground", "interior")
    assert (segmenter.channels, segmenter.exact, segmenter.batch) == (1, True, 2)
    assert segmenter.card.name == "nuclei-fluorescence"
    assert segmenter.made_by.startswith("openvino 20")
    assert segmenter.made_by.endswith(", batch 2")
    eager = load_segmenter(shipped, "cpu", backend="eager")
    assert eager.made_by.startswith(f"torch {torch.__version__}, cpu ")
    assert load_segmenter(shipped, "cpu", core_only=True).margin == 96


@both
def test_probabilities_are_the_sigmoid_of_the_network(shipped, backend):
    windows = random_windows(3, 1, 64, 48) * 4
    network, _ = load_model(shipped)
    with torch.no_grad():
        expected = torch.sigmoid(network(torch.from_numpy(windows))).numpy()
    result = load_segmenter(shipped, "cpu", batch=2, backend=backend)(windows)
    assert result.dtype == np.float32
    assert result.shape == (3, 2, 64, 48)
    assert 0 <= result.min() < result.max() <= 1
    assert np.abs(result - expected).max() < 1e-5
    assert np.ptp(expected) > 0.5


@both
def test_classes_get_a_softmax(tmp_path, backend):
    parameters = {"width": 4, "depth": 1, "padding": "same"}
    path = write_random_model(
        tmp_path / "m.safetensors", parameters, outputs=["background", "cell", "debris"]
    )
    windows = random_windows(1, 1, 32, 32) * 50
    network, _ = load_model(path)
    with torch.no_grad():
        expected = torch.softmax(network(torch.from_numpy(windows)), dim=1).numpy()
    result = load_segmenter(path, "cpu", backend=backend)(windows)
    assert np.abs(result - expected).max() < 1e-4  # of logits around 200
    assert np.allclose(result.sum(axis=1), 1)


@both
def test_an_unpadded_model_returns_less(tmp_path, backend):
    path = write_random_model(tmp_path / "m.safetensors", {"width": 2, "depth": 2})
    segmenter = load_segmenter(path, "cpu", backend=backend)
    assert segmenter.margin == 20
    assert segmenter(random_windows(1, 1, 60, 64)).shape == (1, 2, 20, 24)


@both
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_the_core_alone_is_part_of_the_whole(tmp_path, backend, padding):
    path = write_random_model(
        tmp_path / "m.safetensors", {"width": 8, "depth": 2, "padding": padding}
    )
    whole = load_segmenter(path, "cpu", backend=backend)
    core = load_segmenter(path, "cpu", backend=backend, core_only=True)
    rim = core.margin - whole.margin
    assert (core.margin, rim) == ((24, 24) if padding == "same" else (20, 0))
    windows = random_windows(2, 1, *((108, 92) if padding == "valid" else (96, 92)))
    expected = whole(windows)
    expected = expected[..., rim : expected.shape[-2] - rim, rim : expected.shape[-1] - rim]
    assert np.ptp(expected) > 0.1
    assert np.abs(core(windows) - expected).max() < 1e-6
    with pytest.raises(ValueError, match="larger than the margins of 2"):
        core(windows[..., : 2 * core.margin])


@both
def test_saturated_logits_are_zero_and_one(tmp_path, backend):
    path = write_random_model(tmp_path / "m.safetensors", {"width": 4, "depth": 1})
    result = load_segmenter(path, "cpu", backend=backend)(
        random_windows(1, 1, 36, 36) * np.float32(1e8)
    )
    assert set(np.unique(result)) <= {0, 1}


@pytest.mark.parametrize(
    ("parameters", "channels", "shape"),
    [
        (None, 1, (160, 144)),
        ({"width": 8, "depth": 3, "padding": "same", "norm": "batch"}, 3, (136, 160)),
        ({"width": 5, "depth": 2, "padding": "same"}, 2, (132, 140)),
        ({"width": 16, "depth": 2, "padding": "valid"}, 1, (148, 156)),
    ],
)
def test_bytes_do_not_depend_on_slot_mates_or_threads(
    parameters, channels, shape, shipped, tmp_path
):
    path = shipped
    if parameters is not None:
        names = [f"channel{index}" for index in range(channels)]
        path = write_random_model(tmp_path / "m.safetensors", parameters, channels=names)
    windows = random_windows(3, channels, *shape)
    for batch in (1, 2):
        found = set()
        for threads in (1, 2):
            segmenter = load_segmenter(
                path, "cpu", threads=threads, batch=batch, backend=EAGER
            )  # openvino: test_backends.py
            for position in range(batch):  # other slots, and other mates; one has zeros beside it
                order = np.roll(np.arange(3), position)
                result = segmenter(windows[order])[np.argsort(order)]
                found.add(result.tobytes())
        assert len(found) == 1
        assert len(np.unique(quantise(result))) > 20


def test_the_calling_thread_gets_its_number_of_threads(shipped, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as a dask nanny does
    segmenter = load_segmenter(shipped, "cpu", threads=2, backend=EAGER)
    torch.set_num_threads(1)
    seen = []

    def call() -> None:
        segmenter(random_windows(1, 1, 16, 16))
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert seen == [2]


def test_network_always_sees_a_full_batch(shipped):
    segmenter = load_segmenter(shipped, "cpu", batch=4, backend=EAGER)
    seen = []
    segmenter._forward._network.register_forward_pre_hook(
        lambda _, images: seen.append(images[0].shape)
    )
    result = segmenter(random_windows(6, 1, 16, 32))
    assert result.shape[0] == 6
    assert seen == [(4, 1, 16, 32)] * 2


def make_small_memory(segmenter: Segmenter, most: int) -> None:
    def refuse(_: object, images: tuple[torch.Tensor]) -> None:
        if len(images[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    segmenter._forward._network.register_forward_pre_hook(refuse)


def test_out_of_memory_halves_the_batch_and_goes_on(shipped, caplog):
    windows = random_windows(11, 1, 32, 32)
    expected = load_segmenter(shipped, "cpu", batch=8, backend=EAGER)(windows)
    segmenter = load_segmenter(shipped, "cpu", batch=8, backend=EAGER)
    make_small_memory(segmenter, 3)
    result = segmenter(windows)
    assert np.abs(result - expected).max() < 1e-5
    assert (segmenter.batch, segmenter.batch_used) == (8, 2)
    assert segmenter.made_by.endswith("batch 2")
    assert "batches of 2 instead of 8" in caplog.text


def test_one_window_that_does_not_fit_is_an_error(shipped):
    segmenter = load_segmenter(shipped, "cpu", batch=2, backend=EAGER)
    make_small_memory(segmenter, 0)
    with pytest.raises(SettingsError, match="32 x 48 pixels does not fit the memory of cpu"):
        segmenter(random_windows(1, 1, 32, 48))


@both
def test_windows_are_left_alone_and_may_be_read_only(shipped, backend):
    windows = random_windows(1, 1, 16, 16)
    windows.flags.writeable = False
    load_segmenter(shipped, "cpu", backend=backend)(windows)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 32, 32), r"has 3 channels, model nuclei-fluorescence takes 1 \(nuclei\)"),
        ((1, 1, 32, 40), "no window of 40 pixels; the next size up is 48"),
    ],
)
def test_windows_that_do_not_fit_are_refused(shape, message, shipped):
    with pytest.raises(ModelError, match=message):
        load_segmenter(shipped, "cpu")(np.zeros(shape, np.float32))


def test_no_windows_are_a_bug(shipped):
    with pytest.raises(ValueError, match="expected"):
        load_segmenter(shipped, "cpu")(np.zeros((0, 1, 32, 32), np.float32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "cuda was asked for, but torch .* sees 0 cuda devices"),
        ({"device": "mps"}, "mps was asked for"),
        ({"device": "gpu"}, "'gpu' is none; expected auto, cpu"),
        ({"device": "cuda:x"}, "'cuda:x' is none"),
        ({"device": "cpu", "threads": 0}, "threads is 0"),
        ({"device": "cpu", "batch": 0}, "batch is 0"),
        ({"device": "cpu", "precision": "floot32"}, "did you mean 'float32'"),
        ({"device": "cpu", "precision": "float16"}, "float16 needs a GPU"),
        ({"device": "cpu", "memory_format": "nchw"}, "memory_format is 'nchw'"),
        (
            {"device": "cpu", "backend": "onnx"},
            "backend is 'onnx'; expected auto, eager or openvino",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, shipped, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=message):
        load_segmenter(shipped, **settings)


def test_auto_takes_the_best_device_there_is(monkeypatch):
    monkeypatch.setattr(devices, "gpu_is_possible", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_type("auto") == "cuda"
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_type("auto") == "mps"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert device_type("auto") == "cpu"


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_formats_and_precisions_are_near_one_another(memory_format, precision, tolerance, shipped):
    windows = random_windows(1, 1, 48, 32)
    expected = load_segmenter(shipped, "cpu")(windows)
    other = load_segmenter(
        shipped, "cpu", memory_format=memory_format, precision=precision, backend=EAGER
    )
    assert np.abs(other(windows) - expected).max() < tolerance


def test_shipped_model_finds_bright_discs(shipped):
    y, x = np.mgrid[:128, :128]
    truth = np.zeros((128, 128), bool)
    for cy, cx in [(30, 30), (30, 90), (90, 60)]:
        truth |= (y - cy) ** 2 + (x - cx) ** 2 <= 11**2
    noise = np.random.default_rng(0).normal(0, 0.03, truth.shape)
    windows = (truth + noise).astype(np.float32)[None, None]
    foreground, interior = load_segmenter(shipped, "cpu")(windows)[0]
    found = foreground >= 0.5
    assert (found & truth).sum() / (found | truth).sum() > 0.8
    assert interior[30, 30] > 0.5 > interior[30, 41]
