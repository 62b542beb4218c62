"""What is kept between runs: found again, not believed when damaged, and it spares torch."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fields import SIZES, labels_of, nuclei, run
from segpipe import backend, footprint, user_cache
from segpipe import run as running
from segpipe.errors import ModelError, SettingsError, Stopped
from segpipe.footprint import worker_bytes
from segpipe.inputs import find_inputs
from segpipe.models import modelfile
from segpipe.models.geometry import ModelGeometry
from segpipe.models.modelfile import find_model, model_geometry, model_hash, read_card
from segpipe.prepare import prepare
from segpipe.segmenter import devices, load_segmenter, tracing
from segpipe.segmenter.graph import Graph
from segpipe.segmenter.openvino import instructions, keep_graph
from segpipe.segmenter.tracing import trace
from segpipe.settings import load_settings
from segpipe.stages.image import Image
from segpipe.stages.infer import _segmenter, segmenter_of, translate_networks
from segpipe.user_cache import FOLDER_VARIABLE, code_digest, keep, read_kept
from test_segmenter import random_windows, write_random_model


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty one."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    modelfile._geometry.cache_clear()
    yield folder
    modelfile._geometry.cache_clear()


def load(**options: object) -> np.ndarray:
    segmenter = load_segmenter(find_model("nuclei-fluorescence"), "cpu", core_only=True, **options)
    return segmenter(random_windows(1, 1, 224, 256))


@pytest.fixture
def tracings(monkeypatch) -> list[int]:
    """One entry, the halo, for each time that torch traced a network."""
    seen = []

    def counted(network, *, halo, batch):
        seen.append(halo)
        return trace(network, halo=halo, batch=batch)

    monkeypatch.setattr(tracing, "trace", counted)
    return seen


# --- the folder -----------------------------------------------------------------------------------


def test_what_was_kept_is_read_and_what_was_not_is_none(cache):
    assert read_kept("a") is None
    keep("a", b"first")
    keep("a", b"second")
    assert bytes(read_kept("a")) == b"second"
    assert [path.name for path in (cache / "segpipe").iterdir()] == ["a.kept"]
    assert (cache / "segpipe").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("place", [0, 20, -1])
def test_a_byte_that_changed_makes_it_none_and_is_told(cache, caplog, place):
    keep("a", bytes(100))
    path = cache / "segpipe" / "a.kept"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert read_kept("a") is None
    assert "a.kept is damaged, and is made again" in caplog.text
    path.write_bytes(b"")
    assert read_kept("a") is None


@pytest.mark.parametrize("folder", ["relative", "file"])
def test_a_folder_that_cannot_be_is_as_none(tmp_path, monkeypatch, caplog, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv(
        FOLDER_VARIABLE, {"relative": "kept", "file": str(tmp_path / "file")}[folder]
    )
    user_cache._warn_once.cache_clear()
    assert not keep("a", b"first")
    assert read_kept("a") is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert ("no absolute path" in caplog.text) == (folder == "relative")


def test_a_full_disk_keeps_nothing_and_says_so(cache, tmp_path, monkeypatch, caplog):
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(user_cache, "write_whole", full)
    assert not keep("a", b"first")
    (image,) = images(tmp_path, tmp_path / "out")
    footprint._network_bytes.cache_clear()
    monkeypatch.setattr(footprint, "gpu_is_possible", lambda: False)
    translate_networks([image])
    assert "cannot be kept translated, so each process translates it" in caplog.text
    without = worker_bytes(image)
    monkeypatch.undo()
    monkeypatch.setenv(FOLDER_VARIABLE, str(cache))
    monkeypatch.setattr(footprint, "gpu_is_possible", lambda: False)
    translate_networks([image])
    assert worker_bytes(image) == without - footprint.TORCH_BYTES


def test_processes_that_keep_the_same_at_once_leave_it_whole(cache):
    program = (
        "from segpipe.user_cache import keep\n"
        "for _ in range(50):\n    assert keep('a', bytes(10**6))\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(3)]
    seen = set()
    while any(one.poll() is None for one in running):
        kept = read_kept("a")
        seen.add(None if kept is None else len(kept))
    assert [one.returncode for one in running] == [0, 0, 0]
    assert 10**6 in seen and seen <= {None, 10**6}
    assert [path.name for path in (cache / "segpipe").iterdir()] == ["a.kept"]


def test_by_default_it_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert keep("a", b"first")
    (found,) = tmp_path.rglob("a.kept")
    assert found.parent.name == "segpipe"


def test_files_that_were_not_used_for_longest_go_and_no_others(cache, monkeypatch):
    monkeypatch.setattr(user_cache, "MOST_BYTES", 150)
    folder = cache / "segpipe"
    folder.mkdir(parents=True)
    (cache / "slide.tif").write_bytes(bytes(1000))
    (folder / "slide.tif").write_bytes(bytes(1000))
    (folder / "more").mkdir()
    for age, name in enumerate("abc"):
        keep(name, bytes(8))  # 40 with the checksum
        os.utime(folder / f"{name}.kept", (1000 - age, 1000 - age))
    assert read_kept("c") is not None  # now the last used
    abandoned, under_way = (folder / f".b.kept.{age}.partial" for age in ("old", "new"))
    abandoned.write_bytes(b"")
    os.utime(abandoned, (1000, 1000))
    under_way.write_bytes(b"")
    keep("d", bytes(8))
    assert sorted(path.name for path in folder.iterdir()) == [
        under_way.name,
        "a.kept",
        "c.kept",
        "d.kept",
        "more",
        "slide.tif",
    ]
    assert (cache / "slide.tif").exists()
    keep("large", bytes(151))
    assert read_kept("large") is None and read_kept("d") is not None


def test_a_digest_changes_with_code_and_libraries(monkeypatch, tmp_path):
    plain = code_digest()
    assert code_digest("torch") != plain
    package = tmp_path / "segpipe"
    shutil.copytree(Path(user_cache.__file__).parent, package)
    monkeypatch.setattr(user_cache, "__file__", str(package / "user_cache.py"))
    code_digest.cache_clear()
    assert code_digest() == plain
    for changed in ("models/unet.py", "segmenter/tracing.py", "geometry.py"):
        with (package / changed).open("a") as file:
            file.write("\n")
        code_digest.cache_clear()
        assert code_digest() != plain
        plain = code_digest()
    monkeypatch.setattr(user_cache, "__version__", "0.0.0")
    code_digest.cache_clear()
    assert code_digest() != plain
    code_digest.cache_clear()


def test_a_library_under_another_name_is_told_without_importing_it():
    """Importing openvino reports to its maker, unless it is done quietly."""
    program = """
