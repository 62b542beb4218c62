"""The networks beside the U-Net: published sizes, context, tiled equals whole, and the whole path."""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import numpy as np
import pytest
import torch
from torch import nn

import segpipe
from segpipe.backend import BACKENDS, EAGER
from segpipe.errors import ModelError
from segpipe.inference import quantise
from segpipe.models.budget import MILLION
from segpipe.models.card import parse_card
from segpipe.models.context import halo, measure_geometry
from segpipe.models.cost import activation_bytes, count_operations
from segpipe.models.effunet import STAGES, VARIANTS
from segpipe.models.modelfile import load_model, write_model
from segpipe.models.network import (
    NETWORKS,
    Network,
    WholeWindow,
    build_network,
    build_twin,
    describe_tensors,
)
from segpipe.models.unetplusplus import UNetPlusPlus, prune, prune_parameters
from segpipe.segmenter import load_segmenter
from segpipe.settings import load_settings
from test_inference import mirror_pad, one_thread, picture, run, run_core, tiled_answer
from test_unet import parameter_count

__all__ = ["one_thread"]

OTHERS = [name for name in NETWORKS if name != "unet"]
SMALL = {
    "unet": {"width": 4, "depth": 2, "padding": "same", "norm": "batch"},
    "unetplusplus": {"width": 4, "depth": 2, "norm": "batch"},
    "unet3plus": {"width": 4, "depth": 2},
    "resunet": {"width": 4, "depth": 2},
    "mobileunet": {"width": 8},
    "effunet": {"width": 8},
}
"""Enough of each to compute with."""
VARIED = [
    ("unetplusplus", SMALL["unetplusplus"]),
    ("unetplusplus", {"width": 4, "depth": 2, "up": "bilinear", "deep_supervision": False}),
    ("unetplusplus", {"width": 4, "depth": 3}),
    ("unet3plus", SMALL["unet3plus"]),
    ("unet3plus", {"width": 4, "depth": 3, "deep_supervision": False}),
    ("resunet", SMALL["resunet"]),
    ("resunet", {"width": 4, "depth": 3, "shortcut": "convolution"}),
    ("mobileunet", SMALL["mobileunet"]),
]
"""Exact ones."""
INEXACT = [
    ("unetplusplus", {"width": 4, "depth": 2, "up": "corners"}),
    ("unet3plus", {"width": 4, "depth": 2, "classification": True}),
    ("effunet", SMALL["effunet"]),
]


def size_of(name: str, parameters: dict, channels: int = 3, outputs: int = 1) -> int:
    with torch.device("meta"):
        return parameter_count(build_network(name, parameters, channels, outputs))


# --- published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "channels", "expected"),
    [
        ("unetplusplus", {"deep_supervision": False}, 1, 9_041_601),
        ("unetplusplus", {"depth": 1, "deep_supervision": False}, 3, 101_537),
        ("unetplusplus", {"depth": 2, "deep_supervision": False}, 3, 511_681),
        ("unetplusplus", {"depth": 3, "deep_supervision": False}, 3, 2_205_537),
        ("unetplusplus", {"depth": 4, "deep_supervision": False}, 3, 9_042_177),
        ("unet3plus", {"deep_supervision": False}, 3, 26_971_777),
        ("resunet", {}, 3, 7_789_313),
        ("resunet", {"shortcut": "convolution"}, 3, 8_220_993),
    ],
)
def test_published_sizes(name, parameters, channels, expected):
    assert size_of(name, parameters, channels) == expected


def test_a_head_more_is_a_convolution_more():
    assert size_of("unetplusplus", {}, 1) == 9_041_601 + 3 * 33
    deeper = 9 * 320 + 1
    assert size_of("unet3plus", {}) == 26_971_777 + 3 * deeper + 9 * 1024 + 1


def test_mobile_encoder_has_the_published_size():
    with torch.device("meta"):
        network = build_network("mobileunet", {}, 3, 2)
    assert parameter_count(network.encoder) == 2_223_872
    assert sum(isinstance(module, nn.ConvTranspose2d) for module in network.modules()) == 5


