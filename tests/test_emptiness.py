"""Tiles that hold nothing are skipped, and nobody can tell from the labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

import segpipe
from fields import CORE, SIZES, labels_of, run, table_of, threshold_model
from segpipe import memory
from segpipe.calibration import FOREGROUND, calibrate, contrast_about
from segpipe.errors import ModelError, SettingsError
from segpipe.geometry import Box, Lattice
from segpipe.inference import predict_region
from segpipe.models.card import Empty
from segpipe.models.modelfile import load_model, read_card, write_model
from segpipe.occupancy import SCALES
from segpipe.settings import load_settings
from segpipe.store import read_box
from segpipe.synthetic import NucleiField

RULE = Empty(level=0.15, contrast=0.15, foreground=0.1)
"""The made model sees a pixel by itself, above .16: below this rule it sees nothing for certain."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The made model with a rule in its card."""
    network, card = load_model(threshold_model())
    path = tmp_path_factory.mktemp("model") / "ruled.safetensors"
    write_model(path, network, card.model_copy(update={"empty": RULE}))
    return path


def nuclei_on_the_left(shape: tuple[int, int], noise: float) -> np.ndarray:
    """A field of nuclei of which all but the first columns are bare background with noise."""
    pixels = np.random.default_rng(0).normal(350, noise, shape)
    field = NucleiField(shape, seed=4, empty=0.0)
    pixels[:, :192] = field.pixels(Box(0, 0, shape[0], 192))
    return pixels.astype(np.uint16)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """Nuclei on the left, and a single one in the background on the right."""
    pixels = nuclei_on_the_left((192, 576), noise=40)
    pixels[150:170, 500:520] = pixels[100:120, 100:120]
    path = tmp_path_factory.mktemp("in") / "field.tif"
    tifffile.imwrite(path, pixels)
    return path


def probabilities_of(out: Path, name: str = "field") -> zarr.Array:
    return zarr.open_array(out / ".segpipe" / f"{name}.work" / "probabilities.zarr", mode="r")


def facts(out: Path, name: str = "field") -> dict:
    return json.loads((out / "manifests" / f"{name}.infer.json").read_text())["facts"]


def both(image: Path, model: Path, out: Path, *settings: str) -> tuple[Path, Path]:
    """Results with tiles skipped, and without."""
    chosen = (f"infer.model={model}", *settings)
    assert run(image, out / "with", *chosen).exit_code == 0
    assert run(image, out / "without", *chosen, "infer.skip_empty=false").exit_code == 0
    return out / "with", out / "without"


@pytest.fixture(scope="module")
def results(image, model, tmp_path_factory):
    return both(image, model, tmp_path_factory.mktemp("out"))


def test_labels_and_table_are_the_same(results):
    with_skips, without = results
    labels = labels_of(with_skips, "field")
    assert labels.max() > 10
    np.testing.assert_array_equal(labels, labels_of(without, "field"))
    assert table_of(with_skips, "field").equals(table_of(without, "field"))


def test_what_is_skipped_is_zero_and_was_below_the_rule(results):
    skipped, whole = (probabilities_of(out)[:] for out in results)
    found = facts(results[0])
    assert 0.2 < found["tiles_skipped"] / found["tiles"] < 0.9
    assert facts(results[1])["tiles_skipped"] == 0
    changed = (skipped != whole).any(axis=0)
    assert changed.any()
    assert not skipped[:, changed].any()
    assert whole[0][changed].max() < 255 * RULE.foreground
    tiles = 0
    for y in range(0, whole.shape[1], CORE):
        for x in range(0, whole.shape[2], CORE):
            part = np.s_[:, y : y + CORE, x : x + CORE]
            if not np.array_equal(skipped[part], whole[part]):
                assert not skipped[part].any()
                tiles += 1
    assert 0 < tiles <= found["tiles_skipped"]


