"""`segpipe init`: what it finds and writes, and that it chooses nothing which the files do not tell."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tifffile
import yaml
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fields import nuclei, table_of
from segpipe.advice import nuclear_channel
from segpipe.cli import main
from segpipe.errors import InputError, SettingsError
from segpipe.inputs import find_inputs
from segpipe.prepare import Prepared, prepare
from segpipe.project_yaml import write_project_yaml
from segpipe.settings import Project, Settings, load_project
from segpipe.settings_docs import settings_schema
from segpipe.survey import SeenImage, survey
from segpipe.workflow import project_of
from test_slide import noise, write_zarr


def write(
    path: Path, *shape: int, axes: str, names: tuple[str, ...] = (), um: float | None = None
) -> None:
    """An OME-TIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, Any] = {"axes": axes}
    if names:
        metadata["Channel"] = {"Name": list(names)}
    if um is not None:
        for side in "XY":
            metadata |= {f"PhysicalSize{side}": um, f"PhysicalSize{side}Unit": "µm"}
    photometric = "rgb" if axes.endswith("S") else "minisblack"
    pixels = noise(*shape, dtype="uint8" if axes.endswith("S") else "uint16")
    tifffile.imwrite(path, pixels, ome=True, photometric=photometric, metadata=metadata)


def segpipe(*arguments: object) -> Result:
    """Run the command line in this process; a traceback fails the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def init(folder: Path, *arguments: object) -> tuple[Project, str, str]:
    """Project, text of the YAML and what was told; the YAML is beside the folder and fits its schema."""
    path = folder.parent / "segpipe.yaml"
    result = segpipe("init", folder, "-o", path, *arguments)
    assert result.exit_code == 0, result.output
    text = path.read_text(encoding="utf-8")
    loaded = yaml.safe_load(text)
    jsonschema.Draft7Validator(settings_schema()).validate(loaded)
    assert max(len(line) for line in text.splitlines() if line.lstrip().startswith("# ")) < 125
    project = load_project(path)
    assert project == load_project(path).model_validate(project.model_dump())
    assert (
        project_of(loaded, Path("/elsewhere")).settings == project.settings
    )  # Snakemake's reading
    return project, text, result.output


def prepared(project: Project) -> Prepared:
    """What `predict` makes of the project before it starts."""
    assert project.input is not None and project.output is not None
    out = project.output
    out.mkdir()
    return prepare(find_inputs(project.input, out, project.tile), out, project.settings)


def told(prepared: Prepared) -> dict[str, str]:
    """What is wrong with which input."""
    return {one.name: str(error) for one, error in prepared.failed}


def unwrapped(text: str) -> str:
    """The comments on one line."""
    return " ".join(line.strip(" #") for line in text.splitlines())


def open_keys(text: str) -> list[str]:
    """Keys that are left to be filled in: a FILL IN above, and nothing behind."""
    found = re.findall(r"FILL IN: [^\n]*\n(?: *#[^\n]*\n)* *(\w+):\n", text)
    assert len(found) == text.count("FILL IN: ")
    return found


def filled(path: Path, **values: str) -> None:
    """Fill keys in, as people do."""
    text = path.read_text()
    for key, value in values.items():
        text, count = re.subn(rf"^( +{key}:)$", rf"\1 {value}", text, flags=re.MULTILINE)
        assert count == 1
    path.write_text(text)


def test_one_channel_and_a_whole_run(tmp_path, monkeypatch):
    nuclei(tmp_path / "slides" / "a.tif", (256, 256))
    monkeypatch.chdir(tmp_path)
    result = segpipe("init", "slides")
    assert result.exit_code == 0, result.output
    assert "1 image of 256 x 256 px, 0.0655 megapixels in all" in result.output
    assert "then        segpipe predict -c segpipe.yaml\n" in result.output
    text = Path("segpipe.yaml").read_text()
    assert "FILL IN:" not in text and not open_keys(text)
    monkeypatch.chdir("/")  # the YAML means the same from everywhere
    assert segpipe("predict", "-c", tmp_path / "segpipe.yaml", "--engine", "serial").exit_code == 0
    assert table_of(tmp_path / "slides-segmented", "a").num_rows > 0


def test_the_first_line_names_the_schema_of_this_package(tmp_path):
    nuclei(tmp_path / "in" / "a.tif", (40, 40))
    _, text, _ = init(tmp_path / "in")
    start, _, address = text.splitlines()[0].partition("$schema=")
    assert start == "# yaml-language-server: " and address.startswith("file:///")
    schema = Path(urllib.parse.unquote(address.removeprefix("file://")))
    assert schema.name == "schema.json" and " " not in address
    jsonschema.Draft7Validator.check_schema(yaml.safe_load(schema.read_text()))


@pytest.mark.parametrize(
    "names",
    [
        ("FITC", "DAPI", "Cy5"),
        ("LaminB1", "Dapi"),
        ("actin", "Hoechst 33342"),
        ("H2B-mCherry", "GFP"),
    ],
    ids=str,
)
def test_a_channel_of_nuclei_is_chosen_by_its_name_and_said(tmp_path, names):
    for name in "ab":
        write(tmp_path / "in" / f"{name}.ome.tif", len(names), 40, 50, axes="CYX", names=names)
    project, text, output = init(tmp_path / "in")
    (chosen,) = project.tile.channel
    assert chosen in names and f"set         tile.channel: {chosen}\n" in output
    assert "#   2 images: 0 (" in text and "Chosen because its name" in text
    ready = prepared(project)
    assert not ready.failed
    assert {image.layout.channels for image in ready.images} == {(names.index(chosen),)}


def test_names_that_differ_give_a_number_also_for_images_of_one_channel(tmp_path):
    write(tmp_path / "in" / "a.ome.tif", 2, 40, 50, axes="CYX", names=("DAPI", "GFP"))
    write(tmp_path / "in" / "b.ome.tif", 2, 40, 50, axes="CYX", names=("Hoechst", "GFP"))
    write(tmp_path / "in" / "c.ome.tif", 40, 50, axes="YX")
    project, _, _ = init(tmp_path / "in")
    assert project.tile.channel == ("0",)
    ready = prepared(project)
    assert not ready.failed and {image.layout.channels for image in ready.images} == {(0,)}


@pytest.mark.parametrize(
    "lists",
    [
        [("GFP", "RFP")],
        [("DAPI-1", "DAPI-2")],
        [("DAPI", "GFP"), ("GFP", "DAPI", "RFP"), ("GFP", "RFP")],
        [("GFP", "DAPI"), ("0",)],
        [("GFP", "nuclear envelope")],
    ],
    ids=str,
)
def test_what_names_do_not_tell_is_left_to_be_filled_in(tmp_path, lists):
    for number, names in enumerate(lists):
        path = tmp_path / "in" / f"{number}.ome.tif"
        write(path, len(names), 40, 50, axes="CYX", names=names if names != ("0",) else ())
    project, text, output = init(tmp_path / "in")
    assert project.tile.channel is None and open_keys(text) == ["channel"]
    assert "fill in     tile.channel: which channel shows the nuclei" in output
    for names in lists:
        assert f"0 ({names[0]})" in text or names == ("0",)
    failed = told(prepared(project))
    assert len(failed) == sum(len(names) > 1 for names in lists), "one was taken silently"


def test_a_number_never_takes_a_colour_of_an_rgb_image():
    stained = SeenImage(Path("a"), (9, 9), ("DAPI", "GFP"), False, None)
    other = SeenImage(Path("b"), (9, 9), ("Hoechst", "GFP"), False, None)
    colours = SeenImage(Path("c"), (9, 9), ("red", "green", "blue"), True, None)
    assert nuclear_channel([stained, other]) == 0
    assert nuclear_channel([stained, other, colours]) is None
    assert nuclear_channel([stained, colours]) == "DAPI"


def test_rgb_has_a_shipped_model_and_it_is_said(tmp_path):
    folder = tmp_path / "in"
    write(folder / "he.ome.tif", 40, 50, 3, axes="YXS")
    project, text, _ = init(folder)
    assert project.infer.model == "auto" and open_keys(text) == []
    assert "auto is nuclei-he here" in unwrapped(text)

    nuclei(folder / "grey.tif", (40, 50))
    project, text, _ = init(folder, "--force")
    assert project.infer.model == "auto" and "FILL IN:" not in text
    assert "But nuclei-he for RGB: 1 of 2 images (he.ome.tif)" in unwrapped(text)


def bright(path: Path) -> None:
    """A photograph: pale ground with darker spots."""
    pixels = np.full((40, 50, 3), 220, np.uint8)
    pixels[10:20, 10:20] = (120, 70, 150)
    tifffile.imwrite(path, pixels, photometric="rgb")


def test_auto_chooses_by_the_channels_and_refuses_what_it_is_not_for(tmp_path, caplog):
    folder = tmp_path / "in"
    nuclei(folder / "grey.tif", (40, 50))
    bright(folder / "stained.tif")
    dark = np.full((40, 50, 3), 9, np.uint8)
    dark[10:20, 10:20] = 0, 100, 200  # green and blue
    tifffile.imwrite(folder / "dark.tif", dark, photometric="rgb")
    deep = np.full((40, 50, 3), 60000, np.uint16)
    tifffile.imwrite(folder / "deep.tif", deep, photometric="rgb")
    caplog.set_level("INFO")
    found = prepare(find_inputs([folder], tmp_path / "out"), tmp_path / "out", Settings())
    models = {image.name: image.model.card.name for image in found.images}
    assert models == {"grey": "nuclei-fluorescence", "stained": "nuclei-he"}
    reasons = told(found)
    assert "ground is dark" in reasons["dark"] and "--channel blue" in reasons["dark"]
    assert "RGB of uint16" in reasons["deep"]
    assert "model auto: nuclei-he for 1 of 2 images" in caplog.text


def sized(folder: Path, *sizes: float | None) -> None:
    for number, um in enumerate(sizes):
        write(folder / f"{number}.ome.tif", 40, 50, axes="YX", um=um)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((None, None), "No file says it"),
        ((0.5, 0.5), "The files say 0.5 um."),
        ((0.25, 0.5, 0.325), "The files say 0.25 to 0.5 um."),
        ((0.25, None, 0.5), "The files say 0.25 to 0.5 um in 2 images, not said in 1."),
    ],
)
def test_pixel_sizes(tmp_path, sizes, said):
    sized(tmp_path / "in", *sizes)
    project, text, _ = init(tmp_path / "in")
    assert said in text and "  # pixel_size_um: null" in text
    assert [image.layout.pixel_size_um for image in prepared(project).images] == [
        None if size is None else pytest.approx(size) for size in sizes
    ]


STACKS: dict[str, tuple[Callable[[Path], object], dict[str, str], int]] = {
    "z": (lambda folder: write(folder / "a.ome.tif", 5, 40, 50, axes="ZYX"), {"z": "max"}, 1),
    "t and z": (
        lambda folder: write(folder / "a.ome.tif", 3, 5, 40, 50, axes="TZYX"),
        {"t": "each", "z": "each"},
        15,
    ),
    "pages": (
        lambda folder: tifffile.imwrite(folder / "a.tif", noise(6, 40, 50), metadata=None),
        {"pages": "channel"},
        0,  # of which none is chosen
    ),
    "zarr": (
        lambda folder: write_zarr(folder / "a.zarr", noise(4, 40, 50), "zyx"),
        {"z": "[1, 3]"},
        2,
    ),
}


@pytest.mark.parametrize("name", STACKS)
def test_planes_are_left_to_be_filled_in_and_then_taken(tmp_path, name):
    make, choices, images = STACKS[name]
    folder = tmp_path / "in"
    folder.mkdir()
    make(folder)
    nuclei(folder / "flat.tif", (40, 50))
    project, text, output = init(folder)
    assert sorted(open_keys(text)) == sorted(choices)
    assert all(f"fill in     tile.{key}: " in output for key in choices)
    assert list(told(prepared(project))) == ["a"]
    filled(tmp_path / "segpipe.yaml", **choices)
    project = load_project(tmp_path / "segpipe.yaml")
    found = prepare(
        find_inputs(project.input, project.output, project.tile), project.output, project.settings
    )
    assert len(found.images) == images + 1


def test_scenes_are_counted_in_files(tmp_path):
    (tmp_path / "in").mkdir()
    with tifffile.TiffWriter(tmp_path / "in" / "a.ome.tif", ome=True) as writer:
        for side in (40, 50, 60):
            writer.write(noise(side, 40, dtype="uint16"), metadata={"axes": "YX"})
    project, text, output = init(tmp_path / "in")
    assert open_keys(text) == ["scene"] and "3 scenes in 1 file" in text
    assert "3 images (scenes of 1 file) of 40 x 40 to 40 x 60 px" in output
    assert project.tile.scene is None


def test_unreadable_files_are_named_and_do_not_stop_it(tmp_path):
    folder = tmp_path / "in"
    nuclei(folder / "a.tif", (40, 50))
    for number in range(12):
        (folder / f"bad{number:02}.tif").write_bytes(b"II*\0")
    (folder / "note.txt").write_text("no image")
    _, text, output = init(folder)
    assert "Could not be read, and predict will say so too (12):" in text
    assert "unreadable  bad00.tif: " in output and "unreadable  and 4 more" in output
    (folder / "a.tif").unlink()
    result = segpipe("init", folder, "-o", tmp_path / "segpipe.yaml", "--force")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "can be read: bad00.tif" in result.stderr
    assert (tmp_path / "segpipe.yaml").read_text() == text, "a failure replaced it"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such file or folder"),
        (lambda folder: folder.mkdir(), "no images in"),
        (lambda folder: nuclei(folder / "a.tif", (9, 9)).rename(folder / "../my.yaml"), "exists; "),
        (lambda folder: nuclei(folder / "../my.yaml/a.tif", (9, 9)), "is a folder; name a file"),
    ],
)
def test_what_is_wrong_is_one_line_and_writes_nothing(tmp_path, make, message):
    make(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    result = segpipe("init", tmp_path / "in", "-o", tmp_path / "my.yaml")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_yaml_that_cannot_be_written_is_one_line(tmp_path):
    nuclei(tmp_path / "in" / "a.tif", (9, 9))
    with pytest.raises(SettingsError, match="cannot write"):
        write_project_yaml(tmp_path / "in", tmp_path / "in" / "a.tif" / "my.yaml")


def test_nothing_is_left_in_the_folder_or_where_results_will_be(tmp_path):
    nuclei(tmp_path / "in" / "a.tif", (40, 50))
    project, _, _ = init(tmp_path / "in")
    assert project.output == tmp_path / "in-segmented" and not project.output.exists()
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.tif"]


def test_many_small_images_make_a_batch(tmp_path):
    for number in range(12):
        nuclei(tmp_path / "in" / f"{number}.tif", (20, 20), seed=number)
    project, text, _ = init(tmp_path / "in")
    assert project.batch == 12 and "Each image is one region" in text
    write(tmp_path / "large" / "a.ome.tif", 4100, 2049, axes="YX")
    project, text, _ = init(tmp_path / "large", "--force")
    assert project.batch == 1 and "the largest image is 6 regions" in text


def test_values_of_the_card_are_shown_and_change_nothing(tmp_path):
    """Every line that is commented out may be taken as it is."""
    nuclei(tmp_path / "in" / "a.tif", (40, 50))
    project, text, _ = init(tmp_path / "in")
    assert "  # min_area: 20 " in text
    path = tmp_path / "all.yaml"
    lines = [
        line.replace("# ", "", 1) if ": " in line and "null" in line else line
        for line in text.splitlines()
    ]
    path.write_text("\n".join(lines))
    assert load_project(path) == project


TEXT = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=40)
HOSTILE = st.one_of(
    TEXT, st.sampled_from(["a\nmodel: evil", "x # y", "- z", "\x85batch: 7", "\u2028", "'\"{%"])
)


@given(HOSTILE, HOSTILE)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_names_cannot_write_keys(tmp_path, monkeypatch, first, second):
    """Channels and files are called by whoever made them."""
    from segpipe import project_yaml
    from segpipe.survey import Survey

    image = SeenImage(
        Path(second.replace("/", "_")), (9, 9), (first, f"DAPI {second}"), False, None
    )
    grey = SeenImage(image.source, (9, 9), ("red", "green", "blue"), True, None)
    for images in ([image], [image, grey], [grey]):
        seen = Survey(tuple(images), (f"{first!r} is bad",))
        monkeypatch.setattr(project_yaml, "survey", lambda given, out, seen=seen: seen)
        path = tmp_path / "my.yaml"
        folder = tmp_path / (second.replace("/", "_").encode("utf-8", "replace").decode() + "_")
        project_yaml.write_project_yaml(folder, path, force=True)
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert set(loaded) <= {"input", "output", "model", "batch", *Settings.model_fields}
        assert set(loaded["tile"] or ()) <= {"channel", "scene"} and loaded.get("batch", 1) == 1
        assert not any(loaded[section] for section in ("infer", "stitch", "measure", "engine"))
        assert Path(loaded["input"]) == folder
        if image in images and nuclear_channel(images) is not None:
            assert loaded["tile"]["channel"] == nuclear_channel(images)


def test_survey_of_nothing_readable_is_an_input_error(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.tif: is empty"):
        survey(tmp_path, tmp_path / "out")
    assert np.size(list(tmp_path.iterdir())) == 1