import importlib.metadata as metadata, sys
known = metadata.version
def version(name):
    if name in ("openvino", "torch"):
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.version = version
from segpipe.user_cache import code_digest
print(code_digest("openvino") != code_digest(), code_digest("openvino") != code_digest("torch"))
print("openvino" in sys.modules, "torch" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.split() == ["True", "True", "False", "False"], ran.stderr


# --- what is kept ---------------------------------------------------------------------------------


def test_a_graph_that_was_kept_gives_the_same_bytes(cache, tracings):
    made = load()
    assert load().tobytes() == made.tobytes()
    assert tracings == [96]
    (kept,) = cache.rglob("graph-*")
    assert model_hash(find_model("nuclei-fluorescence")) in kept.name
    assert code_digest("torch", "openvino") in kept.name
    graph = Graph.from_bytes(read_kept(kept.stem))
    assert Graph.from_bytes(graph.to_bytes()).to_bytes() == graph.to_bytes()
    assert graph.logits.shape == (1, 2, 16, 32)


def test_a_graph_that_is_not_the_network_is_made_again(cache, tracings):
    """The weights of another: whole, but not what torch makes of the example."""
    made = load()
    (kept,) = cache.rglob("graph-*")
    good = Graph.from_bytes(read_kept(kept.stem))
    weights = good.weights.copy()
    weights.view(np.float32)[:] *= 1.5
    keep(kept.stem, Graph(good.structure, weights, good.windows, good.logits).to_bytes())
    assert load().tobytes() == made.tobytes()
    assert tracings == [96, 96]
    again = Graph.from_bytes(read_kept(kept.stem))
    assert np.array_equal(again.logits, good.logits)
    assert again.weights.tobytes() == good.weights.tobytes()


def test_a_model_that_is_replaced_while_it_is_read_keeps_no_graph(cache, tmp_path, monkeypatch):
    path, other = tmp_path / "m.safetensors", tmp_path / "other.safetensors"
    parameters = {"width": 4, "depth": 2, "padding": "same"}
    write_random_model(path, parameters)
    write_random_model(other, parameters, training_data="another")

    def replaced(network, *, halo, batch):
        shutil.copy(other, path)
        return trace(network, halo=halo, batch=batch)

    monkeypatch.setattr(tracing, "trace", replaced)
    load_segmenter(path, "cpu")
    assert list(cache.rglob("graph-*")) == []


def test_a_network_that_cannot_be_compiled_is_not_kept(cache, monkeypatch):
    def refuse(self: Graph, compiled: object) -> None:
        raise ValueError("its numbers are far away")

    monkeypatch.setattr(Graph, "compare", refuse)
    with pytest.raises(ModelError, match="far away"):
        keep_graph(find_model("nuclei-fluorescence"), halo=96, batch=1)
    assert list(cache.rglob("graph-*")) == []


def test_temporary_files_that_cannot_be_written_are_told(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(SettingsError, match=r"temporary files .*TMPDIR"):
        load()


def test_each_batch_and_core_has_a_graph_of_its_own(cache):
    one = load()
    two = load(batch=2)
    load_segmenter(find_model("nuclei-fluorescence"), "cpu")
    assert len(list(cache.rglob("graph-*"))) == 3
    assert one.tobytes() == two.tobytes()


def test_where_nothing_can_be_kept_all_is_as_before(cache, tmp_path, monkeypatch):
    made = load()
    monkeypatch.setenv(FOLDER_VARIABLE, "/proc/none")
    modelfile._geometry.cache_clear()
    assert load().tobytes() == made.tobytes()
    assert not keep_graph(find_model("nuclei-fluorescence"), halo=96, batch=1)


def test_a_geometry_is_kept_and_must_be_one(cache, monkeypatch):
    card = read_card(find_model("nuclei-fluorescence"))
    measured = model_geometry(card)
    (kept,) = cache.rglob("geometry-*")
    assert code_digest() in kept.name
    monkeypatch.setattr("segpipe.models.context.measure_geometry", None)
    modelfile._geometry.cache_clear()
    assert model_geometry(card) == measured
    for wrong in ({"halo": 93}, {"context": None}, {"context": "94"}, {"stride": 0}, {"exact": 1}):
        with pytest.raises((ValueError, TypeError)):
            ModelGeometry(**vars(measured) | wrong)


def images(folder: Path, out: Path, *settings: str) -> list[Image]:
    found = find_inputs([nuclei(folder / "a.tif", (70, 90))], out)
    return prepare(found, out, load_settings(None, [*SIZES, *settings])).images


def test_networks_are_translated_once_for_the_workers_that_ask(cache, tmp_path, tracings, caplog):
    caplog.set_level("INFO")
    (image,) = images(tmp_path, tmp_path / "out")
    translate_networks([image, image])
    assert tracings == [image.model.halo]
    assert caplog.text.count("translating the network of ") == 1
    _segmenter.cache_clear()
    segmenter_of(image)  # what a worker does
    translate_networks([image])
    assert len(tracings) == 1
    translate_networks(images(tmp_path, tmp_path / "eager", "infer.backend=eager"))
    assert len(tracings) == 1


def test_what_is_wrong_with_one_network_is_told_by_whoever_infers(cache, tmp_path, monkeypatch):
    """It keeps no other from being translated, and ends no run before it began."""
    (image,) = images(tmp_path, tmp_path / "out")
    (bad,) = images(tmp_path, tmp_path / "bad", "infer.batch=2")
    asked = []

    def refuse(path: Path, *, halo: int, batch: int, **options: object) -> None:
        asked.append(batch)
        raise ModelError("it cannot be")

    monkeypatch.setattr("segpipe.segmenter.openvino.load_openvino", refuse)
    translate_networks([image, bad])
    assert asked == [1, 2]
    monkeypatch.setattr(backend, "_installed", lambda: False)
    translate_networks([image, bad])
    assert asked == [1, 2]


def test_a_job_translates_before_it_starts_workers_and_stops_when_asked(
    cache, tmp_path, monkeypatch
):
    image, out = nuclei(tmp_path / "a.tif", (70, 90)), tmp_path / "out"
    happened = []
    opened = running.open_engine

    def engine(*args: object) -> object:
        happened.append("engine")
        return opened(*args)

    def translate(asked: list[Image]) -> None:
        happened.append([one.name for one in asked])

    monkeypatch.setattr(running, "open_engine", engine)
    monkeypatch.setattr("segpipe.stages.infer.translate_networks", translate)
    assert run(image, out, stages=("tile",)).exit_code == 0
    assert happened == ["engine"]  # nothing to infer
    assert run(image, out).exit_code == 0
    assert happened == ["engine", ["a"], "engine"]

    def interrupted(asked: list[Image]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("segpipe.stages.infer.translate_networks", interrupted)
    with pytest.raises(Stopped):
        run(image, tmp_path / "other")
    assert len(happened) == 3


# --- without torch --------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "darwin", reason="torch must say whether there is a GPU")
@pytest.mark.parametrize("engine", [("local", "--workers", "2"), ("serial",)])
def test_what_was_kept_spares_a_job_torch(engine, tmp_path, cache):
    """In the client and in its workers; the labels are those of the first run."""
    image = nuclei(tmp_path / "a.tif", (150, 170))
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "torch.py").write_text("raise AssertionError('torch is imported')")
    # its build is told by a file beside it
    (hook / "version.py").write_text("cuda = None\nhip = None\n")
    labels = []
    for name, path in (("first", ""), ("second", str(hook))):
        out = tmp_path / name
        command = [sys.executable, "-m", "segpipe.cli", "predict", str(image), "-o", str(out)]
        command += ["--engine", *engine]
        command += [part for setting in SIZES for part in ("-s", setting)]
        environment = os.environ | {"PYTHONPATH": path} if path else os.environ
        ran = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert ran.returncode == 0, ran.stderr
        labels.append(labels_of(out, "a"))
    assert labels[0].max() > 10
    assert np.array_equal(*labels)


def test_whether_a_gpu_is_possible_is_told_without_torch(tmp_path, monkeypatch):
    version = tmp_path / "version.py"
    lines = "cuda: Optional[str] = {}\nhip: Optional[str] = {}\n"
    for cuda, hip, expected in (
        ("None", "None", set()),
        ("'12.8'", "None", {"cuda"}),
        ("None", "'6.3'", {"hip"}),
    ):
        version.write_text(lines.format(cuda, hip))
        assert devices.build_of(version) == expected
    version.write_text("cuda = None\nhip = None\n")
    assert devices.build_of(version) == set()
    assert devices.build_of(tmp_path / "none.py") == {"cuda", "hip"}
    assert devices.build_of(Path(torch.__file__).with_name("version.py")) == {
        kind for kind in ("cuda", "hip") if getattr(torch.version, kind)
    }
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices, "NVIDIA_FILES", ())
    for built, driver, expected in (
        (set(), "libc.so.6", False),
        ({"cuda"}, "libnothing.so.9", False),
        ({"cuda"}, "libc.so.6", True),
        ({"hip"}, "libnothing.so.9", True),
    ):
        monkeypatch.setattr(devices, "build_of", lambda path, built=built: built)
        monkeypatch.setattr(devices, "NVIDIA_DRIVER", driver)
        monkeypatch.setattr(sys, "platform", "linux")
        assert devices.gpu_is_possible.__wrapped__() is expected
    monkeypatch.setattr(devices, "build_of", lambda path: {"cuda"})
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", "libc.so.6")
    for hidden, expected in (("", False), ("-1", False), ("0", True)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert devices.gpu_is_possible.__wrapped__() is expected
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(devices, "NVIDIA_DRIVER", "libnothing.so.9")
    monkeypatch.setattr(devices, "NVIDIA_FILES", (str(version),))
    assert devices.gpu_is_possible.__wrapped__()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(devices, "build_of", lambda path: set())
    assert devices.gpu_is_possible.__wrapped__()


def test_how_many_processes_there_may_be_is_found_without_torch(cache, tmp_path):
    """Where memory is short it takes what the network holds; that is kept too."""
    (image,) = images(tmp_path, tmp_path / "out")
    footprint._network_bytes.cache_clear()
    asked = worker_bytes(image)
    (kept,) = cache.rglob("memory-*")
    height, width = image.tiles.window_shape
    for part in (
        image.model.hash,
        f"{height}x{width}",
        f"-{image.model.halo}-1-",
        code_digest("torch"),
    ):
        assert part in kept.name
    footprint._network_bytes.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "segpipe.models.cost", None)
        assert worker_bytes(image) == asked


def test_instructions_are_named_as_torch_names_them():
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("torch has more names elsewhere")
    assert instructions() == torch.backends.cpu.get_cpu_capability()