@pytest.mark.parametrize(
    ("variant", "total"),
    [
        ("b0", 5_288_548),
        ("b1", 7_794_184),
        ("b2", 9_109_994),
        ("b3", 12_233_232),
        ("b4", 19_341_616),
        ("b5", 30_389_784),
        ("b6", 43_040_704),
        ("b7", 66_347_960),
    ],
)
def test_efficient_encoders_have_the_published_sizes(variant, total):
    """The published are those of classifiers of 1000 classes: a dense layer on the features."""
    with torch.device("meta"):
        encoder = build_network("effunet", {"variant": variant}, 3, 2).encoder
    features = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
    assert parameter_count(encoder) == total - 1000 * (features + 1)


@pytest.mark.parametrize("name", MILLION)
def test_one_budget(name):
    assert abs(size_of(name, MILLION[name], 1, 2) - 1e6) <= 1e5
    assert MILLION.keys() == NETWORKS.keys()


# --- what they say of themselves ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters"), [*VARIED, *INEXACT])
def test_exact_is_what_looks_at_no_whole_window(name, parameters):
    network = build_network(name, parameters, 1, 2)
    whole = any(isinstance(module, WholeWindow) for module in network.modules())
    aligned = any(getattr(module, "align_corners", None) for module in network.modules())
    assert network.exact == (not whole and not aligned)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("unetplusplus", {"width": 10**9}, "width is 1000000000; expected an integer from 1 to"),
        ("unetplusplus", {"depth": 7}, "depth is 7"),
        ("unetplusplus", {"deep_supervision": 1}, "deep_supervision is 1; expected true or false"),
        ("unetplusplus", {"up": "bilinaer"}, "did you mean 'bilinear'"),
        ("unet3plus", {"width": 10**9}, "width is 1000000000"),
        ("unet3plus", {"classification": "no"}, "classification is 'no'; expected true or false"),
        ("resunet", {"width": 10**9}, "width is 1000000000"),
        ("resunet", {"shortcut": "none"}, "shortcut is 'none'"),
        ("mobileunet", {"width": 10**9}, "width is 1000000000"),
        ("mobileunet", {"depth": 3}, "has no parameter 'depth'"),
        ("effunet", {"width": 10**9}, "width is 1000000000"),
        ("effunet", {"variant": "b8"}, "variant is 'b8'"),
    ],
)
def test_parameters_out_of_bounds_are_named(name, parameters, message):
    with pytest.raises(ModelError, match=message):
        build_network(name, parameters, 1, 2)
    with pytest.raises(ModelError, match="out_channels is 1000"):
        build_network(name, {}, 1, 1000)


@pytest.mark.parametrize(("name", "parameters"), [*VARIED, *INEXACT])
def test_admissible_sizes_give_as_much_as_they_get(name, parameters):
    network = build_network(name, parameters, 2, 3).eval()
    stride = network.stride
    assert [size for size in range(3 * stride) if network.admissible(size)] == [stride, 2 * stride]
    with torch.no_grad():
        assert network(torch.zeros(1, 2, stride, 2 * stride)).shape == (1, 3, stride, 2 * stride)


@pytest.mark.parametrize(
    ("name", "parameters", "sides"),
    [
        ("unetplusplus", {"width": 2, "depth": 3}, 3),
        ("unetplusplus", {"width": 2, "depth": 3, "deep_supervision": False}, 1),
        ("unet3plus", {"width": 2, "depth": 3}, 4),
        ("unet3plus", {"width": 2, "depth": 3, "classification": True}, 4),
        ("unet3plus", {"width": 2, "depth": 3, "deep_supervision": False}, 1),
        ("resunet", {"width": 2}, 1),
        ("mobileunet", {"width": 4}, 1),
        ("effunet", {"width": 4}, 1),
    ],
)
def test_training_reaches_every_weight(name, parameters, sides):
    torch.manual_seed(0)
    network = build_network(name, parameters, 1, 2).train()
    output = network.forward_training(torch.randn(2, 1, 64, 32))
    assert [side.shape for side in output.sides] == [(2, 2, 64, 32)] * sides
    loss = sum(side.square().mean() for side in output.sides)
    if parameters.get("classification"):
        assert output.classification.shape == (2, 2)
        loss = loss + output.classification.square().mean()
    else:
        assert output.classification is None
    loss.backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