@pytest.mark.parametrize("region", [CORE, CORE * 4])
def test_regions_and_their_order_do_not_decide(image, model, results, tmp_path, region):
    sizes = (f"infer.model={model}", f"tile.region={region}")
    assert run(image, tmp_path, *sizes).exit_code == 0
    np.testing.assert_array_equal(probabilities_of(tmp_path)[:], probabilities_of(results[0])[:])
    assert facts(tmp_path)["tiles_skipped"] == facts(results[0])["tiles_skipped"]


def test_a_region_of_nothing_is_neither_read_nor_written(
    image, model, results, tmp_path, monkeypatch
):
    assert run(image, tmp_path, f"infer.model={model}", stages=("tile",)).exit_code == 0
    read = []

    def reading(path, box, *more):
        read.append(box)
        return read_box(path, box, *more)

    monkeypatch.setattr("segpipe.stages.reading.read_box", reading)
    assert run(image, tmp_path, f"infer.model={model}", stages=("infer",)).exit_code == 0
    probabilities = probabilities_of(tmp_path)[:]
    regions = Lattice(probabilities.shape[1:], (2 * CORE, 2 * CORE))
    held = [one.box for one in regions if probabilities[:, *one.box.slices].any()]
    shards = tmp_path / ".segpipe" / "field.work" / "probabilities.zarr" / "c"
    assert 0 < len(held) < len(regions)
    assert len(read) == len(held) == sum(path.is_file() for path in shards.rglob("*"))
    np.testing.assert_array_equal(probabilities, probabilities_of(results[0])[:])
    again = run(image, tmp_path, f"infer.model={model}", stages=("infer",))
    assert [one.status for one in again.images] == ["skipped"]


def test_the_share_is_told(image, model, tmp_path, caplog):
    caplog.set_level("INFO", logger="segpipe")
    result = run(image, tmp_path, f"infer.model={model}")
    found = facts(tmp_path)
    assert (result.images[0].tiles, result.images[0].tiles_skipped) == (
        found["tiles"],
        found["tiles_skipped"],
    )
    told = json.loads((tmp_path / "run.json").read_text())["images"]["field"]
    assert told["tiles_skipped"] == found["tiles_skipped"]
    assert told["plan"]["skip_empty"] is True
    share = 100 * found["tiles_skipped"] / found["tiles"]
    assert f"{share:.1f} % of {found['tiles']} tiles hold nothing" in caplog.text


def test_a_model_without_a_rule_skips_nothing(image, tmp_path):
    assert run(image, tmp_path).exit_code == 0
    assert facts(tmp_path)["tiles_skipped"] == 0
    assert facts(tmp_path)["plan"]["skip_empty"] is False


def test_in_memory_as_from_a_file(image, model, results):
    settings = load_settings(None, [*SIZES, f"infer.model={model}"])
    labels = segpipe.segment(tifffile.imread(image), str(model), settings)
    np.testing.assert_array_equal(labels, labels_of(results[0], "field"))


def test_floats_and_what_is_not_finite(image, model, results, tmp_path):
    pixels = tifffile.imread(image).astype(np.float32) - 300
    pixels[20, 300] = np.nan
    tifffile.imwrite(tmp_path / "field.tif", pixels)
    with_skips, without = both(tmp_path / "field.tif", model, tmp_path)
    assert 0 < facts(with_skips)["tiles_skipped"] < facts(results[0])["tiles_skipped"]
    np.testing.assert_array_equal(labels_of(with_skips, "field"), labels_of(without, "field"))


def test_cores_that_no_cells_fit_are_all_seen(image, model, tmp_path):
    sizes = ("tile.chunk=50", "tile.core=50", "tile.region=100", f"infer.model={model}")
    assert run(image, tmp_path, *sizes).exit_code == 0
    assert facts(tmp_path)["tiles_skipped"] == 0


