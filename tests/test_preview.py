"""The picture of a result: its parts against plain versions, its frame at every shape of image."""

from __future__ import annotations

import io
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.segmentation import find_boundaries

from segpipe.export.drawing import colours, contrast, draw_outlines, draw_overview, outline
from segpipe.export.png import encode_png, write_png
from segpipe.export.preview import (
    HEIGHT,
    WIDTH,
    Caption,
    Plan,
    View,
    choose_detail,
    compose,
)
from segpipe.geometry import Box
from segpipe.synthetic import NucleiField


def blank(labels: np.ndarray, grey: int = 40) -> np.ndarray:
    return np.full((*labels.shape, 3), grey, np.uint8)


def discs(shape: tuple[int, int], radius: int, pitch: int) -> np.ndarray:
    """Labels of discs on a square lattice."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    ids = 1 + (y // pitch) * -(-shape[1] // pitch) + x // pitch
    inside = (y % pitch - pitch // 2) ** 2 + (x % pitch - pitch // 2) ** 2 <= radius**2
    return np.where(inside, ids, 0).astype(np.uint32)


# contrast


def test_grey_runs_from_low_to_high_and_is_clipped() -> None:
    pixels = np.array([[[0, 100, 200, 300, 1000]]], np.uint16)
    shown = contrast(pixels, [(100, 300)], rgb=False)
    assert shown.dtype == np.uint8
    assert shown[0].tolist() == [[0] * 3, [0] * 3, [128] * 3, [255] * 3, [255] * 3]


def test_rgb_at_full_range_is_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 7), dtype=np.uint8)
    shown = contrast(pixels, [(0, 255)] * 3, rgb=True)
    np.testing.assert_array_equal(shown, np.moveaxis(pixels, 0, -1))


def test_channels_have_colours_of_their_own() -> None:
    seen = set()
    for channel in range(4):
        pixels = np.zeros((4, 1, 1))
        pixels[channel] = 1
        seen.add(tuple(contrast(pixels, [(0, 1)] * 4, rgb=False)[0, 0].tolist()))
    assert len(seen) == 4
    assert contrast(np.ones((9, 2, 2)), [(0, 1)] * 9, rgb=False).max() == 255


def test_gamma_lifts_the_dark_parts() -> None:
    pixels = np.array([[[0.0, 0.25, 1.0]]])
    shown = contrast(pixels, [(0, 1)], rgb=False, gamma=0.5)
    assert shown[0, :, 0].tolist() == [0, 128, 255]


def test_odd_values_are_shown_as_something() -> None:
    pixels = np.array([[[np.nan, np.inf, -np.inf, 5.0]]], np.float32)
    assert contrast(pixels, [(0, 10)], rgb=False)[0, :, 0].tolist() == [0, 255, 0, 128]
    constant = contrast(pixels, [(5, 5)], rgb=False)
    assert constant[0, [0, 2, 3], 0].tolist() == [0, 0, 0]


def test_ranges_must_fit_the_channels() -> None:
    with pytest.raises(ValueError, match="2 channels, 1 ranges"):
        contrast(np.zeros((2, 3, 3)), [(0, 1)], rgb=False)
    with pytest.raises(ValueError, match="rgb True"):
        contrast(np.zeros((2, 3, 3)), [(0, 1)] * 2, rgb=True)


# outlines and colours


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_outline_is_that_of_scikit_image(height: int, width: int, most: int, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, most + 1, (height, width))
    expected = find_boundaries(labels, connectivity=1, mode="inner")
    np.testing.assert_array_equal(outline(labels), expected)


def test_border_of_the_array_is_no_edge() -> None:
    assert not outline(np.ones((5, 6), np.uint32)).any()
    assert not outline(np.zeros((5, 6), np.uint32)).any()


def test_colours_are_stable_and_distinct() -> None:
    ids = np.arange(1, 2000, dtype=np.uint32)
    table = colours(ids)
    assert table.shape == (1999, 3) and table.dtype == np.uint8
    np.testing.assert_array_equal(colours(ids[::-1].astype(np.int64)), table[::-1])
    np.testing.assert_array_equal(colours(np.array([2**32 - 2])), colours(np.array([2**32 - 2])))
    _, counts = np.unique(table, axis=0, return_counts=True)
    assert len(counts) >= 8 and counts.max() < 3 * counts.min()
    # Neighbours in raster order have neighbouring ids.
    assert (table[1:] == table[:-1]).all(axis=1).mean() < 0.2


def test_colours_stand_out_from_grey_black_white_and_stain() -> None:
    table = colours(np.arange(1, 500)).astype(int)
    assert np.ptp(table, axis=1).min() > 80  # saturated: no grey of any level
    assert table.max(axis=1).min() > 150  # bright enough for a dark ground
    for stain in ((225, 150, 200), (90, 50, 130), (255, 255, 255)):
        assert np.abs(table - stain).sum(axis=1).min() > 100


def test_outlines_lie_inside_the_objects_and_have_their_width() -> None:
    labels = np.zeros((20, 20), np.uint32)
    labels[4:16, 4:10], labels[4:16, 10:16] = 1, 2
    display = blank(labels)
    before = display.copy()
    thin, thick = (draw_outlines(display, labels, width) for width in (1, 2))
    np.testing.assert_array_equal(display, before)
    changed = (thick != display).any(axis=2)
    assert not changed[labels == 0].any()
    assert (thick[4:16, 9] == colours(np.array([1]))).all()
    assert (thick[4:16, 10] == colours(np.array([2]))).all()
    assert changed[10].sum() == 8 and (thin != display).any(axis=2)[10].sum() == 4


def test_overview_outlines_large_fills_small_and_blurs_dust() -> None:
    large, small, dust = discs((90, 90), 12, 30), discs((90, 90), 3, 9), discs((90, 90), 0, 3)
    drawn = [(draw_overview(blank(a), a) != blank(a)).any(axis=2) for a in (large, small, dust)]
    np.testing.assert_array_equal(drawn[0], outline(large))
    np.testing.assert_array_equal(drawn[1], small > 0)
    assert drawn[2].all()
    nothing = np.zeros((5, 5), np.uint32)
    np.testing.assert_array_equal(draw_overview(blank(nothing), nothing), blank(nothing))
    # The denser, the stronger.
    half = dust.copy()
    half[:, 45:] = 0
    tinted = draw_overview(blank(half), half)
    assert tinted[:, :40, 1].mean() > tinted[:, 50:, 1].mean() + 5


# plan and choice of the detail

SHAPES = [
    (1, 1), (1, 900), (900, 1), (7, 5), (384, 385), (386, 386), (769, 500), (771, 4000),
    (2000, 8000), (5000, 5001), (100_000, 100_000), (100, 100_000), (100_000, 100), (10, 10**7),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_plan_reads_little_and_enough(shape: tuple[int, int]) -> None:
    plan = Plan.of(shape)
    level = [-(-n // plan.step) for n in shape]
    assert plan.step & (plan.step - 1) == 0
    assert level[0] * level[1] < 5_000_000
    assert max(level) >= min(max(shape), 385)
    assert all(1 <= d <= n for d, n in zip(plan.detail, shape, strict=True))
    assert plan.detail[0] * plan.detail[1] <= 385 * 780


def test_detail_is_where_the_objects_are() -> None:
    labels = np.zeros((100, 120), np.uint32)
    labels[60:90, 80:110] = discs((30, 30), 3, 10)
    box = choose_detail(labels, (800, 960), (240, 240))  # one pixel of the labels is 8 of the image
    assert box.shape == (240, 240)
    assert box.contains(Box(62 * 8, 82 * 8, 89 * 8, 109 * 8))


def test_detail_of_an_even_image_is_its_middle() -> None:
    for value in (0, 1):
        box = choose_detail(np.full((50, 50), value, np.uint32), (400, 400), (100, 100))
        assert box == Box(150, 150, 250, 250)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_detail_is_inside_the_image(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 300), st.integers(1, 300)))
    step = data.draw(st.sampled_from([1, 2, 7, 64]))
    detail = tuple(data.draw(st.integers(1, n)) for n in shape)
    labels = np.random.default_rng(0).integers(0, 3, [-(-n // step) for n in shape])
    box = choose_detail(labels, shape, (detail[0], detail[1]))
    assert box.shape == detail
    assert Box(0, 0, *shape).contains(box)


# the whole picture


def made(shape: tuple[int, int], caption: Caption, grey: int = 40) -> np.ndarray:
    """The picture of discs, drawn from what the plan asks for."""
    plan = Plan.of(shape)
    overview = discs(tuple(-(-n // plan.step) for n in shape), 8, 20)
    box = choose_detail(overview, shape, plan.detail)
    detail = discs(plan.detail, 8, 20)
    return compose(
        View(blank(overview, grey), overview, Box(0, 0, *shape)),
        View(blank(detail, grey), detail, box),
        caption,
    )


@pytest.mark.parametrize("pixel_size_um", [None, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_picture_of_every_shape_fits(shape: tuple[int, int], pixel_size_um: float | None) -> None:
    picture = made(shape, Caption("image.tif", 1234, pixel_size_um))
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    assert 100 < picture.shape[0] <= HEIGHT and 600 < picture.shape[1] <= WIDTH
    # Both panels are there, and can be seen.
    panel = (picture == 40).all(axis=2)
    assert panel.sum() > 500


@pytest.mark.parametrize(
    "title",
    ["", "a" * 5000, "プレビュー_αβγ_🙂.tif", "bad\udcff\x00\n\tname", "naïve café.tif", "א" * 900],
)
def test_any_name_can_be_written(title: str) -> None:
    caption = Caption(title, 0, 0.25, [title, "device cuda"])
    picture = made((300, 500), caption)
    assert picture.shape[1] <= WIDTH
    # Nothing runs into the margin on the right.
    assert (picture[:70, -15:] == picture[0, 0]).all()


def test_detail_is_framed_where_it_is() -> None:
    shape = (2000, 2000)
    labels = np.zeros((1000, 1000), np.uint32)
    detail = np.zeros((385, 385), np.uint32)
    box = Box(1200, 300, 1585, 685)
    whole = Box(0, 0, *shape)
    caption = Caption("x", 0)
    picture = compose(View(blank(labels), labels, whole), View(blank(detail), detail, box), caption)
    scale = 770 / 2000
    ys, xs = np.nonzero((picture[74:700, 20:600] == 255).all(axis=2))  # above the scale bar
    frame = np.array([box.y0, box.y1, box.x0, box.x1]) * scale
    np.testing.assert_allclose([ys.min(), ys.max(), xs.min(), xs.max()], frame, atol=3)


def test_detail_shows_its_pixels_enlarged_and_outlined() -> None:
    field = NucleiField((900, 900), seed=4, empty=0.0)
    box = Box(100, 200, 485, 585)
    display = contrast(field.pixels(field.box)[None], [(200, 8000)], rgb=False)
    labels = field.labels(field.box)
    picture = compose(
        View(display, labels, field.box),
        View(display[box.slices], labels[box.slices], box),
        Caption("field", field.count(), 0.5),
    )
    panel = picture[74 : 74 + 770, 810 : 810 + 770]
    twice = np.kron(labels[box.slices], np.ones((2, 2), np.uint32))
    expected = draw_outlines(np.repeat(np.repeat(display[box.slices], 2, 0), 2, 1), twice, 2)
    np.testing.assert_array_equal(panel[:700], expected[:700])  # above the scale bar


def test_small_image_is_shown_bare_and_with_objects() -> None:
    labels = discs((100, 100), 8, 20)
    view = View(blank(labels), labels, Box(0, 0, 100, 100))
    picture = compose(view, view, Caption("x", 25))
    left, right = picture[74:374, 20:320], picture[74:374, 340:640]
    assert (left[:240] == 40).all()
    assert (right[:240] != 40).any(axis=2).mean() > 0.02


def scale_bar(picture: np.ndarray, x0: int, x1: int) -> int:
    """Pixels of the longest white run in the lower part of the panel at these columns."""
    rows = (picture[74 + 770 - 60 : 74 + 770, x0:x1] == 255).all(axis=2)
    return max(int(row.sum()) for row in rows)


def test_scale_bars_have_the_length_they_say() -> None:
    # 4200 px of .5 um on 770: 500 um are less than a quarter; 385 px on 770: 20 um are.
    picture = made((4200, 4200), Caption("x", 1, 0.5), grey=0)
    assert scale_bar(picture, 400, 790) == pytest.approx(770 * 500 / 2100, abs=1.5)
    assert scale_bar(picture, 1300, 1580) == pytest.approx(20 / 0.25, abs=1.5)
    # Of pixels where the pixel size is not known: 1,000 of 4,200 and 50 of 385.
    picture = made((4200, 4200), Caption("x", 1), grey=0)
    assert scale_bar(picture, 400, 790) == pytest.approx(770 * 1000 / 4200, abs=1.5)
    assert scale_bar(picture, 1300, 1580) == pytest.approx(100, abs=1.5)


def test_view_must_match_itself() -> None:
    with pytest.raises(ValueError, match="do not match"):
        View(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5), np.uint32), Box(0, 0, 4, 4))


def test_note_of_a_strip_has_room() -> None:
    picture = made((100_000, 100), Caption("x", 1))
    columns = np.flatnonzero((picture[74:800] == 40).all(axis=2).any(axis=0))
    strip, detail = np.split(columns, [np.argmax(np.diff(columns)) + 1])
    assert len(strip) == 16 and len(detail) == 200
    written = np.flatnonzero((picture[845:] != picture[0, 0]).any(axis=(0, 2)))
    assert not ((written > detail[0] - 12) & (written < detail[0] - 1)).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (300, 200)])
def test_png_is_read_as_it_was_by_programs_of_others(shape: tuple[int, int]) -> None:
    for seed in range(3):
        picture = np.random.default_rng(seed).integers(0, 3**seed + 1, (*shape, 3), np.uint8)
        data = encode_png(picture)
        np.testing.assert_array_equal(imagecodecs.png_decode(data), picture)
        with Image.open(io.BytesIO(data)) as opened:
            opened.verify()  # checksums too


def test_png_replaces_what_was_there_and_leaves_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.png"
    path.write_bytes(b"old")
    picture = made((50, 60), Caption("x", 0))
    write_png(path, picture)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(np.asarray(opened), picture)
    assert list(tmp_path.iterdir()) == [path]
    size = path.stat().st_size

    write_bytes = Path.write_bytes

    def full(target: Path, content: bytes) -> None:
        write_bytes(target, content[: len(content) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write_png(path, picture)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_size == size


@pytest.mark.parametrize("side", [512, 700, 3000])
def test_nothing_lies_on_the_detail_but_its_scale_bar(side: int) -> None:
    """The line under the overview, which may be the smaller one, ends before it."""
    whole, box = Box(0, 0, side, side), Box(0, 0, 385, 385)
    overview, detail = np.zeros((min(side, 750),) * 2, int), np.zeros((385, 385), int)
    picture = compose(
        View(blank(overview), overview, whole),
        View(blank(detail, 200), detail, box),
        Caption("x", 0),
    )
    shown = (picture == 200).all(axis=2)
    rows = np.flatnonzero(shown.sum(axis=1) > 300)
    columns = np.flatnonzero(shown.sum(axis=0) > 300)
    assert len(rows) >= 2 * 385 and rows[-1] - rows[0] + 1 == len(rows)
    panel = shown[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert panel[:-60].all() and panel[:, :100].all()
