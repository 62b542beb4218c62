"""What fails once: the rest is finished, it is named, and one rerun gives what would have been."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner

import plain
from fields import CORE, SIZES, labels_of, nuclei, run, table_of, threshold_model
from segpipe.cleaning import clean
from segpipe.cli import main
from segpipe.models.modelfile import read_card
from segpipe.records import Records, read_json
from segpipe.run import predict
from segpipe.settings import load_settings
from segpipe.stages.image import decode_of

SEGPIPE = (sys.executable, "-m", "segpipe.cli")
TWO_WORKERS = ("--engine", "local", "--workers", "2")
FAST_GROWTH = ("stitch.growth_steps=2", "stitch.interior=[0.6]")


@pytest.fixture(scope="module")
def winding(tmp_path_factory):
    """Thin lines that wind through all regions, with a few blobs on them from which they grow."""
    pixels = np.full((230, 250), 10, np.float32)
    pixels += np.random.default_rng(0).random(pixels.shape, np.float32)
    pixels[4:-4:8, 4:-4] = 400
    pixels[4:-12:16, -6:-4] = 400
    for top in range(4, 210, 16):
        pixels[top : top + 9, -5] = 400
    for top in range(12, 200, 16):
        pixels[top : top + 9, 4] = 400
    for y, x in ((6, 30), (120, 130), (200, 60)):
        pixels[y - 4 : y + 5, x - 4 : x + 5] = 500
    path = tmp_path_factory.mktemp("winding") / "line.tif"
    tifffile.imwrite(path, pixels)
    return path


@pytest.fixture(scope="module")
def reference(winding, tmp_path_factory):
    out = tmp_path_factory.mktemp("reference")
    assert run(winding, out, *FAST_GROWTH).exit_code == 0
    return out


def test_growth_of_many_rounds_is_that_of_the_whole_image(reference):
    """Growth that runs on and on through regions: rounds, fronts and publishing on disk."""
    assert read_json(reference / "manifests/line.stitch.json")["facts"]["growth_rounds"] > 3
    probabilities = zarr.open_array(reference / ".segpipe/line.work/probabilities.zarr", mode="r")[
        :
    ]
    card = read_card(threshold_model())
    decode = decode_of(load_settings(None, FAST_GROWTH), card)
    expected = plain.instances(
        probabilities[0],
        probabilities[1],
        decode.foreground,
        decode.interior,
        decode.min_area,
        decode.growth,
        decode.growth_steps,
    )
    assert 1 <= expected.max() < 10
    np.testing.assert_array_equal(labels_of(reference, "line"), expected)


@pytest.mark.parametrize("region", [CORE * 4])
def test_and_does_not_depend_on_the_regions(winding, reference, tmp_path, region):
    settings = (*FAST_GROWTH, f"tile.region={region}")
    assert run(winding, tmp_path, *settings).exit_code == 0
    np.testing.assert_array_equal(labels_of(tmp_path, "line"), labels_of(reference, "line"))


PASSES = [
    "tile",
    "tile-fine",
    "tile-level1",
    "infer",
    "components",
    "grow-0",
    "grow-1",
    "publish",
    "sums",
    "measure-level1",
]


@pytest.mark.parametrize("pass_name", PASSES)
def test_a_region_that_fails_is_named_and_one_rerun_mends_all(
    winding, reference, tmp_path, monkeypatch, pass_name
):
    add, region = Records.add, "0_0"

    def fail(self, name, *args, **facts):
        if self.name == pass_name and name == region:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return add(self, name, *args, **facts)

    monkeypatch.setattr(Records, "add", fail)
    result = run(winding, tmp_path, *FAST_GROWTH)
    assert result.exit_code == 1
    assert "Input/output error" in str(result.images[0].error)
    assert clean(tmp_path) == ["line"], "clean took a failed image for finished"
    monkeypatch.setattr(Records, "add", add)
    assert run(winding, tmp_path, *FAST_GROWTH).exit_code == 0
    np.testing.assert_array_equal(labels_of(tmp_path, "line"), labels_of(reference, "line"))
    assert table_of(tmp_path, "line").equals(table_of(reference, "line"))
    for array in ("0", "1", "labels/instances/1", "labels/instances/2"):
        ours, theirs = (
            zarr.open_array(out / "line.ome.zarr" / array, mode="r")[:]
            for out in (tmp_path, reference)
        )
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("pass_name", ["infer", "components", "grow-1", "publish"])
def test_settings_changed_interrupted_and_changed_back(
    winding, reference, tmp_path, monkeypatch, pass_name
):
    """A, then B stopped on its way, then A again: nothing of B may be taken for A's."""
    assert run(winding, tmp_path, *FAST_GROWTH).exit_code == 0
    other = (*FAST_GROWTH, "stitch.min_area=25", "infer.normalise=[0, 600]")

    def stop(self, name, *args, **facts):
        if self.name == pass_name:
            raise KeyboardInterrupt
        return Records_add(self, name, *args, **facts)

    Records_add = Records.add  # noqa: N806
    monkeypatch.setattr(Records, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        run(winding, tmp_path, *other)
    monkeypatch.setattr(Records, "add", Records_add)
    assert run(winding, tmp_path, *FAST_GROWTH).exit_code == 0
    np.testing.assert_array_equal(labels_of(tmp_path, "line"), labels_of(reference, "line"))
    assert table_of(tmp_path, "line").equals(table_of(reference, "line"))


@pytest.mark.parametrize(
    "lost",
    [
        ".segpipe/line.work/probabilities.zarr/c/0/0/1",
        ".segpipe/line.work/probabilities.zarr",
        "line.ome.zarr/labels/instances/0/c/0/0",
        "line.ome.zarr/labels",
        "line.ome.zarr/0/c/0/1/0",
        "line.ome.zarr",
        "line.parquet",
    ],
)
def test_what_is_lost_is_missed_and_made_again(winding, reference, tmp_path, lost):
    assert run(winding, tmp_path, *FAST_GROWTH).exit_code == 0
    path = tmp_path / lost
    subprocess.run(["rm", "-r", str(path)], check=True)
    changed = (*FAST_GROWTH, "stitch.min_area=12")
    assert run(winding, tmp_path, *changed).exit_code == 0
    assert run(winding, tmp_path, *FAST_GROWTH).exit_code == 0
    np.testing.assert_array_equal(labels_of(tmp_path, "line"), labels_of(reference, "line"))
    ours, theirs = (
        zarr.open_array(out / "line.ome.zarr/labels/instances/1", mode="r")[:]
        for out in (tmp_path, reference)
    )
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "array",
    [
        ".segpipe/line.work/probabilities.zarr",
        "line.ome.zarr/0",
        "line.ome.zarr/labels/instances/1",
    ],
)
def test_a_flipped_bit_is_found_by_verify_and_mended(winding, reference, tmp_path, array):
    assert run(winding, tmp_path, *FAST_GROWTH).exit_code == 0
    shard = sorted(path for path in (tmp_path / array / "c").rglob("*") if path.is_file())[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:30] + bytes([whole[30] ^ 4]) + whole[31:])
    assert run(winding, tmp_path, *FAST_GROWTH).images[0].status == "skipped"
    assert run(winding, tmp_path, *FAST_GROWTH, verify=True).images[0].status == "done"
    assert shard.read_bytes() == whole
    assert run(winding, tmp_path, *FAST_GROWTH, verify=True).images[0].status == "skipped"
    np.testing.assert_array_equal(labels_of(tmp_path, "line"), labels_of(reference, "line"))


