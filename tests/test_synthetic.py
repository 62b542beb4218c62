"""Synthetic fields: a function of coordinates alone, and a truth that deserves the name."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import cc3d
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.demo import real_image, write_field
from segpipe.errors import SettingsError
from segpipe.geometry import Box, Lattice
from segpipe.synthetic import PIECE, NucleiField

HUGE = NucleiField((120_000, 110_000), seed=3)
SMALL = NucleiField((700, 650), seed=5, empty=0.2)
DENSE = NucleiField((1500, 1500), seed=2, spacing=20, touching=0.8, empty=0.0)


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[Box, Box]:
    """Two boxes of up to 150 pixels that overlap, anywhere in HUGE, borders included."""
    starts, stops = [], []
    for size in HUGE.shape:
        middle = draw(st.one_of(st.integers(0, size - 1), st.sampled_from([0, PIECE, size - 1])))
        for _ in range(2):
            starts.append(max(middle - draw(st.integers(0, 150)), 0))
            stops.append(min(middle + draw(st.integers(1, 150)), size))
    return (
        Box(starts[0], starts[2], stops[0], stops[2]),
        Box(starts[1], starts[3], stops[1], stops[3]),
    )


@settings(max_examples=60, deadline=None)
@given(two_boxes())
def test_overlapping_boxes_agree_to_the_byte(boxes: tuple[Box, Box]) -> None:
    a, b = boxes
    common = a.intersect(b)
    assert common.area
    for made in (HUGE.pixels, HUGE.labels):
        from_a, from_b = made(a)[common.within(a).slices], made(b)[common.within(b).slices]
        assert from_a.tobytes() == from_b.tobytes()


@pytest.mark.parametrize(
    "field",
    [
        SMALL,
        NucleiField((300, 340), seed=1, blur=6.0, spacing=40, radius=(10.0, 60.0), touching=1.0),
        NucleiField((300, 340), seed=8, dtype="uint8", density=1.0, spacing=12, empty=0.0),
    ],
)
def test_field_is_the_sum_of_its_parts(field: NucleiField) -> None:
    # Wide blur and large nuclei: what reaches a box from furthest must still be found.
    pixels, labels = field.pixels(field.box), field.labels(field.box)
    assert labels.any()
    for cell in Lattice(field.shape, (41, 59)):
        np.testing.assert_array_equal(field.pixels(cell.box), pixels[cell.box.slices])
        np.testing.assert_array_equal(field.labels(cell.box), labels[cell.box.slices])


def test_box_larger_than_a_piece() -> None:
    box = Box(40_000, 50_000, 40_000 + PIECE + 40, 50_000 + PIECE + 70)
    pixels, labels = HUGE.pixels(box), HUGE.labels(box)
    corner = Box(box.y1 - 90, box.x1 - 130, box.y1, box.x1)
    np.testing.assert_array_equal(pixels[-90:, -130:], HUGE.pixels(corner))
    np.testing.assert_array_equal(labels[-90:, -130:], HUGE.labels(corner))


def test_rows_put_together_are_the_field() -> None:
    strips = list(SMALL.rows(256))
    assert [box.shape for box, _ in strips] == [(256, 650), (256, 650), (188, 650)]
    whole = np.concatenate([pixels for _, pixels in strips])
    np.testing.assert_array_equal(whole, SMALL.pixels(SMALL.box))


def test_same_bytes_on_every_machine() -> None:
    # Pinned: whoever changes what a field looks like changes these, and says so.
    box = Box(60_000, 70_000, 60_300, 70_300)
    assert zlib.crc32(HUGE.labels(box).astype("<u4").tobytes()) == 35158649
    assert zlib.crc32(HUGE.pixels(box).astype("<u2").tobytes()) == 2408482781


@pytest.mark.parametrize("field", [SMALL, DENSE])
def test_truth_has_one_piece_per_nucleus(field: NucleiField) -> None:
    labels = field.labels(field.box)
    ids, centres = field.centres(field.box)
    assert field.count() == len(ids) == len(set(ids.tolist())) == len(np.unique(labels)) - 1
    pieces = cc3d.connected_components(labels, connectivity=4)
    assert pieces.max() == len(ids)
    nearest = np.floor(centres + 0.5).astype(np.int64)
    np.testing.assert_array_equal(labels[nearest[:, 0], nearest[:, 1]], ids)


def test_nuclei_have_the_asked_size() -> None:
    field = NucleiField((2000, 2000), radius=(8.0, 11.0), touching=0.0)
    labels = field.labels(field.box)
    inner = np.setdiff1d(labels, [labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    radius = np.sqrt(np.bincount(labels.ravel())[inner] / np.pi)
    assert 0.97 * 8 < radius.min() < radius.max() < 1.03 * 11


def _share_that_touches(labels: np.ndarray) -> float:
    pairs = [(labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])]
    meeting = [np.stack([a, b])[:, (a != b) & (a > 0) & (b > 0)] for a, b in pairs]
    return len(np.unique(np.concatenate(meeting, axis=None))) / (len(np.unique(labels)) - 1)


def test_touching_is_what_was_asked_for() -> None:
    shares = [
        _share_that_touches(field.labels(field.box))
        for field in (NucleiField((1500, 1500), touching=share) for share in (0.0, 0.4, 0.8))
    ]
    assert shares[0] < 0.01
    assert 0.2 < shares[1] < 0.45
    assert 0.5 < shares[2] < 0.85


def test_empty_share_is_bare_at_every_size() -> None:
    for shape in ((400, 400), (4000, 3000)):
        bare = NucleiField(shape, empty=1.0)
        assert bare.count() == 0
        assert not bare.labels(Box(0, 0, 300, 300)).any()
        full, half = NucleiField(shape, empty=0.0).count(), NucleiField(shape, empty=0.5).count()
        assert 0.3 * full < half < 0.7 * full


def test_nuclei_are_bright_and_background_is_noisy() -> None:
    pixels, labels = SMALL.pixels(SMALL.box).astype(float), SMALL.labels(SMALL.box)
    assert np.median(pixels[labels > 0]) > 5 * np.median(pixels[labels == 0])
    silent = NucleiField(SMALL.shape, seed=5, empty=0.2, noise=0.0)
    noise = pixels - silent.pixels(SMALL.box)
    assert abs(noise[labels == 0].mean()) < 1.0
    # Photon noise: variance 144 + 6 per count.
    bright = silent.pixels(SMALL.box) > 3000
    assert np.var(noise[bright]) == pytest.approx(
        144 + 6 * silent.pixels(SMALL.box)[bright].mean(), rel=0.1
    )
    neighbours = np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]
    assert abs(neighbours) < 0.02


def test_uint8_is_the_same_picture() -> None:
    small = NucleiField(SMALL.shape, seed=5, empty=0.2, dtype="uint8")
    pixels = small.pixels(small.box)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.minimum(SMALL.pixels(SMALL.box) // 64, 255))


def test_another_seed_is_another_field() -> None:
    other = NucleiField(SMALL.shape, seed=6, empty=0.2)
    assert (other.pixels(other.box) != SMALL.pixels(SMALL.box)).mean() > 0.9


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (13, 17)])
def test_ragged_shapes(shape: tuple[int, int]) -> None:
    field = NucleiField(shape, empty=0.0)
    assert field.pixels(field.box).shape == field.labels(field.box).shape == shape
    assert field.pixels(Box(0, 0, 0, 1)).shape == (0, 1)


def test_box_outside_the_field_is_refused() -> None:
    for made in (SMALL.pixels, SMALL.labels, SMALL.centres):
        with pytest.raises(ValueError, match=r"\[0:10, 645:655\] is not inside"):
            made(Box(0, 645, 10, 655))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"shape": (0, 5)}, "shape"),
        ({"seed": -1}, "seed"),
        ({"radius": (9.0, 8.0)}, "radius"),
        ({"spacing": 6}, "spacing"),
        ({"radius": (9.0, 60.0)}, "spacing"),
        ({"touching": 1.5}, "touching"),
        ({"empty": -0.1}, "empty"),
        ({"blur": 0.0}, "blur"),
        ({"noise": -1.0}, "noise"),
        ({"structure": 2}, "structure"),
        ({"dtype": "float32"}, "dtype"),
        ({"shape": (10**6, 10**6)}, "uint32"),
    ],
)
def test_wrong_parameters_are_named(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        NucleiField(**{"shape": (100, 100), **wrong})  # type: ignore[arg-type]


def test_written_field_reads_back(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    path, truth = tmp_path / "deep" / "field.tif", tmp_path / "truth.tif"
    write_field(
        SMALL, path, tile=128, truth=truth, progress=lambda done, total: calls.append((done, total))
    )
    np.testing.assert_array_equal(tifffile.imread(path), SMALL.pixels(SMALL.box))
    np.testing.assert_array_equal(tifffile.imread(truth), SMALL.labels(SMALL.box))
    assert calls == [(n, 72) for n in range(1, 73)]
    with tifffile.TiffFile(path) as opened:
        page = opened.pages[0]
        assert page.is_tiled and page.tile == (128, 128) and not opened.is_bigtiff
        # 20,000 pixels per centimetre are half a micrometre each.
        assert page.tags["XResolution"].value == page.tags["YResolution"].value == (20_000, 1)
        assert page.tags["ResolutionUnit"].value == 3
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "field.tif", "truth.tif"]


def test_wide_field_is_written_in_several_blocks(tmp_path: Path) -> None:
    field = NucleiField((40, 9000), seed=1, empty=0.0, dtype="uint8")
    write_field(field, tmp_path / "wide.tif", compression=None)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "wide.tif"), field.pixels(field.box))


def test_failed_writing_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "field.tif"
    path.write_bytes(b"before")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_field(SMALL, path, progress=stop)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(SettingsError, match="multiple of 16"):
        write_field(SMALL, path, tile=100)


def test_real_image_is_bright_nuclei_on_dark(tmp_path: Path) -> None:
    real_image(tmp_path / "real.tif")
    pixels = tifffile.imread(tmp_path / "real.tif")
    assert pixels.shape == (512, 512) and pixels.dtype == np.uint16
    assert pixels.max() < 65535  # nothing was clipped
    assert np.percentile(pixels, 99) > 4 * np.median(pixels)


def test_real_image_without_scikit_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(SettingsError, match=r"segpipe\[demo\]"):
        real_image(tmp_path / "real.tif")
