"""What several tests need."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch
from hypothesis import settings

from segpipe.models.card import parse_card
from segpipe.models.modelfile import write_model
from segpipe.models.network import build_network

settings.register_profile("segpipe", deadline=None)
settings.load_profile("segpipe")


CACHE = tempfile.TemporaryDirectory(prefix="segpipe-tests-")
"""Of this run alone, also of the processes that tests start; removed at exit."""
os.environ["SEGPIPE_CACHE"] = CACHE.name


def pytest_addoption(parser):
    parser.addoption(
        "--every-interruption",
        action="store_true",
        help="test_workflow.py: every driver, signal and stage, not only some of them (minutes)",
    )


@pytest.fixture(scope="session")
def rgb_model(tmp_path_factory):
    """A model file of three channels, untrained."""
    fields = {
        "name": "untrained-rgb",
        "architecture": {
            "name": "unet",
            "parameters": {"width": 4, "depth": 2, "padding": "same", "norm": "batch"},
        },
        "channels": ["red", "green", "blue"],
        "outputs": ["foreground", "interior"],
        "normalisation": {"kind": "fixed", "low": 0, "high": 255},
        "licence": "CC0-1.0",
        "training_data": "none",
    }
    card = parse_card(fields, "fields")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "untrained-rgb.safetensors"
    write_model(path, build_network(*card.network_arguments), card)
    return path
