"""Tiled inference equals the whole image; it could fail, and does with a smaller halo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from segpipe.backend import BACKENDS
from segpipe.errors import InputError, SettingsError
from segpipe.geometry import Box, Lattice, TileGrid, ceil_to
from segpipe.inference import (
    cut_window,
    normalise,
    predict_region,
    quantise,
    read_box_of,
    tile_outputs,
)
from segpipe.models.card import parse_card
from segpipe.models.context import measure_geometry
from segpipe.models.modelfile import write_model
from segpipe.models.network import build_network
from segpipe.models.unet import UNet
from segpipe.segmenter import Segmenter, load_segmenter

Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture(shape: tuple[int, int], channels: int = 1) -> Array:
    """Blobs and noise: something at every scale, no symmetry."""
    rng = np.random.default_rng(sum(shape))
    y, x = np.mgrid[: shape[0], : shape[1]]
    result = rng.normal(size=(channels, *shape))
    for _ in range(20):
        cy, cx, r = rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), rng.uniform(2, 30)
        result += rng.normal() * 3 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / r**2)
    return result


# --- the heart: float64, logits, batch norm calibrated on the image ------------------------------


def run(network: UNet, windows: Array) -> Array:
    with torch.no_grad():
        return network(torch.from_numpy(np.ascontiguousarray(windows))).numpy()


def run_core(network: UNet, windows: Array, halo: int) -> Array:
    with torch.no_grad():
        return network.forward_core(torch.from_numpy(np.ascontiguousarray(windows)), halo).numpy()


def mirror_pad(image: Array, halo: int, stride: int) -> Array:
    """The whole image mirrored by `halo`, and on, below and to the right, to an admissible size."""
    more = [(halo, halo + ceil_to(size, stride) - size) for size in image.shape[1:]]
    return np.pad(image, ((0, 0), *more), mode="reflect")


def calibrated(padding: str, norm: str, depth: int, width: int, image: Array) -> UNet:
    """A random network; its batch norm, if any, has the statistics of the image."""
    torch.manual_seed(depth)
    network = UNet(image.shape[0], 2, width=width, depth=depth, padding=padding, norm=norm).double()
    with torch.no_grad():  # no network of dead ReLUs, which any tiling would get right
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.bias += 0.1
    if norm == "batch":
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        halo = measure_geometry(network).halo
        run(network.train(), mirror_pad(image, halo, network.stride)[None])
    return network.eval()


def whole_answer(network: UNet, image: Array, halo: int) -> Array:
    """The reference: crop(network(mirror_pad(image, halo)))."""
    output = run(network, mirror_pad(image, halo, network.stride)[None])[0]
    start = halo - network.margin
    result = output[:, start : start + image.shape[1], start : start + image.shape[2]]
    assert result.size <= 2 or result.std() > 1e-3
    return result


def tiled_answer(
    function: Callable[[Array], Array], image: Array, core: int, halo: int, stride: int
) -> Array:
    grid = TileGrid(image.shape[1:], core, halo, stride)
    everything = Box(0, 0, *image.shape[1:])
    result = np.full((2, *image.shape[1:]), np.nan)
    for tile, output in tile_outputs(image, everything, grid, function, batch=2):
        result[:, *tile.keep.slices] = output
    return result


SHAPES = [
    (64, 96),  # whole cores
    (70, 45),  # ragged
    (1, 130),
    (20, 50),  # smaller than a core along y
    (9, 7),  # smaller than the halo
    (1, 1),
    (33, 31),  # a last core of one pixel, and less than one
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("padding", "norm"), [("same", "batch"), ("valid", "none")])
def test_tiled_equals_whole(shape, padding, norm):
    image = picture(shape)
    network = calibrated(padding, norm, 2, 4, image)
    geometry = measure_geometry(network)
    whole = whole_answer(network, image, geometry.halo)
    for function in (run, partial(run_core, halo=geometry.halo)):
        tiled = tiled_answer(partial(function, network), image, 32, geometry.halo, geometry.stride)
        assert np.abs(tiled - whole).max() <= 1e-12 * max(1, np.abs(whole).max())


@pytest.mark.parametrize(
    ("padding", "norm", "depth", "width"),
    [
        ("same", "batch", 3, 4),
        ("valid", "none", 3, 4),
        ("valid", "batch", 3, 4),
        ("same", "batch", 4, 2),
        ("valid", "none", 4, 2),
    ],
)
def test_halo_is_enough_and_one_stride_less_is_not(padding, norm, depth, width):
    image = picture((150, 100), channels=2)
    network = calibrated(padding, norm, depth, width, image)
    geometry = measure_geometry(network)
    halo, stride, core = geometry.halo, geometry.stride, 64
    whole = whole_answer(network, image, halo)
    spread = whole.std()

    def difference(function: Callable[[Array], Array], halo: int) -> float:
        tiled = tiled_answer(function, image, core, halo, stride)
        return float(np.abs(tiled - whole).max() / spread)

    def mirrored_at_the_tile(windows: Array) -> Array:
        border = ((0, 0), (0, 0), (stride, stride), (stride, stride))
        return run(network, np.pad(windows, border, mode="reflect"))

    assert difference(lambda windows: run(network, windows), halo) <= 1e-12
    assert difference(lambda windows: run_core(network, windows, halo), halo) <= 1e-12
    assert difference(mirrored_at_the_tile, halo - stride) > 1e-6
    if padding == "same":  # zeros at the tile's border
        assert difference(lambda windows: run(network, windows), halo - stride) > 1e-6


@pytest.mark.parametrize(("padding", "norm"), [("same", "batch"), ("valid", "none")])
@pytest.mark.parametrize("kept", range(1, 9))
def test_a_ragged_last_core_of_a_few_pixels(kept, padding, norm):
    """Pixel 2 of a stride looks furthest beyond the image; a mirror of the window's part fails."""
    image = picture((144 + kept, 20))
    network = calibrated(padding, norm, 3, 4, image)
    geometry = measure_geometry(network)
    whole = whole_answer(network, image, geometry.halo)
    tiled = tiled_answer(lambda w: run(network, w), image, 16, geometry.halo, geometry.stride)
    assert np.abs(tiled - whole).max() <= 1e-12 * whole.std()


