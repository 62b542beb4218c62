"""What runs the network on a CPU: the rule that chooses it, and OpenVINO's bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fields import SIZES, labels_of, nuclei, run, threshold_model
from segpipe import backend, prepare
from segpipe.backend import EAGER, OPENVINO, choose_backend
from segpipe.errors import ModelError, SettingsError
from segpipe.inference import quantise
from segpipe.inputs import find_inputs
from segpipe.models.modelfile import find_model
from segpipe.models.network import NETWORKS, Network, build_twin
from segpipe.records import read_json
from segpipe.segmenter import load_segmenter
from segpipe.segmenter.core import Core
from segpipe.segmenter.openvino import OpenVino, import_quietly
from segpipe.segmenter.tracing import trace
from segpipe.settings import load_settings
from test_segmenter import random_windows, write_random_model


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def compiled(network: Network, halo: int = 0) -> OpenVino:
    graph = trace(network.eval(), halo=halo, batch=1)
    return OpenVino(graph, threads=1, precision="float32", classes=False)


# --- the rule -------------------------------------------------------------------------------------


def test_auto_is_openvino_on_a_cpu_and_eager_on_a_gpu():
    assert choose_backend("auto", on_gpu=False) == OPENVINO
    assert choose_backend("auto", on_gpu=True) == EAGER
    assert choose_backend(EAGER, on_gpu=False) == EAGER
    with pytest.raises(SettingsError, match="openvino is for the CPU"):
        choose_backend(OPENVINO, on_gpu=True)
    with pytest.raises(SettingsError, match=r"infer.backend openvino is for the CPU"):
        load_settings(None, ["infer.backend=openvino", "infer.device=cuda"])


def test_without_openvino_auto_says_that_it_is_eager(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert choose_backend("auto", on_gpu=False) == EAGER
    assert "OpenVINO is not installed" in caplog.text
    with pytest.raises(SettingsError, match="pip install openvino, or set infer"):
        choose_backend(OPENVINO, on_gpu=False)


def plan_of(image: Path, out: Path, *settings: str) -> str:
    found = find_inputs([image], out)
    told = load_settings(None, [*SIZES, *settings])
    return prepare.prepare(found, out, told).images[0].plan.backend


def test_the_plan_is_written_once_and_holds_where_openvino_is_missing(tmp_path, monkeypatch):
    image, out, other = nuclei(tmp_path / "a.tif", (70, 90)), tmp_path / "out", tmp_path / "other"
    assert plan_of(image, out) == OPENVINO
    assert read_json(out / "manifests" / "plan.json")["backend"] == OPENVINO
    assert plan_of(image, out, "infer.backend=eager") == EAGER
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert plan_of(image, other) == EAGER
    (failed,) = run(image, out, "infer.threads=3").failed  # no segmenter of an earlier test
    assert "to run by OpenVINO, which is not installed" in str(failed.error)
    monkeypatch.undo()
    assert plan_of(image, other) == EAGER  # and with OpenVINO: the same bytes as before
    assert plan_of(image, out) == OPENVINO


def test_a_gpu_goes_on_with_what_a_cpu_began_but_not_against_a_wish(tmp_path, monkeypatch):
    image, out = nuclei(tmp_path / "a.tif", (70, 90)), tmp_path / "out"
    assert run(image, out, stages=("tile",)).exit_code == 0
    asked = []

    def load(path: Path, device: str, **plan: object) -> object:
        asked.append((device, plan["backend"]))
        return load_segmenter(path, "cpu", **plan | {"threads": 4})

    monkeypatch.setattr("segpipe.stages.infer.device_type", lambda _: "mps")
    monkeypatch.setattr("segpipe.stages.infer.load_segmenter", load)
    assert run(image, out, "infer.threads=4", stages=("infer",)).exit_code == 0
    wished = "infer.threads=5", "infer.backend=openvino"
    assert run(image, out, *wished, stages=("infer",)).exit_code == 0
    assert asked == [("mps", EAGER), ("mps", OPENVINO)]


def test_both_give_the_objects_of_one_another_and_say_who_made_them(tmp_path):
    image = nuclei(tmp_path / "a.tif", (150, 170))
    labels, made_by = [], []
    for name in (EAGER, OPENVINO):
        out = tmp_path / name
        assert run(image, out, f"infer.backend={name}").exit_code == 0
        labels.append(labels_of(out, "a"))
        facts = read_json(out / "manifests" / "a.infer.json")["facts"]
        made_by.append(*facts["made_by"])
        assert facts["plan"]["backend"] == name
    assert made_by[0].startswith("torch ") and made_by[1].startswith("openvino ")
    assert labels[0].max() > 10
    assert np.mean(labels[0] != labels[1]) < 1e-3


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "channels", "shape"),
    [
        (None, 1, (160, 144)),
        (None, 1, (16, 16)),
        ({"width": 8, "depth": 3, "padding": "same", "norm": "batch"}, 3, (136, 160)),
        ({"width": 5, "depth": 2, "padding": "same"}, 2, (132, 140)),
        ({"width": 16, "depth": 2, "padding": "valid"}, 1, (148, 156)),
    ],
)
def test_bytes_depend_on_no_batch_slot_mate_thread_or_window_before(
    parameters, channels, shape, tmp_path
):
    path = find_model("nuclei-fluorescence")
    if parameters is not None:
        names = [f"channel{index}" for index in range(channels)]
        path = write_random_model(tmp_path / "m.safetensors", parameters, channels=names)
    windows = random_windows(3, channels, *shape)
    eager = load_segmenter(path, "cpu", backend=EAGER)(windows)
    found = set()
    for batch, threads in ((1, 1), (1, 2), (2, 1), (3, 2)):
        segmenter = load_segmenter(path, "cpu", threads=threads, batch=batch)  # compiled again
        for position in range(batch):  # other slots, and other mates; one has zeros beside it
            order = np.roll(np.arange(3), position)
            result = segmenter(windows[order])[np.argsort(order)]
            found.add(result.tobytes())
        grown = np.pad(windows, ((0, 0), (0, 0), (0, shape[0]), (0, shape[1])), mode="reflect")
        segmenter(grown[..., : shape[0] + 16 * 4, : shape[1] + 16 * 2])
        found.add(segmenter(windows).tobytes())
    assert len(found) == 1
    assert len(np.unique(quantise(result))) > 20
    assert np.abs(result - eager).max() < 1e-5
    assert np.abs(quantise(result).astype(int) - quantise(eager)).max() <= 1


IN_A_PROCESS = """
import hashlib, os, sys
import numpy as np
from pathlib import Path
from segpipe.segmenter import load_segmenter

