"""`segpipe evaluate`: what it pairs, reads, tells, writes and refuses."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image

from fields import labels_of, nuclei, run
from segpipe.cli import main
from segpipe.errors import InputError, SettingsError
from segpipe.evaluate import Scores, score_image, score_images
from segpipe.evaluation import pair_labels, score_files
from segpipe.export.comparison import PANEL, PREDICTED, TRUTH, Case, compose_cases
from segpipe.geometry import Box
from segpipe.labels import LabelFile, LabelImage, find_labels
from segpipe.mistakes import Mistakes, densest_boxes
from segpipe.overlaps import Overlaps
from segpipe.stages.manifest import Manifest
from segpipe.stages.places import manifest_path
from segpipe.store import LABEL_GROUP, Grid, create_image, create_labels, write_shard
from segpipe.worst_cases import Scored, rank


def squares(*corners, shape=(48, 64), side=10):
    """(Y, X) uint16: squares with ids 1, 2, ... at these (y, x)."""
    labels = np.zeros(shape, np.uint16)
    for number, (y, x) in enumerate(corners):
        labels[y : y + side, x : x + side] = number + 1
    return labels


WHOLE = squares((2, 2), (2, 20), (20, 2), (20, 12), (34, 40))
FOUND = squares((2, 3), (20, 2), (34, 20))  # one found, one false, and one that becomes fused
FOUND[20:30, 12:22] = 2
FOUND[34:44, 40:45], FOUND[34:44, 45:50] = 4, 5  # halves


@pytest.fixture
def told():
    """Lines that are logged, whoever else has set up logging."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("segpipe.evaluation")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def evaluate(*arguments):
    result = CliRunner().invoke(main, ["evaluate", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def save(path: Path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        Image.fromarray(labels).save(path)
    else:
        tifffile.imwrite(path, labels, photometric="rgb" if labels.ndim == 3 else "minisblack")
    return path


def save_zarr(path: Path, labels, names=("instances",)):
    """An OME-Zarr of an image that has these labels."""
    grid = Grid.fitting(labels.shape, 64, 64)
    create_image(path, ["0"], grid, np.dtype(np.uint8), pixel_size_um=None, name="x", rgb=False)
    create_labels(path, grid, pixel_size_um=None)
    box = Box(0, 0, *labels.shape)
    write_shard(path / "0", box, (labels > 0).astype(np.uint8)[np.newaxis] * 200)
    write_shard(path / LABEL_GROUP / "0", box, labels.astype(np.uint32))
    metadata = path / "labels" / "zarr.json"
    content = json.loads(metadata.read_text())
    content["attributes"]["ome"]["labels"] = list(names)
    metadata.write_text(json.dumps(content))
    for name in set(names) - {"instances"}:
        shutil.copytree(path / LABEL_GROUP, path / "labels" / name)
    if "instances" not in names:
        shutil.rmtree(path / LABEL_GROUP)
    return path


def test_scores_are_told_and_written(tmp_path):
    truth, predicted, out = tmp_path / "truth", tmp_path / "predicted", tmp_path / "scores"
    pairs = {"a": (WHOLE, FOUND), "b": (WHOLE, WHOLE), "deep/c": (WHOLE.T, FOUND.T)}
    for name, (wanted, found) in pairs.items():
        save(truth / f"{name}.tif", wanted.copy())
        save(predicted / f"{name}.png", found.copy())
    result = evaluate(predicted, truth, "-o", out)
    assert result.exit_code == 0
    scores = score_images(pairs.values())
    assert f"{scores.ap(0.5):.3f}" in result.stdout
    assert f"{scores.mean_ap_by_image():.3f}" in result.stdout
    assert "15 objects in the truth" in result.stdout
    assert f"{scores.pooled.missed} missed" in result.stdout

    rows = {
        row["name"]: row for row in csv.DictReader((out / "per_image.csv").read_text().splitlines())
    }
    assert list(rows) == ["a", "b", "deep/c"]
    one = score_image(WHOLE, FOUND)
    assert (one.split, one.fused, one.found) == (1, 1, 3)  # two of them at exactly .5
    for column, value in {
        "true_objects": 5,
        "found": one.found,
        "missed": one.missed,
        "split": 1,
        "fused": 1,
        "ap_55": one.ap(0.55),
        "pq": one.pq,
        "aji_plus": one.aji_plus,
        "dice": one.dice,
    }.items():
        assert float(rows["a"][column]) == pytest.approx(value, abs=1e-6)
    told = json.loads((out / "scores.json").read_text())
    assert told["pooled"]["ap_50"] == scores.ap(0.5)
    assert told["mean_of_images"]["mean_ap_50_90"] == pytest.approx(scores.mean_ap_by_image())
    assert told["not_scored"] == {}
    with Image.open(out / "worst.png") as picture:
        assert picture.size[0] == 1600


def test_bad_inputs_are_each_named_in_a_line_and_the_others_scored(tmp_path, told):
    truth, predicted, out = tmp_path / "truth", tmp_path / "predicted", tmp_path / "scores"
    bad = {
        "rgb": (np.zeros((48, 64, 3), np.uint8), "3 channels"),
        "fractions": (WHOLE * np.float32(0.5), "fractions"),
        "holes": (np.where(WHOLE > 0, WHOLE, np.nan).astype(np.float32), "NaN"),
        "negative": (-WHOLE.astype(np.int32), "negative"),
        "huge": (WHOLE.astype(np.uint64) << np.uint64(33), "4,294,967,295"),
        "smaller": (WHOLE[:-1].copy(), "48 x 64"),
    }
    for name, (labels, _) in bad.items():
        save(truth / f"{name}.tif", WHOLE)
        save(predicted / f"{name}.tif", labels)
    save(truth / "torn.tif", WHOLE)
    (predicted / "torn.tif").write_bytes((truth / "torn.tif").read_bytes()[:200])
    for name in ("good", "lonely"):
        save(truth / f"{name}.tif", WHOLE)
    for name in ("good", "extra"):
        save(predicted / f"{name}.tif", FOUND)
    result = evaluate(predicted, truth, "-o", out)
    assert result.exit_code == 1
    assert len(told) == len(bad) + 3
    for name, words in {
        **{name: words for name, (_, words) in bad.items()},
        "torn": "copy",
        "lonely": "no prediction",
        "extra": "no truth",
    }.items():
        place = name if "no" in words else rf"{predicted}/{name}\.tif: |{name}: truth"
        assert sum(bool(re.search(place, line)) and words in line for line in told) == 1, name
    assert result.stdout.startswith("1 image: 5 objects")
    written = json.loads((out / "scores.json").read_text())
    assert written["not_scored"].keys() == {*bad, "torn", "lonely", "extra"}


def test_a_binary_mask_is_warned_about(tmp_path, told):
    binary = save(tmp_path / "binary.png", (WHOLE > 0).astype(np.uint8) * 255)
    single = save(tmp_path / "single.png", (WHOLE == 1).astype(np.uint8) * 255)
    (one,), (other,) = find_labels(binary), find_labels(single)
    assert score_files(other, other).scores.found == 1
    assert not told
    assert score_files(one, other).scores.true_objects == 1
    assert len(told) == 1 and "binary.png" in told[0] and "several pieces" in told[0]


def test_nothing_to_score_is_an_error_and_nothing_wrong_is_none(tmp_path):
    save(tmp_path / "p" / "a.tif", WHOLE)
    save(tmp_path / "p" / "b.tif", WHOLE)
    save(tmp_path / "t" / "c.tif", WHOLE)
    result = evaluate(tmp_path / "p", tmp_path / "t")
    assert result.exit_code == 2 and "no name agrees" in result.stderr
    assert evaluate(tmp_path / "p", tmp_path / "none").exit_code == 2
    save(tmp_path / "small.tif", WHOLE[:9].copy())
    result = evaluate(tmp_path / "small.tif", tmp_path / "t")
    assert result.exit_code == 1 and "none of the 1 pairs" in result.stderr
    nothing = save(tmp_path / "nothing.tif", np.zeros_like(WHOLE))
    result = evaluate(nothing, nothing, "-o", tmp_path / "scores")
    assert result.exit_code == 0 and "count as 0" in result.stdout
    result = evaluate(nothing, tmp_path / "t" / "c.tif", "-o", tmp_path / "scores")
    assert result.exit_code == 0 and "5 missed" in result.stdout


def test_files_are_paired_by_name_then_by_the_last_part_of_it():
    def files(*names):
        return [LabelFile(name, Path(name)) for name in names]

    found = pair_labels(
        files("a", "x/b", "y/b", "c", "q/d"), files("q/a", "a", "m/b", "x/b", "d", "e")
    )
    # y/b and m/b are what is left of that name, and so belong together.
    assert [(t.name, p.name) for t, p in found.pairs] == [
        ("a", "a"),
        ("d", "q/d"),
        ("m/b", "y/b"),
        ("x/b", "x/b"),
    ]
    assert (found.without_truth, found.without_prediction) == (("c",), ("q/a", "e"))
    assert len(pair_labels(files("a"), files("b")).pairs) == 1
    with pytest.raises(SettingsError, match="no name agrees"):
        pair_labels(files("x/a", "y/a"), files("z/a", "w/a"))


def test_two_files_of_one_name_are_refused(tmp_path):
    save(tmp_path / "a.tif", WHOLE), save(tmp_path / "a.png", WHOLE)
    with pytest.raises(SettingsError, match="both called a"):
        find_labels(tmp_path)


def test_folders_of_images_and_masks_tell_which_is_which(tmp_path):
    image, mask = (
        save(tmp_path / "images" / "a.tif", WHOLE),
        save(tmp_path / "masks" / "a.png", WHOLE),
    )
    for given in (tmp_path, tmp_path / "masks"):
        assert find_labels(given) == [LabelFile("a", mask, image=image)]


def test_an_out_of_predict_is_read_by_its_names(tmp_path):
    out = tmp_path / "out"
    for name in ("a", "b_z0", "c"):
        save_zarr(out / f"{name}.ome.zarr", WHOLE)
    save_zarr(out / "d.ome.zarr", WHOLE)
    registry = out / "manifests" / "images.json"
    registry.parent.mkdir(parents=True, exist_ok=True)
    registry.write_text(json.dumps({name: f"{name}.tif" for name in ("a", "b_z0", "c", "d")}))
    for name in ("a", "b_z0", "d"):
        failed = ({"box": "all"},) if name == "d" else ()
        path = manifest_path(out, name, "stitch")
        Manifest("stitch", "f", "t", failed, {}).write(path)
    files = {one.name: one for one in find_labels(out)}
    assert score_files(files["a"], files["b_z0"]).scores.mean_ap() == 1
    with pytest.raises(InputError, match="c: predict has not finished"):
        LabelImage(files["c"])
    with pytest.raises(InputError, match="d: 1 of its regions failed"):
        LabelImage(files["d"])


@pytest.mark.parametrize("scale", [0.6, 1.7])  # of these no centre is between two
def test_a_run_at_another_resolution_is_scored_at_that_of_the_truth(tmp_path, scale, monkeypatch):
    nuclei(tmp_path / "in" / "field.tif", (150, 200))
    run(tmp_path / "in", tmp_path / "out", f"tile.scale={scale}")
    labels = labels_of(tmp_path / "out", "field")
    y, x = (
        np.array(
            [
                np.abs((np.arange(small) + 0.5) * full / small - 0.5 - f).argmin()
                for f in range(full)
            ]
        )
        for full, small in zip((150, 200), labels.shape, strict=True)
    )  # the nearest centre
    expected = labels[np.ix_(y, x)]
    truth = save(tmp_path / "truth" / "field.tif", expected)
    files = {"full": find_labels(truth)[0], "out": find_labels(tmp_path / "out")[0]}
    for pair in (("full", "out"), ("out", "full")):
        scored = score_files(*(files[one] for one in pair))
        assert (scored.scores.mean_ap(), scored.scores.common) == (1, np.count_nonzero(expected))
    monkeypatch.setattr("segpipe.labels._ROWS", 1)
    monkeypatch.setattr("segpipe.labels.BAND_PIXELS", 1)
    assert score_files(files["full"], files["out"]).scores == scored.scores
    assert evaluate(tmp_path / "out", truth, "-o", tmp_path / "scores").exit_code == 0
    with Image.open(tmp_path / "scores" / "worst.png") as picture:  # the image is found and shown
        assert len(picture.convert("RGB").getcolors(2**20)) > 200
    small = save(tmp_path / "small" / "field.tif", labels.astype(np.uint16))  # as it was before
    assert score_files(find_labels(small)[0], files["out"]).scores.mean_ap() == 1
    wrong = save(tmp_path / "wrong" / "field.tif", expected[1:])
    with pytest.raises(InputError, match=r"149 x 200 pixels, prediction .* the OUT of the run"):
        score_files(find_labels(wrong)[0], files["out"])


def test_an_ome_zarr_gives_its_labels(tmp_path):
    image = save_zarr(tmp_path / "x" / "a.ome.zarr", WHOLE)
    other = save_zarr(tmp_path / "y" / "a.ome.zarr", WHOLE, names=("cells",))
    for given in (tmp_path / "x", image, image / LABEL_GROUP, other):
        (found,) = find_labels(given)
        with LabelImage(found) as opened:
            np.testing.assert_array_equal(opened.read(Box(0, 0, *WHOLE.shape)), WHOLE)
    assert find_labels(image)[0].image == image
    assert evaluate(image, other, "-o", tmp_path / "scores").exit_code == 0
    several = save_zarr(tmp_path / "z" / "a.ome.zarr", WHOLE, names=("cells", "nuclei"))
    with pytest.raises(InputError, match="cells, nuclei"):
        LabelImage(find_labels(several)[0])


def test_planes_of_a_file_are_images(tmp_path):
    stack = np.stack([WHOLE, FOUND, np.zeros_like(WHOLE)])
    path = tmp_path / "stack.tif"
    tifffile.imwrite(path, stack, imagej=True, metadata={"axes": "ZYX"})
    files = find_labels(path)
    assert [one.name for one in files] == ["stack_z0", "stack_z1", "stack_z2"]
    assert score_files(files[0], files[1]).scores == score_image(WHOLE, FOUND)


def test_ids_of_32_bits_are_exact_and_bands_do_not_show(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    wanted = np.kron(rng.integers(0, 9, (20, 8)), np.ones((4, 5))).astype(np.uint32)
    found = np.roll(wanted, 2, 0)
    far = np.where(wanted > 0, wanted + np.uint32(2**32 - 10), 0).astype(np.uint32)
    (truth,) = find_labels(save(tmp_path / "a.tif", far))
    (predicted,) = find_labels(save(tmp_path / "b.tif", found))
    expected = score_image(wanted, found)
    assert score_files(truth, predicted).scores == expected
    monkeypatch.setattr("segpipe.labels.BAND_PIXELS", 1)
    monkeypatch.setattr("segpipe.labels._ROWS", 7)
    assert score_files(truth, predicted).scores == expected
    with LabelImage(truth) as opened:
        assert sum(box.area for box in opened.bands()) == wanted.size


def test_a_mistake_is_told_once():
    found = Mistakes.of(Overlaps.of(WHOLE, FOUND))
    assert {name: ids.tolist() for name, ids in vars(found).items()} == {
        "missed": [2],
        "false": [3],
        "split": [5],  # and its halves 4 and 5 are not false
        "fused": [2],  # and the parts, 3 and 4, are not missed
    }


def test_the_densest_parts_come_first_and_apart():
    density = np.zeros((9, 20), np.int64)
    density[7, 3], density[8, 18], density[0, 0] = 5, 9, 1
    boxes = densest_boxes(density, 10, (85, 198), 5)
    assert [(box.y0 <= y < box.y1, box.x0 <= x < box.x1) for box, (y, x) in
            zip(boxes, [(84, 185), (75, 35), (5, 5)], strict=True)] == [(True, True)] * 3  # fmt: skip
    assert all(Box(0, 0, 85, 198).contains(box) and box.shape == (40, 40) for box in boxes)
    assert len(densest_boxes(np.zeros((1, 1), np.int64), 24, (3, 5), 4)) == 1


def test_the_worst_come_first_and_images_without_objects_last():
    def scored(name, truth, predicted):
        pairs = Overlaps.of(truth, predicted)
        file = LabelFile(name, Path(name))
        return Scored(name, file, file, score_image(truth, predicted), Mistakes.of(pairs), 10.0)

    nothing = np.zeros_like(WHOLE)
    ranked = rank(
        [
            scored("empty", nothing, nothing),
            scored("right", WHOLE, WHOLE),
            scored("one missed", squares((0, 0)), nothing),
            scored("five missed", WHOLE, nothing),
            scored("some", WHOLE, FOUND),
        ]
    )
    assert [one.name for one in ranked] == ["five missed", "one missed", "some", "right", "empty"]


@pytest.mark.parametrize("shape", [(48, 64), (1, 1), (3, 700), (900, 20)])
def test_a_picture_shows_outlines_and_marks(shape):
    truth, found = np.zeros(shape, np.uint32), np.zeros(shape, np.uint32)
    truth[:, : shape[1] // 2], found[:, shape[1] // 2 :] = 7, 8
    mistakes = {name: np.array([], np.int64) for name in ("missed", "false", "split", "fused")}
    mistakes |= {"missed": np.unique(truth[truth > 0]), "false": np.unique(found[found > 0])}
    display = np.full((*shape, 3), 10, np.uint8)
    case = Case("n" * 90, "facts", Box(0, 0, *shape), display, truth, found, mistakes)
    empty = Case("e", "", Box(0, 0, *shape), display, truth * 0, found * 0,
                 {name: np.array([], np.int64) for name in mistakes})  # fmt: skip
    pictures = [compose_cases("title", "facts", [one] * 3) for one in (case, empty)]
    assert all(picture.shape[1] == 1600 for picture in pictures)
    assert pictures[0].shape[0] <= 2 * (PANEL + 60) + 150
    for colour, there in ((TRUTH, truth.any()), (PREDICTED, found.any())):
        with_objects, without = ((one == colour).all(2).sum() for one in pictures)
        assert (with_objects > without) == there


def test_means_of_images_are_of_scores_not_of_counts():
    one, other = score_image(WHOLE, WHOLE), score_image(WHOLE, FOUND)
    scores = Scores((one, other))
    assert scores.by_image(lambda image: image.aji) == pytest.approx((1 + other.aji) / 2)