def test_a_core_out_of_phase_is_refused_and_would_be_wrong():
    image = picture((90, 90))
    network = calibrated("same", "batch", 3, 4, image)
    halo = measure_geometry(network).halo
    with pytest.raises(SettingsError, match="not a multiple of the model's stride 8"):
        TileGrid((90, 90), 36, halo, 8)
    whole = whole_answer(network, image, halo)
    tiled = tiled_answer(lambda w: run(network, w), image, 36, halo + 6, stride=1)
    assert np.abs(tiled - whole).max() > 1e-6 * whole.std()


# --- windows --------------------------------------------------------------------------------------


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    core=st.integers(1, 6).map(lambda n: 4 * n),
    halo=st.integers(0, 30),
)
def test_windows_are_cut_from_the_mirrored_image(shape, core, halo):
    image = np.arange(shape[0] * shape[1]).reshape(1, *shape)
    grid = TileGrid(shape, core, halo, 4)
    far = core + halo
    mirrored = np.pad(image, ((0, 0), (far, far), (far, far)), mode="reflect")
    for tile in grid:
        window = cut_window(image, Box(0, 0, *shape), tile)
        rows, columns = tile.window.shift(far, far).slices
        assert np.array_equal(window, mirrored[:, rows, columns])


def test_window_of_a_block_is_that_of_the_image():
    image = picture((90, 70))
    grid = TileGrid((90, 70), 16, 24, 8)
    for region in Lattice((90, 70), (32, 32)):
        box = read_box_of(grid, region.box)
        block = image[:, *box.slices]
        for tile in grid.meeting(region.box):
            whole = cut_window(image, Box(0, 0, 90, 70), tile)
            assert np.array_equal(cut_window(block, box, tile), whole)


def test_read_box_is_what_the_tiles_read_and_no_more():
    grid = TileGrid((90, 70), 16, 24, 8)
    region = Box(32, 16, 64, 48)
    assert read_box_of(grid, region) == Box(8, 0, 88, 70)
    # a last core of 6 columns: its window ends 34 beyond the image, and so shows 35 inside
    assert read_box_of(grid, Box(32, 64, 64, 70)) == Box(8, 35, 88, 70)
    with pytest.raises(ValueError, match="outside"):
        read_box_of(grid, Box(90, 0, 100, 10))


def test_a_block_that_is_too_small_is_refused():
    grid = TileGrid((90, 70), 16, 24, 8)
    tile = grid[2, 2]
    with pytest.raises(ValueError, match="beyond the block"):
        cut_window(np.zeros((1, 30, 30)), Box(30, 30, 60, 60), tile)
    with pytest.raises(ValueError, match="pixels for the box"):
        next(tile_outputs(np.zeros((1, 3, 3)), Box(0, 0, 90, 70), [tile], lambda w: w, 1))