def test_a_threshold_below_the_rule_is_refused(image, model, tmp_path):
    low = (f"infer.model={model}", "stitch.foreground=0.05")
    with pytest.raises(SettingsError, match=r"0\.05 is below 0\.1.*infer\.skip_empty=false"):
        run(image, tmp_path, *low)
    assert run(image, tmp_path, *low, "infer.skip_empty=false").exit_code == 0
    with pytest.raises(SettingsError, match="below"):
        segpipe.segment(np.zeros((9, 9), np.uint8), str(model), load_settings(None, [*SIZES, *low]))


# --- the shipped model ----------------------------------------------------------------------------

SPARSE = "c15c652c08153fb781a5349123ab8f80bb2a8680a41eb8e89e547ae01b7a5441"
REAL = sorted(
    (Path(__file__).parents[2] / "shared/data/dsb2018/train/images").glob(f"{SPARSE}.tif")
)


@pytest.mark.parametrize("path", [None, *REAL], ids=lambda path: path.stem[:8] if path else "made")
def test_the_shipped_model_loses_no_object(path, monkeypatch):
    """Over a sparse field that there may be beside the checkout, and one that is made."""
    pixels = nuclei_on_the_left((192, 640), noise=25) if path is None else tifffile.imread(path)
    skipped = []

    def counting(block, read_box, grid, region, ranges, segmenter, skip):
        skipped.append(sum(skip(tile) for tile in grid))
        return predict_region(block, read_box, grid, region, ranges, segmenter, skip)

    monkeypatch.setattr(memory, "predict_region", counting)
    labels = [
        segpipe.segment(
            pixels,
            settings=load_settings(
                None, ("tile.core=128", "tile.chunk=128", f"infer.skip_empty={skip}")
            ),
        )
        for skip in ("true", "false")
    ]
    assert labels[0].max() > 3
    assert skipped[0] > 0 == skipped[1]
    np.testing.assert_array_equal(*labels)


# --- the measurement ------------------------------------------------------------------------------


class Edges:
    """Not a network: sees a pixel whose 3 x 3 neighbours differ by `height`."""

    outputs = ("foreground",)
    batch, halo, stride, context = 1, 8, 1, 5

    def __init__(self, height):
        self.height = height
        self.card = read_card(threshold_model())

    def __call__(self, windows):
        around = np.lib.stride_tricks.sliding_window_view(
            np.pad(windows, ((0, 0), (0, 0), (1, 1), (1, 1)), "edge"), (3, 3), (-2, -1)
        )
        span = around.max((-2, -1)) - around.min((-2, -1))
        return np.where(span >= self.height, FOREGROUND, 0).astype(np.float32)


def test_the_rule_lies_below_whatever_the_network_sees():
    random = np.random.default_rng(0)
    images = [random.random((1, 40, 56), np.float32) ** 8 for _ in range(3)]
    rule = calibrate(Edges(0.05), images)
    assert rule.foreground == FOREGROUND
    assert 2 * rule.contrast + 0.002 >= 0.05  # what is seen differs by so much from pixel to pixel
    assert rule.contrast < 0.1
    with pytest.raises(ModelError, match="sees no object"):
        calibrate(Edges(5.0), images)


def test_contrast_about_a_pixel_by_the_plain_version():
    image = np.random.default_rng(1).random((2, 24, 30), np.float32)
    context = 9
    found = contrast_about(image, context)
    border = 16
    padded = np.pad(image, ((0, 0), (border, border), (border, border + 2)), "reflect")
    for y, x in [(0, 0), (5, 29), (23, 3), (12, 17)]:
        expected = 0.0
        for plane in padded:
            for k in SCALES:
                means = plane.reshape(plane.shape[0] // k, k, -1, k).mean((1, 3))
                rows = slice((y + border - context) // k, (y + border + context) // k + 1)
                columns = slice((x + border - context) // k, (x + border + context) // k + 1)
                expected = max(expected, k * np.ptp(means[rows, columns]))
        assert found[y, x] == pytest.approx(expected, rel=1e-5)
