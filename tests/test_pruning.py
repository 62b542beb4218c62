"""`segpipe models prune`: a smaller file that gives what its head gave, and a card that says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import segpipe
from segpipe.cli import main
from segpipe.model_text import count_parameters
from segpipe.models.card import Empty, parse_card
from segpipe.models.modelfile import load_model, model_geometry, read_card, write_model
from segpipe.models.network import build_network
from segpipe.models.tensors import storage_of

FIELDS = {
    "name": "plusplus",
    "architecture": {"name": "unetplusplus", "parameters": {"width": 4, "depth": 3}},
    "channels": ["nuclei"],
    "outputs": ["foreground", "interior"],
    "normalisation": {"kind": "percentile"},
    "figures": {"AP at IoU .50": 0.9, "measured on": "67 images"},
    "empty": {"level": 0.1, "contrast": 0.1, "foreground": 0.1},
    "licence": "CC0-1.0",
    "training_data": "none",
}


def model(folder, storage="float32", **parameters):
    fields = FIELDS | {
        "architecture": {
            "name": "unetplusplus",
            "parameters": {"width": 4, "depth": 3} | parameters,
        }
    }
    card = parse_card(fields, "test")
    torch.manual_seed(0)
    path = folder / "plusplus.safetensors"
    write_model(path, build_network(*card.network_arguments), card, storage)
    return path


def prune(*args):
    return CliRunner().invoke(main, ["models", "prune", *map(str, args)])


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_the_file_is_smaller_and_gives_what_that_head_gave(tmp_path, storage):
    source, parts = model(tmp_path, storage), []
    whole, _ = load_model(source)
    image = torch.rand(1, 1, 32, 48)
    for level in (1, 2, 3):
        path = tmp_path / f"L{level}.safetensors"
        result = prune(source, "--level", level, "-o", path)
        assert result.exit_code == 0
        assert f"{count_parameters(path):,} of {count_parameters(source):,}" in result.output
        network, card = load_model(path)
        with torch.no_grad():
            side = whole.forward_training(image).sides[level - 1]
            assert torch.allclose(network(image), side, atol=1e-6)
        assert storage_of(path) == storage
        assert model_geometry(card).stride == 2**level
        parts.append(path.stat().st_size)
    sizes = [*parts, source.stat().st_size]
    assert sizes == sorted(set(sizes))
    assert sizes[0] < sizes[-1] / 5


def test_the_card_says_that_figures_are_of_the_unpruned_model(tmp_path):
    source = model(tmp_path)
    assert read_card(source).empty == Empty(level=0.1, contrast=0.1, foreground=0.1)
    prune(source, "--level", 1, "-o", tmp_path / "L1.safetensors")
    card = read_card(tmp_path / "L1.safetensors")
    assert card.name == "plusplus-L1"
    assert card.architecture.parameters == {"width": 4, "depth": 1, "deep_supervision": False}
    assert card.empty is None
    assert card.figures["unpruned: AP at IoU .50"] == 0.9
    assert "AP at IoU .50" not in card.figures
    assert "level 1 of 3 of model plusplus" in card.figures["pruned"]
    assert "has not been scored" in card.figures["pruned"]
    labels = segpipe.segment(np.zeros((40, 40), np.uint8), str(tmp_path / "L1.safetensors"))
    assert labels.shape == (40, 40)


def test_what_cannot_be_pruned_is_one_line(tmp_path, rgb_model):
    out = tmp_path / "out.safetensors"
    source = model(tmp_path)
    prune(source, "--level", 2, "-o", tmp_path / "L2.safetensors")
    for path, level, told in (
        (rgb_model, 1, "architecture unet has one head only"),
        (source, 4, "level is 4; expected an integer from 1 to 3"),
        (tmp_path / "L2.safetensors", 1, "no head at level 1"),
        (tmp_path / "L2.safetensors", 2, "the network of level 2 already"),
        (tmp_path / "none.safetensors", 1, "no such model file"),
    ):
        result = prune(path, "--level", level, "-o", out)
        assert result.exit_code == 2
        assert told in result.output
        assert result.output.count("\n") == 1
    assert not out.exists()