def test_the_output_is_the_mean_of_the_heads_or_the_last():
    for name, mean in (("unetplusplus", True), ("unet3plus", False)):
        network = build_network(name, {"width": 2, "depth": 2}, 1, 2).eval()
        image = torch.randn(1, 1, 16, 16)
        with torch.no_grad():
            sides = network.forward_training(image).sides
            expected = torch.stack(sides).mean(dim=0) if mean else sides[-1]
            assert torch.allclose(network(image), expected, atol=1e-6)
            assert not torch.allclose(sides[0], sides[-1], atol=1e-3)


def test_an_output_that_does_not_occur_is_taken_away():
    network = build_network("unet3plus", {"width": 2, "depth": 2, "classification": True}, 1, 3)
    network.eval()
    with torch.no_grad():
        network.guide.classify[1].weight.zero_()
        network.guide.classify[1].bias.copy_(torch.tensor([1.0, -1.0, 1.0]))
        image = torch.randn(1, 1, 16, 16)
        logits, last = network(image), network.forward_training(image).sides[-1]
    assert torch.equal(logits[:, [0, 2]], last[:, [0, 2]])
    assert (torch.sigmoid(logits[:, 1]) < 1e-12).all()


# --- pruning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", ["transposed", "bilinear"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_pruned_network_gives_what_that_head_gave_for_less(level, up):
    torch.manual_seed(0)
    network = UNetPlusPlus(2, 3, width=4, depth=3, norm="batch", up=up)
    network.train()(torch.randn(2, 2, 32, 32))
    network.eval()
    pruned = prune(network, level)
    image = torch.randn(1, 2, 24, 40)
    with torch.no_grad():
        expected = network.forward_training(image).sides[level - 1]
        assert torch.allclose(pruned(image), expected, atol=1e-6)
    assert pruned.stride == 2**level
    assert parameter_count(pruned) < parameter_count(network)
    parameters = {"width": 4, "depth": 3, "norm": "batch", "up": up}
    shapes = describe_tensors("unetplusplus", prune_parameters(parameters, level), 2, 3)
    assert {key: pruned.state_dict()[key].shape for key in shapes} == shapes
    with torch.no_grad():
        before = expected.clone()
        for parameter in pruned.parameters():
            parameter.zero_()
        assert torch.equal(network.forward_training(image).sides[level - 1], before)


def test_a_pruned_network_is_less_work():
    operations = []
    for depth in (1, 2, 3, 4):
        fields = {"name": "unetplusplus", "parameters": prune_parameters({"width": 4}, depth)}
        operations.append(count_operations(make_card(fields), (64, 64), 0))
    assert all(1.2 * few < many for few, many in pairwise(operations))


def test_pruning_needs_a_head():
    network = UNetPlusPlus(width=1, depth=3, deep_supervision=False)
    with pytest.raises(ModelError, match=r"no head at level 2: .* without deep supervision"):
        prune(network, 2)
    with pytest.raises(ModelError, match="level is 4; expected an integer from 1 to 3"):
        prune(network, 4)


# --- context --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters"), [*VARIED, *INEXACT])
def test_narrow_twin_agrees_with_the_full_network(name, parameters):
    full = build_network(name, parameters, 1, 2)
    twin = build_twin(name, parameters, 1, 2)
    assert parameter_count(twin) < parameter_count(full)
    if full.stride < 32:
        assert measure_geometry(full) == measure_geometry(twin)


