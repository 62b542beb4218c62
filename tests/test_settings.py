"""Settings: what is wrong is named in one line, with the nearest right thing."""

from __future__ import annotations

from pathlib import Path

import pytest

from segpipe.errors import SettingsError
from segpipe.settings import (
    Settings,
    load_project,
    load_settings,
    parse_project,
    parse_settings,
)


def test_later_sources_win(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text("stitch:\n  region: 1024\n  min_area: 5\n")
    settings = load_settings(
        config, ["stitch.min_area=7"], {"infer.device": "cpu", "infer.model": None}
    )
    assert (settings.stitch.region, settings.stitch.min_area) == (1024, 7)
    assert settings.infer.device == "cpu" and settings.infer.model == "auto"


def test_lists_and_numbers_are_parsed_as_yaml():
    settings = load_settings(None, ["stitch.interior=[0.7, 0.5]", "infer.normalise=[0, 100]"])
    assert settings.stitch.interior == (0.7, 0.5)
    assert settings.infer.normalise == (0.0, 100.0)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"stitch": {"regoin": 1}},
            "unknown setting 'stitch.regoin'; did you mean 'stitch.region'?",
        ),
        ({"stich": {"region": 1}}, "unknown setting 'stich'; did you mean 'stitch'?"),
        ({"tile": {"min_area": 1}}, "stitch.min_area"),
        ({"zzz": {"qqq": 1}}, "known: tile.chunk"),
        ({"tile": {"core": "big"}}, "tile.core"),
        ({"tile": {"core": -1}}, "tile.core: input should be greater than or equal to 16, got -1"),
        ({"tile": {"core": 1000}}, "tile.core 1000 is not a multiple of tile.chunk 512"),
        ({"tile": {"region": 1500}}, "tile.region 1500 is not a multiple of tile.core 1024"),
        ({"stitch": {"region": 700}}, "stitch.region 700 is not a multiple of tile.chunk 512"),
        ({"stitch": {"foreground": 2}}, "stitch.foreground"),
        ({"infer": {"device": "tpu"}}, "infer.device"),
        ({"inptu": "a"}, "unknown setting 'inptu'; did you mean 'input'?"),
        ({"batch": 0}, "batch: input should be greater than or equal to 1, got 0"),
        ({"input": ["a", 7]}, "input: should be a path; one that looks like a number is written"),
        ({"output": ["a"]}, "output"),
        ({"model": "a", "infer": {"model": "b"}}, "model a and infer.model b: give one of them"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tree, message):
    with pytest.raises(SettingsError) as caught:
        parse_settings(tree)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stitch: [1, 2]", "'stitch' must hold keys"),
        ("modle: auto", "unknown setting 'modle'; did you mean 'model'"),
        ("- 1", "must hold sections"),
        ("a: b: c", "is not YAML"),
        ("stitch:\n  regoin: 4", "did you mean 'stitch.region'?"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, message):
    config = tmp_path / "my.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(config)
    assert message in str(caught.value)


def test_an_empty_file_means_the_defaults_and_a_missing_one_is_an_error(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text("")
    assert load_settings(config) == Settings()
    with pytest.raises(SettingsError, match="cannot read"):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(SettingsError, match=r"is not SECTION\.KEY=VALUE"):
        load_settings(None, ["region=4"])


def test_project_keys_stand_beside_the_sections(tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text(
        "input: [slides, more]\noutput: out\nmodel: mine\nbatch: 4\nstitch: {region: 1024}\n"
    )
    project = load_project(config)
    assert project.input == (Path("slides"), Path("more")) and project.output == Path("out")
    assert project.batch == 4
    assert project.settings.stitch.region == 1024 and project.settings.infer.model == "mine"
    assert load_settings(config) == project.settings
    assert type(project.settings) is Settings
    assert load_project(config, (), {"infer.model": "other"}).infer.model == "other"
    assert load_project(config, ["model=other", "batch=2"]).infer.model == "other"
    assert load_settings(config, ["infer.model=other"]).infer.model == "other"


def test_one_path_is_a_list_of_one():
    assert parse_project({"input": "-a {b}"}).input == (Path("-a {b}"),)
    assert parse_project({"input": "~/a"}).input == (Path.home() / "a",)
    assert parse_project({"input": "~a"}).input == (Path("~a"),)


@pytest.mark.parametrize(
    ("tree", "model"),
    [
        ({"model": "a", "infer": {"model": "a"}}, "a"),
        ({"model": "a", "infer": {"model": "auto"}}, "a"),
        ({"model": "auto", "infer": {"model": "a"}}, "a"),
        ({"model": None, "infer": {"model": "a"}}, "a"),
        ({"model": "a"}, "a"),
        ({}, "auto"),
    ],
)
def test_the_model_may_be_named_at_the_top(tree, model):
    assert parse_settings(tree).infer.model == model