def test_a_stage_after_clean_refuses_before_it_touches_anything(winding, reference, tmp_path):
    assert run(winding, tmp_path, *FAST_GROWTH).exit_code == 0
    assert clean(tmp_path) == []
    for stage, setting in (("stitch", "stitch.min_area=50"), ("measure", "measure.preview=true")):
        result = run(winding, tmp_path, *FAST_GROWTH, setting, stages=(stage,))
        assert result.exit_code == 1
        assert "run `segpipe stage infer` first" in str(result.images[0].error)
    np.testing.assert_array_equal(labels_of(tmp_path, "line"), labels_of(reference, "line"))
    assert table_of(tmp_path, "line").equals(table_of(reference, "line"))


def test_restart_with_a_wrong_model_loses_nothing(winding, tmp_path):
    assert run(winding, tmp_path, *FAST_GROWTH).exit_code == 0
    command = ["predict", str(winding), "-o", str(tmp_path), "--restart", "-m", "nuclei-flour"]
    assert CliRunner().invoke(main, command).exit_code == 2
    assert labels_of(tmp_path, "line").max() > 0


@pytest.mark.parametrize(
    "setting",
    [
        "stitch.growth_levels=[0.5]",
        "stitch.interior=[0.5, 0.5]",
        "infer.normalise=[900, 100]",
        "infer.normalise=[.nan, 100]",
        "infer.precision=float16",
        "stitch.foreground=0",
        "tile.core=72",
    ],
)
def test_wrong_settings_start_nothing(winding, tmp_path, setting):
    sets = [part for one in (*SIZES, setting) for part in ("-s", one)]
    result = CliRunner().invoke(main, ["predict", str(winding), "-o", str(tmp_path / "out"), *sets])
    assert result.exit_code == 2
    assert not list((tmp_path).rglob("*.zarr"))