@pytest.mark.parametrize("variant", ["b0", "b3"])
def test_context_of_efficient_encoders_by_arithmetic(variant):
    """Each convolution of kernel k looks (k - 1) / 2 to each side, in pixels of its input's scale.

    Decoder: 2x2 deconvolutions see one pixel, its blocks 2 on each side. Followed from an output
    pixel at either end of a stride back to the image.
    """
    network = build_twin("effunet", {"variant": variant}, 1, 2)
    _, deeper = VARIANTS[variant]
    kernels = [(3, 2)]
    for _, size, stride, _, units in STAGES:
        kernels += [(size, stride if unit == 0 else 1) for unit in range(ceil(units * deeper))]
    first, last = 0, 31
    for level in range(6):  # down the decoder: two 3x3 convolutions a level, the bottom has none
        if level < 5:
            first, last = (first - 2) // 2, (last + 2) // 2
    for size, stride in reversed(kernels):
        pad = size // 2
        first, last = first * stride - pad, last * stride + size - 1 - pad
    reach = max(-first, last - 31)
    assert measure_geometry(network).context == reach


def calibrated(name: str, parameters: dict, image: np.ndarray) -> Network:
    """A random network in float64; its batch norm has the statistics of the image."""
    torch.manual_seed(1)
    network = build_network(name, parameters, image.shape[0], 2).double()
    with torch.no_grad():  # no network of dead ReLUs, which any tiling would get right
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                module.bias += 0.1
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                module.bias += 0.1
    run(network.train(), mirror_pad(image, 32, network.stride)[None])
    return network.eval()


def whole_answer(network: Network, image: np.ndarray, reach: int) -> np.ndarray:
    output = run(network, mirror_pad(image, reach, network.stride)[None])[0]
    result = output[:, reach : reach + image.shape[1], reach : reach + image.shape[2]]
    assert result.std() > 1e-3
    return result


@pytest.mark.parametrize(("name", "parameters"), VARIED)
def test_tiled_equals_whole_and_with_a_stride_less_it_does_not(name, parameters):
    image = picture((40, 100) if name == "mobileunet" else (100, 90), channels=2)
    network = calibrated(name, parameters, image)
    geometry = measure_geometry(build_twin(name, parameters, 2, 2))
    reach, stride = geometry.halo, geometry.stride
    assert geometry.exact
    assert reach == halo(network, geometry.context)
    whole = whole_answer(network, image, reach)

    def difference(function, halo: int) -> float:
        tiled = tiled_answer(function, image, 64, halo, stride)
        return float(np.abs(tiled - whole).max() / whole.std())

    assert difference(lambda windows: run(network, windows), reach) <= 1e-12
    assert difference(lambda windows: run_core(network, windows, reach), reach) <= 1e-12
    assert difference(lambda windows: run(network, windows), reach - stride) > 1e-9


@pytest.mark.parametrize(("name", "parameters"), INEXACT)
def test_what_is_not_exact_shows_its_tiles(name, parameters):
    image = picture((150, 110), channels=2)
    image[:, 90:] *= 0.2  # means and maxima of tiles differ
    network = calibrated(name, parameters, image)
    if parameters.get("classification"):
        with torch.no_grad():  # what only some of the tiles hold
            tops = network.guide.classify(
                network._encode(torch.from_numpy(image[None, :, 64:104]))[-1]
            )
            network.guide.classify[1].bias -= tops[0] + 1e-3
    reach = 64
    tiled = tiled_answer(lambda windows: run(network, windows), image, 32, reach, network.stride)
    whole = run(network, mirror_pad(image, reach, network.stride)[None])[0]
    whole = whole[:, reach : reach + 150, reach : reach + 110]
    assert not network.exact
    assert np.abs(tiled - whole).max() > 1e-6 * whole.std()


