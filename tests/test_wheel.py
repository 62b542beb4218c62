"""What is installed holds the models, and each says what it is."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from hatchling.build import build_wheel

from segpipe.models.modelfile import WEIGHTS, list_models, load_model, model_geometry, read_card

ROOT = Path(__file__).parents[1]
LARGEST = 8_000_000
"""Bytes of a model that ships."""
PAGE = (
    "index.html",
    "main.js",
    "vendor/zarr.js",
    "vendor/openseadragon.min.js",
    "vendor/LICENSES.txt",
)
SHIPPED = sorted(WEIGHTS.glob("*.safetensors"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder, before = tmp_path_factory.mktemp("wheel"), Path.cwd()
    os.chdir(ROOT)  # as build front ends do
    try:
        yield folder / build_wheel(str(folder))
    finally:
        os.chdir(before)


def test_the_wheel_holds_every_model_as_it_is_here(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {
            Path(name).name: archive.read(name)
            for name in archive.namelist()
            if name.startswith("segpipe/models/weights/")
        }
    assert found == {path.name: path.read_bytes() for path in SHIPPED}
    assert {"nuclei-fluorescence.safetensors", "nuclei-he.safetensors"} <= found.keys()


def test_the_wheel_holds_the_workflow_and_its_configs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for name in ("Snakefile", "configs/default.yaml", "workflows/rules/common.smk"):
        assert f"segpipe/_workflow/{name}" in names


def test_the_wheel_holds_the_whole_page_of_the_viewer(wheel):
    page = ROOT / "pipeline" / "segpipe" / "viewer" / "page"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for path in page.rglob("*.*"):
            name = f"segpipe/viewer/page/{path.relative_to(page).as_posix()}"
            assert archive.read(name) == path.read_bytes()
    assert {f"segpipe/viewer/page/{name}" for name in PAGE} <= names
    assert not [name for name in names if "vendoring" in name]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_model_that_ships_is_small_and_says_what_it_is(path):
    assert path.stat().st_size <= LARGEST
    _, card = load_model(path)
    assert card == read_card(path) and card.name == path.stem and path in list_models()
    assert card.licence and card.limits and len(card.training_data) > 20
    assert any(isinstance(figure, float) for figure in card.figures.values())
    assert model_geometry(card).exact