def test_a_full_disk_in_the_client_is_named_and_the_others_are_finished(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    for name in ("a", "b", "c"):
        nuclei(folder / f"{name}.tif", (100, 140))
    write = Path.write_bytes

    def full(path, content):
        if "b.work" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    result = run(folder, tmp_path / "out")
    assert result.exit_code == 1
    assert [one.name for one in result.failed] == ["b"]
    assert "b: No space left on device" in str(result.failed[0].error)
    monkeypatch.setattr(Path, "write_bytes", write)
    assert run(folder, tmp_path / "out").exit_code == 0


def test_several_images_in_flight_under_local_and_the_whole_run_killed(tmp_path):
    """SIGKILL to the whole group in the middle; the rerun, by another engine, gives the same bytes."""
    folder = tmp_path / "in"
    for number in range(6):
        nuclei(folder / f"{number}.tif", (150 + 20 * number, 200), seed=number)
    sets = [part for one in SIZES for part in ("-s", one)]
    process = subprocess.Popen(
        [*SEGPIPE, "predict", str(folder), "-o", str(tmp_path / "out"), *sets, *TWO_WORKERS],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    records = ".segpipe/*/records/stitch/*.records"
    while not any(b"components" in one.read_bytes() for one in (tmp_path / "out").glob(records)):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert run(folder, tmp_path / "out", "engine.kind=local", "engine.workers=2").exit_code == 0
    assert run(folder, tmp_path / "serial").exit_code == 0
    for number in range(6):
        name = str(number)
        np.testing.assert_array_equal(
            labels_of(tmp_path / "out", name), labels_of(tmp_path / "serial", name)
        )
        assert table_of(tmp_path / "out", name).equals(table_of(tmp_path / "serial", name))


def test_a_name_that_is_no_unicode(tmp_path):
    image = nuclei(tmp_path / "in" / "a.tif", (70, 70))
    strange = Path(os.fsdecode(os.fsencode(image.parent) + b"/\xff\xfe.tif"))
    image.rename(strange)
    result = predict(
        [image.parent], tmp_path / "out", load_settings(None, [*SIZES, "engine.kind=serial"])
    )
    assert result.exit_code == 0
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 1


def test_out_may_not_be_the_folder_that_is_searched(tmp_path):
    nuclei(tmp_path / "a.tif", (70, 70))
    result = CliRunner().invoke(main, ["predict", str(tmp_path), "-o", str(tmp_path)])
    assert result.exit_code == 2 and "choose another OUT" in result.stderr
