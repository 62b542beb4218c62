"""What a job would be, said before it is run."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from fields import SIZES, nuclei, run, threshold_model
from segpipe import plan as planning
from segpipe.cli import main
from segpipe.errors import SegpipeError, SettingsError
from segpipe.footprint import EXPORT_BYTES, Processes
from segpipe.geometry import Box
from segpipe.inputs import find_inputs
from segpipe.plan import plan_job
from segpipe.plan_text import duration_text, plan_text
from segpipe.prepare import prepare
from segpipe.sample import Sample, choose_parts, take_sample
from segpipe.settings import load_settings
from segpipe.stages.exported import SUFFIXES
from segpipe.usage import Usage


@pytest.fixture
def folder(tmp_path):
    """Two images, one of them of one tile, and a file that is none."""
    nuclei(tmp_path / "in" / "large.tif", (300, 280))
    nuclei(tmp_path / "in" / "small.tif", (50, 40), seed=2)
    (tmp_path / "in" / "torn.tif").write_bytes(b"II*\0")
    return tmp_path / "in"


def settings_of(*more):
    return load_settings(None, [*SIZES, *more])


def test_the_plan_is_what_the_run_then_does(folder, tmp_path):
    out = tmp_path / "out"
    found = plan_job([folder], out, settings_of(), sampled=False)
    assert not out.exists()
    assert [name for name, _ in found.failed] == ["torn"]
    result = run(folder, out)
    told = json.loads((out / "run.json").read_text())["images"]
    for image in found.images:
        entry = told[image.name]
        assert image.tiles == entry["tiles"]
        assert vars(image.numeric) | {"context": image.model.context} == entry["plan"]
        assert image.model.hash == entry["model_hash"]
        height, width = image.shape[1:]
        assert image.useful_share == height * width / (image.tiles * math.prod(image.window))
        assert image.stages == ("tile", "infer", "stitch", "measure")
    assert {one.name for one in result.failed} == {"torn"}
    used = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    files = sum(1 for path in out.rglob("*") if path.is_file())
    told_files = sum(image.files for image in found.images)
    assert 0.8 * told_files <= files <= told_files + 10
    assert used <= sum(image.disk_bytes for image in found.images) + 50_000 * len(found.images)


def test_what_is_done_is_not_planned_again_and_decisions_are_kept(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, out)
    (out / "manifests" / "plan.json").write_text(
        json.dumps({"batch": 3, "region": 128, "backend": "eager"})
    )
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    same = plan_job([folder], out, settings_of(), sampled=False)
    assert all(image.numeric.batch == 3 for image in same.images)  # decided once
    assert "infer" in same.images[0].stages
    run(folder, out)
    done = plan_job([folder], out, settings_of(), sampled=False)
    assert [image.stages for image in done.images] == [(), ()]
    assert "nothing to do" in "\n".join(plan_text(done))
    other = plan_job([folder], out, settings_of("stitch.min_area=77"), sampled=False)
    assert {image.stages for image in other.images} == {("stitch", "measure")}
    lines = "\n".join(plan_text(other))
    assert "stitch, measure" in lines
    assert before.keys() == {path for path in out.rglob("*") if path.is_file()}


def test_the_sample_is_a_real_run_over_parts_of_the_images(folder, tmp_path):
    settings = settings_of("engine.kind=serial")
    found = plan_job([folder / "large.tif"], None, settings, sampled=True)
    sample = found.sample
    assert sample is not None and found.seconds is not None
    assert sample.pixels[0] < sample.pixels[1] <= 300 * 280
    assert min(sample.seconds) > 0 and sample.usage.peaks_bytes[0] > 50e6
    assert 0 < sample.results_bytes < sample.disk_bytes
    text = "\n".join(plan_text(found))
    assert "time          about" in text and "by the sample about" in text


def test_exports_are_counted_by_the_objects_of_the_sample(folder):
    settings = settings_of("engine.kind=serial", "export.formats=[geojson, csv]")
    without = plan_job([folder / "large.tif"], None, settings_of(), sampled=False)
    assert "exports" not in "\n".join(plan_text(without)) and without.exports == ()
    found = plan_job([folder / "large.tif"], None, settings, sampled=False)
    assert found.objects is None and without.client_bytes <= found.client_bytes < 1e9
    (line,) = (one for one in plan_text(found) if one.startswith("exports"))
    each = EXPORT_BYTES["geojson"] + EXPORT_BYTES["csv"]
    assert f"some {each} MB of disk per 1,000,000 objects" in line
    sampled = plan_job([folder / "large.tif"], None, settings, sampled=True)
    share = 300 * 280 / sampled.sample.pixels[1]
    assert sampled.objects == round(sampled.sample.objects * share) > 5
    (line,) = (one for one in plan_text(sampled) if one.startswith("exports"))
    assert f"{sampled.objects:,} make {each * sampled.objects / 1e3:.0f} kB" in line
    told = sampled.to_json()
    assert told["exports"] == ["geojson", "csv"] and told["export_bytes_per_object"] == each
    assert told["objects"] == sampled.objects


def test_every_format_has_a_size():
    assert EXPORT_BYTES.keys() == SUFFIXES.keys()


def test_the_sample_says_why_it_failed(folder, tmp_path):
    settings = settings_of("engine.kind=serial")
    image = prepare(find_inputs([folder / "large.tif"], tmp_path / "o"), tmp_path / "o", settings)
    wrong = settings.model_copy(
        update={"infer": settings.infer.model_copy(update={"normalise": (5.0, 5.0)})}
    )
    with pytest.raises(SegpipeError, match="the sample failed with exit code"):
        take_sample(
            image.images, wrong, Processes("serial", 1, 0), tmp_path / "o", lambda line: None
        )


def test_an_image_that_cannot_be_read_is_left_out_of_the_sample(folder, tmp_path):
    whole = (folder / "large.tif").read_bytes()
    (folder / "cut.tif").write_bytes(whole[: len(whole) // 2])
    (folder / "small.tif").unlink()
    said = []
    settings = settings_of("engine.kind=serial")
    images = [folder / "cut.tif", folder / "large.tif"]
    found = plan_job(images, None, settings, sampled=True, told=said.append)
    assert found.sample is not None and not found.failed
    assert any("cut is left out: cut.tif: ends at byte" in line for line in said)
    alone = plan_job(images[:1], None, settings, sampled=True)
    assert alone.sample is None and alone.seconds is None
    assert "time" not in "\n".join(plan_text(alone))


def test_the_sample_takes_a_channel_by_its_name_wherever_it_lies(tmp_path):
    (tmp_path / "in").mkdir()
    for name, channels in {"a": ["nuclei", "other"], "b": ["other", "nuclei", "third"]}.items():
        pixels = np.random.default_rng(0).integers(0, 999, (len(channels), 90, 80), dtype=np.uint16)
        about = {"axes": "CYX", "Channel": {"Name": channels}}
        tifffile.imwrite(tmp_path / "in" / f"{name}.ome.tif", pixels, metadata=about)
    settings = settings_of("tile.channel=nuclei", "engine.kind=serial")
    used = []

    def kept(images, settings, processes, folder, told):
        sample = take_sample(images, settings, processes, folder, told)
        told = json.loads((folder / "second" / "run.json").read_text())["images"]
        used.extend(one["channels"] for one in told.values())
        return sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "take_sample", kept)
        assert plan_job([tmp_path / "in"], None, settings, sampled=True).sample is not None
    assert used == [["nuclei"], ["nuclei"]]


def test_the_estimate_is_a_line_through_two_runs():
    usage = Usage(0, 0, (), 0)
    sample = Sample((100, 900), (12.0, 20.0), 0.001, usage, 0, 0, regions=4)
    assert sample.seconds_per_pixel == pytest.approx(0.01)
    assert sample.start_seconds == pytest.approx(11)
    # Two workers were busy in the sample and are in the job: 0.01 s a pixel, and half of reading.
    assert sample.job_seconds(10_000, 50, 2) == pytest.approx(11 + 100 + 5)
    # Eight workers: the sample's four regions kept four of them busy.
    assert sample.job_seconds(10_000, 50, 8) == pytest.approx(11 + 50 + 10 / 8)
    # One region: no more than one worker, whatever there is.
    assert sample.job_seconds(10_000, 1, 8) == pytest.approx(11 + 400 + 10)
    single = Sample((900, 900), (20.0, 20.0), 0.0, usage, 0, 0, regions=1)
    assert single.job_seconds(1800, 2, 1) == pytest.approx(40)
    noisy = Sample((100, 900), (20.0, 12.0), 0.0, usage, 0, 0, regions=1)
    assert noisy.job_seconds(1800, 2, 1) == pytest.approx(20)


def test_parts_are_whole_tiles_of_the_middle_spread_over_the_images(folder, tmp_path):
    out = tmp_path / "o"
    images = prepare(find_inputs([folder], out), out, settings_of()).images
    large, small = images
    parts = choose_parts(images, Processes("serial", 1, 0))
    assert [image.name for image, _ in parts] == [large.name, small.name]
    for image, box in parts:
        assert Box(0, 0, *image.layout.plane).contains(box)
        core = image.tiles.core_shape
        assert box.y0 % core[0] == 0 and box.x0 % core[1] == 0 and box.area > 0
    assert parts[1][1] == Box(0, 0, 50, 40)
    many = choose_parts([small] * 1000, Processes("serial", 1, 0))
    assert 1 < len(many) <= 40


def test_the_command_names_bad_inputs_and_writes_json(folder, tmp_path):
    sets = [argument for one in SIZES for argument in ("-s", one)]
    target = tmp_path / "new" / "plan.json"
    shown = CliRunner().invoke(
        main, ["plan", str(folder), *sets, "--no-sample", "--json", str(target)]
    )
    assert shown.exit_code == 1, shown.output
    assert "cannot be used: torn" in shown.output
    told = json.loads(target.read_text())
    assert [image["name"] for image in told["images"]] == ["large", "small"]
    assert told["images"][0]["model"]["halo"] == told["images"][0]["numeric"]["halo"]
    assert told["seconds"] is None and told["memory_bytes"] > 0
    assert CliRunner().invoke(main, ["plan", *sets]).exit_code == 2
    nothing = CliRunner().invoke(main, ["plan", str(tmp_path / "new"), "--no-sample"])
    assert nothing.exit_code == 2 and "no images" in nothing.output


def test_an_out_that_is_searched_is_refused(folder):
    with pytest.raises(SettingsError, match="both searched and OUT"):
        plan_job([folder], folder, settings_of(), sampled=False)


def test_results_are_no_images_to_search(folder, tmp_path):
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "images.json").write_text("{}")
    with pytest.raises(SettingsError, match="holds results of segpipe"):
        plan_job([tmp_path], None, settings_of(), sampled=False)


def test_a_job_that_is_too_large_is_said(folder, monkeypatch):
    monkeypatch.setattr(planning, "usable_memory_bytes", lambda: 1000)
    found = plan_job([folder / "large.tif"], None, settings_of(), sampled=False)
    assert "TOO MUCH" in "\n".join(plan_text(found))


def test_durations():
    assert [duration_text(one) for one in (0.4, 99, 100, 5940, 12_000, 199_000)] == [
        *("0 s", "99 s", "2 min", "99 min", "3 h 20 min", "55 h"),
    ]


def test_a_picture_of_several_channels_and_a_stated_channel(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 999, (3, 90, 80), dtype=np.uint16)
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        pixels,
        metadata={"axes": "CYX", "Channel": {"Name": ["x", "y", "z"]}},
    )
    settings = load_settings(
        None,
        [f"infer.model={threshold_model()}", "tile.channel=y", "engine.kind=serial", *SIZES[:3]],
    )
    found = plan_job([tmp_path / "a.ome.tif"], None, settings, sampled=True)
    assert found.sample is not None and found.sample.pixels == (80 * 46, 80 * 90)
    assert "80 x 90 x 3" in "\n".join(plan_text(found))
