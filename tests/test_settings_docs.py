"""The schema says of a YAML what the settings say of it, and what is written is up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from segpipe.errors import SettingsError
from segpipe.settings import (
    KNOWN_KEYS,
    PROJECT_KEYS,
    Project,
    Settings,
    load_project,
    parse_project,
)
from segpipe.settings_docs import (
    WRITTEN,
    default_yaml,
    described,
    settings_markdown,
    settings_schema,
    write_settings_docs,
)

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def accepted(content: Any) -> bool:
    """Whether the schema takes the content of a YAML."""
    return jsonschema.Draft7Validator(settings_schema()).is_valid(content)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_files_of_the_repository_are_what_make_docs_writes(name):
    assert (ROOT / name).read_text(encoding="utf-8") == WRITTEN[name](), "run `make docs`"


def test_make_docs_writes_them(tmp_path):
    for folder in ("configs", "docs"):
        (tmp_path / folder).mkdir()
    write_settings_docs(tmp_path)
    written = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert written == sorted(tmp_path / name for name in WRITTEN)


def test_every_key_stands_once_in_the_yaml_the_schema_and_the_page():
    loaded = yaml.safe_load(default_yaml())
    keys = [
        f"{section}.{key}"
        for section, inner in loaded.items()
        for key in (inner if section in Settings.model_fields else [])
    ]
    assert sorted(keys) == sorted(KNOWN_KEYS)
    assert set(loaded) == {*PROJECT_KEYS, *Settings.model_fields}
    assert parse_project(loaded) == Project()
    named = [f"{section}.{key}".lstrip(".") for section, key, _ in described()]
    assert named == [*PROJECT_KEYS, *KNOWN_KEYS]
    page = settings_markdown()
    assert page.count("\n| `") == len(named)
    assert all(len(schema["description"]) > 10 for _, _, schema in described())


def test_the_schema_is_one_and_its_defaults_fit_it():
    schema = settings_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    assert accepted(yaml.safe_load(default_yaml()))
    whole = [part for part in str(schema).split("'") if part in ("prefixItems", "$ref", "$defs")]
    assert not whole, "the draft does not know these, or editors read them differently"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_configs_name_the_schema_and_fit_it(path):
    first, _, rest = path.read_text().partition("\n")
    assert first == "# yaml-language-server: $schema=schema.json"
    assert "yaml-language-server" not in rest and (path.parent / "schema.json").is_file()
    assert accepted(yaml.safe_load(path.read_text()))
    load_project(path)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"tile": None},
        {"tile": {}},
        {"input": "~/slides", "output": "out", "model": None, "batch": 3},
        {"input": ["a", "b"]},
        {"tile": {"channel": "DAPI"}},
        {"tile": {"channel": 2}},
        {"tile": {"channel": ["DAPI", 2]}},
        {"tile": {"channel": None}},
        {"tile": {"z": "max", "t": "each", "scene": 3, "pages": "t"}},
        {"tile": {"z": [3, 10], "t": 0, "scene": [0]}},
        {"infer": {"normalise": [0, 255.5], "device": "cuda", "skip_empty": False}},
        {"stitch": {"interior": [0.7, 0.5], "foreground": 0.4, "max_hole": 0}},
        {"stitch": {"interior": 0.5}},
        {"engine": {"kind": "serial", "workers": 4}},
        # and what is wrong
        [1],
        {"inptu": "a"},
        {"input": 7},
        {"input": ["a", 7]},
        {"output": ["a"]},
        {"model": 3},
        {"batch": 0},
        {"batch": None},
        {"tile": 3},
        {"tile": [1]},
        {"tile": {"regoin": 1024}},
        {"tile": {"core": "big"}},
        {"tile": {"core": 8}},
        {"tile": {"core": None}},
        {"tile": {"channel": True}},
        {"tile": {"channel": [1.5]}},
        {"tile": {"pixel_size_um": 0}},
        {"tile": {"z": "all"}},
        {"tile": {"z": []}},
        {"tile": {"z": -1}},
        {"tile": {"t": "max"}},
        {"tile": {"scene": [0, -1]}},
        {"tile": {"pages": "each"}},
        {"infer": {"normalise": [0]}},
        {"infer": {"normalise": [0, 1, 2]}},
        {"infer": {"device": "tpu"}},
        {"infer": {"skip_empty": "perhaps"}},
        {"stitch": {"foreground": 0}},
        {"stitch": {"foreground": 1.5}},
        {"stitch": {"interior": [2]}},
        {"stitch": {"growth_steps": 513}},
        {"stitch": {"min_area": 1.5}},
        {"engine": {"kind": "slurm"}},
    ],
    ids=str,
)
def test_the_schema_takes_what_the_settings_take(tree, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(tree))
    try:
        load_project(path)
        taken = True
    except SettingsError:
        taken = False
    assert accepted(yaml.safe_load(path.read_text())) == taken