windows = np.random.default_rng(0).random((2, 1, 96, 112), np.float32)
segmenter = load_segmenter(Path(sys.argv[1]), "cpu", threads=int(sys.argv[2]), batch=2)
result = segmenter(windows)
tasks = [int(name) for name in os.listdir("/proc/self/task")]
cores = {frozenset(os.sched_getaffinity(task)) for task in tasks}
assert cores == {frozenset(os.sched_getaffinity(0))}, cores
assert sys.modules["openvino_telemetry"] is None
print(hashlib.sha256(result.tobytes()).hexdigest(), len(tasks))
"""


def test_other_processes_give_the_same_bytes_on_any_core_and_report_to_nobody(tmp_path):
    """No thread is pinned: with pinning, all processes of a machine would share its first cores."""
    model = find_model("nuclei-fluorescence")
    windows = random_windows(2, 1, 96, 112)
    expected = load_segmenter(model, "cpu", batch=1)(windows)
    home = tmp_path / "home"
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if key != "CI"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", IN_A_PROCESS, str(model), threads],
            env=kept | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for threads in ("1", "2")
    ]
    told = [process.communicate(timeout=300)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert {digest for digest, _ in told} == {hashlib.sha256(expected.tobytes()).hexdigest()}
    assert list(home.iterdir()) == []


def test_threads_of_one_process_may_share_a_segmenter():
    segmenter = load_segmenter(threshold_model(), "cpu")
    windows = random_windows(8, 1, 256, 256)
    expected = [segmenter(one[None]) for one in windows]
    found: dict[int, np.ndarray] = {}

    def call(index: int) -> None:
        found[index] = segmenter(windows[index][None])

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(windows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, one in enumerate(expected):
        assert np.array_equal(found[index], one)


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_architecture_can_be_compiled(name):
    """To the rounding that float32 has: 60 layers have more of it than 20."""
    torch.manual_seed(0)
    network = build_twin(name, {}, 2, 3).eval()
    size = next(size for size in range(200, 400) if network.admissible(size))
    windows = random_windows(1, 2, size, size)
    found = compiled(network, network.margin)(windows)
    with torch.no_grad():
        single = torch.sigmoid(network(torch.from_numpy(windows))).numpy()
        exact = torch.sigmoid(network.double()(torch.from_numpy(windows).double())).numpy()
    assert np.ptp(exact) > 1e-3
    rounding = np.abs(single - exact).max()
    assert rounding < 1e-3
    assert np.abs(found - exact).max() < max(1e-5, 4 * rounding)


class Local(Network):
    """A network of one convolution, for what may go wrong."""

    channels, stride, margin, exact = 1, 1, 0, True

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def admissible(self, size: int) -> bool:
        return size > 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.conv(image)


class ShapeAsConstant(Local):
    """What a trace keeps of this is the shape that it was traced at."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.conv(image) + float(np.prod(image.shape))