@pytest.mark.parametrize(("name", "parameters"), [*VARIED, *INEXACT])
def test_the_core_alone_is_that_of_the_whole_window(name, parameters):
    image = picture((192, 160), channels=1)
    network = calibrated(name, parameters, image)
    whole = run(network, image[None])
    for reach in (0, 3, 16, 22, 33, 48, 64):
        expected = whole[..., reach : 192 - reach, reach : 160 - reach]
        found = run_core(network, image[None], reach)
        assert found.shape == expected.shape
        # what lies within the context of the window's border sees zeros there in both
        assert np.abs(found - expected).max() <= 1e-12 * whole.std()


@pytest.mark.parametrize("name", ["unetplusplus", "unet3plus", "resunet", "mobileunet", "effunet"])
def test_the_core_alone_is_less_work(name):
    card = make_card({"name": name, "parameters": SMALL[name]})
    operations = [count_operations(card, (256, 256), reach) for reach in (0, 64)]
    assert operations[1] < 0.9 * operations[0]
    assert activation_bytes(card, (256, 256), 64, 1, folded=True) > 0


# --- through the segmenter ------------------------------------------------------------------------


def make_card(architecture: dict, **fields: object):
    return parse_card(
        {
            "name": "random",
            "architecture": architecture,
            "channels": ["nuclei"],
            "outputs": ["foreground", "interior"],
            "normalisation": {"kind": "percentile"},
            "licence": "CC0-1.0",
            "training_data": "none",
            **fields,
        },
        "test",
    )


def write_calibrated(path, name: str, parameters: dict):
    card = make_card({"name": name, "parameters": parameters})
    image = picture((64, 96))
    low, high = np.percentile(image, (1, 99.8))
    image = (image - low) / (high - low)  # as the card's normalisation does
    network = calibrated(name, parameters, image)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):  # of a few pixels: division would magnify rounding
            module.running_var.clamp_(min=0.05)
    logits = run(network, image[None])[0, 0]
    heads = network.heads if hasattr(network, "heads") else [network.head]
    with torch.no_grad():  # half of the pixels are foreground, some of them surely
        for head in heads.values() if isinstance(heads, nn.ModuleDict) else heads:
            head.bias -= float(np.median(logits))
            head.bias *= 3 / logits.std()
            head.weight *= 3 / logits.std()
    write_model(path, network.float(), card)
    return path


@pytest.mark.parametrize(
    ("name", "parameters"), [*((name, SMALL[name]) for name in OTHERS), *INEXACT[:2]]
)
def test_backends_agree_and_bytes_depend_on_no_slot_mate_or_thread(name, parameters, tmp_path):
    path = write_calibrated(tmp_path / "m.safetensors", name, parameters)
    shape = (3, 1, 64, 96)
    windows = np.random.default_rng(0).random(shape, np.float32)
    network, _ = load_model(path)
    with torch.no_grad():
        expected = torch.sigmoid(network(torch.from_numpy(windows.copy()))).numpy()
    assert np.ptp(expected) > 0.1
    for backend in BACKENDS:
        found = set()
        for batch, threads in ((2, 1), (3, 2)) if backend == EAGER else ((3, 2),):
            segmenter = load_segmenter(path, "cpu", threads=threads, batch=batch, backend=backend)
            for position in range(batch):
                order = np.roll(np.arange(3), position)
                result = segmenter(windows[order])[np.argsort(order)]
                found.add(result.tobytes())
        assert np.abs(result - expected).max() < 3e-4, backend
        assert len(np.unique(quantise(result))) > 10
        assert len(found) == 1, backend


@pytest.mark.parametrize("name", ["unetplusplus", "unet3plus", "resunet", "mobileunet"])
def test_segment_does_not_depend_on_the_core(name, tmp_path):
    path = write_calibrated(tmp_path / "m.safetensors", name, SMALL[name])
    image = picture((70, 90))[0].astype(np.float32)
    found = []
    for core in (32, 96):
        sizes = [f"tile.chunk={core}", f"tile.core={core}", f"tile.region={2 * core}"]
        found.append(segpipe.segment(image, model=path, settings=load_settings(None, sizes)))
    assert found[0].max() > 1
    assert np.array_equal(found[0], found[1])