# --- pixels to numbers, numbers to bytes ----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "u4", "f2", "f4", "f8", "u8", ">u2"])
def test_normalise_is_one_division_rounded_once(dtype):
    values = np.array([0, 1, 3, 17, 100, 127], dtype)
    result = normalise(values.reshape(1, 2, 3), [(3, 20.5)])
    expected = [np.float32((float(value) - 3.0) / (20.5 - 3.0)) for value in values]
    assert result.dtype == np.float32
    assert result.ravel().tolist() == expected


def test_normalise_treats_each_channel_by_itself():
    pixels = np.arange(2 * 12, dtype=np.float32).reshape(2, 3, 4)
    result = normalise(pixels, [(0, 10), (-5, 5)])
    assert np.array_equal(result[0], pixels[0] / np.float32(10))
    assert np.array_equal(result[1], (pixels[1] + 5) / np.float32(10))
    batch = np.stack([pixels, pixels + 1])
    assert np.array_equal(normalise(batch, [(0, 10), (-5, 5)])[0], result)


def test_normalise_replaces_what_is_not_finite():
    pixels = np.array([[[np.nan, np.inf, -np.inf, 4.0, 2.0]]], np.float32)
    assert normalise(pixels, [(2, 4)]).ravel().tolist() == [0, 0, 0, 1, 0]
    assert np.isnan(pixels[0, 0, 0])  # the input is left alone


def test_a_constant_image_is_zeros():
    assert not normalise(np.full((1, 4, 4), 7, np.uint8), [(7, 7)]).any()
    # and whatever lies beyond two equal percentiles is not blown up
    assert not normalise(np.array([[[7, 7, 9]]], np.uint8), [(7, 7)]).any()


@pytest.mark.parametrize("ranges", [[], [(0, 1), (0, 1)], [(2, 1)], [(0, np.inf)], [(np.nan, 1)]])
def test_unusable_ranges_are_refused(ranges):
    with pytest.raises(SettingsError, match="range"):
        normalise(np.zeros((1, 2, 2)), ranges)


def test_quantise_rounds_half_up():
    levels = np.arange(256)
    assert np.array_equal(quantise((levels / 255).astype(np.float32)), levels)
    halves = np.array([0.0, 0.49, 0.5, 1.5, 2.49, 254.4, 254.5], np.float32) / np.float32(255)
    assert quantise(halves).tolist() == [0, 0, 1, 2, 2, 254, 255]
    assert quantise(np.array([0, 1], np.float32)).tolist() == [0, 255]


@given(st.floats(0, 1, width=32))
def test_quantise_is_the_nearest_level(probability):
    level = int(quantise(np.array([probability], np.float32))[0])
    assert abs(level - 255 * probability) <= 0.5 + 1e-4


# --- predict_region -------------------------------------------------------------------------------


