"""What is kept between runs: found again, not believed when damaged, and it spares torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fields import SIZES, labels_of, nuclei
from segpipe import user_cache
from segpipe.errors import ModelError
from segpipe.models import modelfile
from segpipe.models.modelfile import find_model, model_geometry, model_hash, read_card
from segpipe.segmenter import devices, load_segmenter
from segpipe.segmenter.graph import Graph
from segpipe.segmenter.openvino import load_openvino
from segpipe.user_cache import FOLDER_VARIABLE, code_digest, keep, read_kept
from test_segmenter import random_windows


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


# --- the folder -----------------------------------------------------------------------------------


def test_what_was_kept_is_read_and_what_was_not_is_none(cache):
    assert read_kept("a") is None
    keep("a", b"first")
    keep("a", b"second")
    assert read_kept("a") == b"second"
    assert [path.name for path in cache.iterdir()] == ["a"]
    assert cache.stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_is_as_none(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    keep("a", b"first")
    assert read_kept("a") is None
    assert (tmp_path / "file").read_bytes() == b""


def test_by_default_it_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    keep("a", b"first")
    (found,) = tmp_path.rglob("a")
    assert found.parent.name == "segpipe"


def test_files_that_were_not_used_for_longest_go(cache, monkeypatch):
    monkeypatch.setattr(user_cache, "MOST_BYTES", 25)
    for age, name in enumerate("abc"):
        keep(name, bytes(8))
        os.utime(cache / name, (1000 - age, 1000 - age))
    assert read_kept("c") is not None  # now the last used
    keep("d", bytes(8))
    assert sorted(path.name for path in cache.iterdir()) == ["a", "c", "d"]
    keep("large", bytes(26))
    assert read_kept("large") is None and read_kept("d") is not None


def test_a_digest_changes_with_code_and_libraries(monkeypatch, tmp_path):
    plain = code_digest()
    assert code_digest("torch") != plain
    package = tmp_path / "segpipe"
    for folder in ("models", "segmenter"):
        shutil.copytree(Path(user_cache.__file__).parent / folder, package / folder)
    monkeypatch.setattr(user_cache, "__file__", str(package / "user_cache.py"))
    code_digest.cache_clear()
    assert code_digest() == plain
    with (package / "models" / "unet.py").open("a") as file:
        file.write("\n")
    code_digest.cache_clear()
    assert code_digest() != plain
    code_digest.cache_clear()


# --- what is kept ---------------------------------------------------------------------------------


def test_a_graph_that_was_kept_gives_the_same_bytes(cache):
    made = load()
    (kept,) = cache.glob("graph-*.npz")
    before = kept.stat()
    assert load().tobytes() == made.tobytes()
    assert kept.stat().st_ino == before.st_ino  # read, and not written again
    assert model_hash(find_model("nuclei-fluorescence")) in kept.name


@pytest.mark.parametrize("damage", ["short", "no zip", "of another network"])
def test_a_damaged_graph_is_made_again(cache, damage):
    made = load()
    (kept,) = cache.glob("graph-*.npz")
    good = kept.read_bytes()
    if damage == "short":
        kept.write_bytes(good[: len(good) // 2])
    elif damage == "no zip":
        kept.write_bytes(b"x")
    else:  # what it does is not what it says
        graph = Graph.from_bytes(good)
        wrong = Graph(graph.structure, graph.weights, graph.windows, graph.logits + 1)
        kept.write_bytes(wrong.to_bytes())
    assert load().tobytes() == made.tobytes()
    again = Graph.from_bytes(kept.read_bytes())
    assert np.array_equal(again.logits, Graph.from_bytes(good).logits)


def test_a_network_that_cannot_be_compiled_is_not_kept(cache, monkeypatch):
    def refuse(self: Graph, compiled: object) -> None:
        raise ValueError("its numbers are far away")

    monkeypatch.setattr(Graph, "compare", refuse)
    with pytest.raises(ModelError, match="far away"):
        load_openvino(
            find_model("nuclei-fluorescence"),
            halo=96,
            batch=1,
            classes=False,
            threads=1,
            precision="float32",
        )
    assert list(cache.glob("graph-*")) == []


def test_each_batch_and_core_has_a_graph_of_its_own(cache):
    one = load()
    two = load(batch=2)
    load_segmenter(find_model("nuclei-fluorescence"), "cpu")
    assert len(list(cache.glob("graph-*.npz"))) == 3
    assert one.tobytes() == two.tobytes()


def test_a_geometry_is_kept_and_a_damaged_one_measured_again(cache):
    card = read_card(find_model("nuclei-fluorescence"))
    measured = model_geometry(card)
    (kept,) = cache.glob("geometry-*.json")
    for content in (kept.read_bytes(), b"{", b"[]", json.dumps({"halo": 3}).encode()):
        kept.write_bytes(content)
        modelfile._geometry.cache_clear()
        assert model_geometry(card) == measured
        assert json.loads(kept.read_bytes()) == vars(measured)


# --- without torch --------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "darwin", reason="torch must say whether there is a GPU")
def test_what_was_kept_spares_a_job_torch(tmp_path, cache):
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
        command += ["--engine", "local", "--workers", "2"]
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
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(devices, "build_of", lambda path: set())
    assert devices.gpu_is_possible.__wrapped__()