class NoOperation(Local):
    """There is no such operation in OpenVINO."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.conv(image) * torch.linalg.svdvals(image[:, :, :1, :1])[..., None]


class Failing(Local):
    """It does not even run."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        raise TypeError("a bug of the network's")


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (ShapeAsConstant, "its numbers are .* away from those of torch"),
        (NoOperation, "svdvals|None constant"),
        (Failing, "a bug of the network's"),
    ],
)
def test_a_network_that_cannot_be_compiled_is_refused(network, message):
    with pytest.raises(ModelError, match=rf"(?s)cannot run this network \(.*{message}.*eager"):
        compiled(network())


def test_half_precision_is_near_or_refused():
    """On a CPU without it OpenVINO would go on in float32, and say nothing."""
    shipped, windows = find_model("nuclei-fluorescence"), random_windows(2, 1, 64, 48) * 4
    capabilities = import_quietly().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in capabilities:
        with pytest.raises(SettingsError, match="bfloat16, which this CPU does not have"):
            load_segmenter(shipped, "cpu", precision="bfloat16")
        return
    exact = load_segmenter(shipped, "cpu")(windows)
    half = load_segmenter(shipped, "cpu", precision="bfloat16")(windows)
    assert 1e-4 < np.abs(half - exact).max() < 0.1


def test_the_core_of_a_network_without_a_way_of_its_own():
    network = Local()
    windows = torch.from_numpy(random_windows(1, 1, 9, 8))
    with torch.no_grad():
        expected = network(windows)[:, :, 3:-3, 3:-3]
        assert torch.equal(Core(network, 3)(windows), expected)
    found = compiled(network, 3)(windows.numpy())
    assert np.abs(found - torch.sigmoid(expected).numpy()).max() < 1e-6


def test_a_signal_after_another_thread_let_go_of_the_network_is_handled():
    """OpenVINO's plugin unmapped the signal stack of the thread that compiled: a segmentation fault."""
    program = """
import gc, os, signal, threading
import numpy as np
from segpipe.models.modelfile import find_model
from segpipe.segmenter import load_segmenter

seen = []
signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
held = [load_segmenter(find_model("nuclei-fluorescence"), "cpu", threads=1)]
held[0](np.zeros((1, 1, 256, 256), np.float32))
other = threading.Thread(target=lambda: (held.clear(), gc.collect()))
other.start()
other.join()
os.kill(os.getpid(), signal.SIGINT)
assert seen == [signal.SIGINT]
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