@dataclass
class Shrinking:
    """Not a network: averages a window's 3x3 neighbourhoods and loses a margin of 1; remembers."""

    outputs: tuple[str, ...] = ("foreground", "interior")
    batch: int = 1
    calls: list[int] = field(default_factory=list)

    def __call__(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        self.calls.append(len(windows))
        mean = sum(
            windows[..., y : windows.shape[-2] - 2 + y, x : windows.shape[-1] - 2 + x]
            for y in range(3)
            for x in range(3)
        )
        mean = np.clip(mean[:, :1] / 9, 0, 1)
        return np.concatenate([mean, 1 - mean], axis=1)


def predict_whole(image, grid, region_shape, segmenter, ranges, skip=None):
    result = np.full((2, *grid.shape), 99, np.uint8)
    for region in Lattice(grid.shape, region_shape):
        box = read_box_of(grid, region.box)
        part = predict_region(
            image[:, *box.slices], box, grid, region.box, ranges, segmenter, skip=skip
        )
        result[:, *region.box.slices] = part
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random U-Net of depth 2 whose outputs use the whole range."""
    torch.manual_seed(5)
    fields = {
        "name": "random",
        "architecture": {
            "name": "unet",
            "parameters": {"width": 8, "depth": 2, "padding": "same", "norm": "batch"},
        },
        "channels": ["nuclei"],
        "outputs": ["foreground", "interior"],
        "normalisation": {"kind": "percentile"},
        "licence": "CC0-1.0",
        "training_data": "none",
    }
    card = parse_card(fields, "test")
    path = tmp_path_factory.mktemp("model") / "random.safetensors"
    write_model(path, build_network(*card.network_arguments), card)
    return path


@pytest.fixture(scope="module")
def segmenter(model) -> Segmenter:
    return load_segmenter(model)


def nuclei(shape: tuple[int, int]) -> NDArray[np.uint16]:
    image = picture(shape)
    return (np.clip(image - image.min(), 0, None) * 300).astype(np.uint16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_regions_do_not_change_bytes(batch, backend, model):
    segmenter = load_segmenter(model, "cpu", batch=batch, backend=backend, core_only=True)
    image = nuclei((200, 145))
    grid = TileGrid((200, 145), 64, segmenter.halo, segmenter.stride)
    ranges = [(100.0, 1500.0)]
    results = [
        predict_whole(image, grid, shape, segmenter, ranges)
        for shape in [(200, 145), (64, 64), (64, 128), (100, 90)]  # the last cuts through cores
    ]
    assert len(np.unique(results[0])) > 50
    for other in results[1:]:
        assert np.array_equal(other, results[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_near_the_whole_image_for_every_core(backend, model):
    segmenter = load_segmenter(model, "cpu", backend=backend)
    cores = load_segmenter(model, "cpu", backend=backend, core_only=True)
    image = nuclei((150, 121))
    pixels = normalise(image, [(100.0, 1500.0)])
    padded = mirror_pad(pixels, segmenter.halo, segmenter.stride)
    whole = segmenter(padded[None])[0][:, segmenter.halo :, segmenter.halo :][:, :150, :121]
    assert np.ptp(whole) > 0.5
    for core in (32, 80, 1024):
        grid = TileGrid((150, 121), core, segmenter.halo, segmenter.stride)
        for network in (segmenter, cores):
            for tile, output in tile_outputs(pixels, Box(0, 0, 150, 121), grid, network, 1):
                assert np.abs(output - whole[:, *tile.keep.slices]).max() <= 1e-5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32, np.float64])
def test_bytes_do_not_depend_on_the_dtype_of_equal_values(dtype):
    values = np.random.default_rng(0).integers(0, 200, (1, 30, 20))
    grid = TileGrid((30, 20), 8, 2)
    expected = predict_whole(values, grid, (16, 16), Shrinking(), [(10, 150)])
    result = predict_whole(values.astype(dtype), grid, (16, 16), Shrinking(), [(10, 150)])
    assert np.array_equal(result, expected)
    assert np.array_equal(result[1], 255 - result[0]) or np.ptp(result) > 200


def test_predict_region_equals_a_plain_loop():
    image = np.random.default_rng(1).integers(0, 4000, (1, 30, 23)).astype(np.uint16)
    grid = TileGrid((30, 23), 8, 3)
    result = predict_whole(image, grid, (30, 23), Shrinking(batch=4), [(0, 4000)])
    mirrored = np.pad(image[0] / 4000, 1, mode="reflect")
    for y in range(30):
        for x in range(23):
            mean = mirrored[y : y + 3, x : x + 3].mean()
            assert abs(result[0, y, x] - 255 * mean) <= 0.501


def test_batches_are_filled_in_raster_order():
    segmenter = Shrinking(batch=4)
    grid = TileGrid((40, 24), 8, 1)
    image = np.ones((1, 40, 24))
    predict_region(image, Box(0, 0, 40, 24), grid, Box(0, 0, 40, 24), [(0, 1)], segmenter)
    assert segmenter.calls == [4, 4, 4, 3]


def test_skipped_tiles_are_zeros_and_cost_nothing():
    segmenter = Shrinking(batch=4)
    image = np.ones((1, 40, 24))
    image.flags.writeable = False
    grid = TileGrid((40, 24), 8, 1)
    result = predict_whole(image, grid, (16, 16), segmenter, [(0, 1)], lambda t: t.index[0] != 2)
    assert (result[0, 16:24] == 255).all()
    assert not result[:, :16].any()
    assert not result[:, 24:].any()
    assert sum(segmenter.calls) == 3
    everything = predict_whole(image, grid, (16, 16), segmenter, [(0, 1)], lambda _: True)
    assert not everything.any()
    assert sum(segmenter.calls) == 3


def test_an_output_that_is_not_a_number_names_the_tile(segmenter):
    image = np.zeros((1, 40, 80))
    image[0, 5, 5] = 1e300
    grid = TileGrid((40, 80), 32, segmenter.halo, segmenter.stride)
    box = Box(0, 0, 40, 80)
    with pytest.raises(InputError, match=r"tile at \[0:20, 0:32\] is not a number.*1e\+300"):
        predict_region(image, box, grid, box, [(0, 1)], segmenter)
