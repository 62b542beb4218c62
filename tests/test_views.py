"""Test-time augmentation: eight views and back, and that tiling still cannot be seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import segpipe
from segpipe.models.card import parse_card
from segpipe.models.modelfile import write_model
from segpipe.models.network import build_network
from segpipe.segmenter import load_segmenter
from segpipe.segmenter.views import VIEWS, turned_back, view
from segpipe.synthetic import NucleiField


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained network, which answers each view differently."""
    fields = {
        "name": "untrained",
        "architecture": {
            "name": "unet",
            "parameters": {"width": 4, "depth": 2, "padding": "same", "norm": "batch"},
        },
        "channels": ["nuclei"],
        "outputs": ["foreground", "interior"],
        "normalisation": {"kind": "percentile"},
        "licence": "CC0-1.0",
        "training_data": "none",
    }
    card = parse_card(fields, "fields")
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("models") / "untrained.safetensors"
    write_model(path, build_network(*card.network_arguments), card)
    return path


def test_the_views_are_eight_different_ones_and_turn_back():
    windows = np.random.default_rng(0).random((2, 1, 6, 9), np.float32)
    views = [view(windows, number) for number in range(VIEWS)]
    assert len({(one.shape, one.tobytes()) for one in views}) == 8
    for number, one in enumerate(views):
        assert np.array_equal(turned_back(one, number), windows)


@pytest.mark.parametrize("backend", ["eager", "openvino"])
def test_the_answer_is_the_mean_of_eight(model, backend):
    windows = np.random.default_rng(0).random((2, 1, 64, 96), np.float32)
    plain = load_segmenter(model, "cpu", backend=backend)
    expected = np.zeros((2, 2, 64, 96))
    for mirrored in (False, True):
        for turns in range(4):
            turned = windows[..., ::-1] if mirrored else windows
            turned = np.rot90(turned, turns, (2, 3))
            found = np.rot90(plain(np.ascontiguousarray(turned)), -turns, (2, 3))
            expected += found[..., ::-1] if mirrored else found
    result = load_segmenter(model, "cpu", backend=backend, tta=True)(windows)
    assert np.allclose(result, expected / 8, atol=1e-6)
    assert not np.allclose(result, plain(windows), atol=1e-3)


def test_a_turned_image_gives_the_turned_answer(model):
    """What one view alone does not: the mean is symmetric."""
    windows = np.random.default_rng(0).random((1, 1, 64, 64), np.float32)
    segmenter = load_segmenter(model, "cpu", backend="eager", tta=True)
    turned = np.ascontiguousarray(np.rot90(windows, 1, (2, 3)))
    assert np.allclose(segmenter(turned), np.rot90(segmenter(windows), 1, (2, 3)), atol=1e-6)


def test_tiles_do_not_show():
    """The same labels from one window over all as from many, with mirrored borders."""
    field = NucleiField((150, 230), seed=2, empty=0.0)
    pixels = field.pixels(field.box)
    chosen = ["infer.tta=true", "infer.backend=eager", "tile.chunk=32"]
    whole, tiled = (
        segpipe.segment(
            pixels,
            "nuclei-fluorescence",
            segpipe.load_settings(None, [*chosen, f"tile.core={core}"]),
        )
        for core in (512, 64)
    )
    assert whole.max() > 10
    assert np.array_equal(whole, tiled)
