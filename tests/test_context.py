"""How far a network looks: the known values, and the real network prodded from outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segpipe.errors import ModelError
from segpipe.models.context import context, halo, measure_geometry, next_admissible
from segpipe.models.network import NETWORKS, Network, build_network, build_twin
from segpipe.models.unet import UNet


@pytest.mark.parametrize(
    ("depth", "expected", "expected_halo"),
    [(1, 8, 8), (2, 22, 24), (3, 46, 48), (4, 94, 96), (5, 190, 192), (6, 382, 384)],
)
def test_padded_unet(depth, expected, expected_halo):
    network = UNet(width=1, depth=depth, padding="same", norm="batch")
    assert context(network) == expected
    assert halo(network, expected) == expected_halo


@pytest.mark.parametrize(("depth", "expected"), [(3, 46), (4, 94), (5, 190)])
def test_unpadded_unet(depth, expected):
    network = UNet(width=1, depth=depth)
    assert context(network) == expected
    assert halo(network, expected) == expected


def test_unpadded_unet_of_the_paper_loses_two_pixels_of_its_output():
    geometry = measure_geometry(UNet(width=1))
    assert (geometry.halo, geometry.margin, geometry.halo - geometry.margin) == (94, 92, 2)
    assert all(UNet(width=1).admissible(core + 188) for core in range(16, 2049, 16))


def test_halo_of_an_unpadded_unet_goes_in_steps_of_half_a_stride():
    network = UNet(width=1)
    assert [halo(network, context) for context in (80, 94, 95, 103)] == [94, 94, 102, 110]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [*((name, {}) for name in NETWORKS), ("unet", {"padding": "same"}), ("unet", {"depth": 2})],
)
def test_a_geometry_knows_which_sizes_the_network_takes(name, parameters):
    network = build_twin(name, parameters, 1, 2)
    geometry = measure_geometry(network)
    for size in range(1, 520):
        assert geometry.admissible(size) == network.admissible(size)
        assert geometry.next_admissible(size) == next_admissible(network, size)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_narrow_twin_agrees_with_the_full_network(padding):
    parameters = {"width": 6, "depth": 3, "padding": padding, "norm": "batch"}
    full = build_network("unet", parameters, 3, 2)
    assert measure_geometry(full) == measure_geometry(build_twin("unet", parameters, 3, 2))


def test_network_is_left_as_it_was():
    network = UNet(width=2, depth=2, padding="same", norm="batch").train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    context(network)
    assert network.training
    assert any(isinstance(module, nn.MaxPool2d) for module in network.modules())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("depth", [2, 3])
def test_real_network_sees_the_context_and_no_further(padding, depth):
    """Change rows of the image above and below a core: max-pool, ReLU and random weights."""
    torch.manual_seed(3)
    network = UNet(width=8, depth=depth, padding=padding).double().eval()
    stride, margin = network.stride, network.margin
    geometry = measure_geometry(network)
    reach = geometry.context
    # `halo` from the edge, as in a window, and two strides more
    start = geometry.halo + 2 * stride
    size = next_admissible(network, 2 * start + stride)
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(size=(1, 1, size, size)))

    def core(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return network(pixels)[:, :, start - margin : start - margin + stride]

    plain = core(image)
    rows = {
        "seen above": start - reach,
        "beyond above": start - reach - 1,
        "seen below": start + stride - 1 + reach,
        "beyond below": start + stride - 1 + reach + 1,
    }
    changed = {}
    for name, row in rows.items():
        other = image.clone()
        other[:, :, row] += 100
        changed[name] = float((core(other) - plain).abs().max())
    assert changed["beyond above"] == 0
    assert changed["beyond below"] == 0
    # the context is the larger of the two reaches; in a U-Net they are equal
    assert changed["seen above"] > 1e-9
    assert changed["seen below"] > 1e-9


class Stack(Network):
    """Whatever is put between input and output."""

    channels, exact = 1, True

    def __init__(self, *layers: nn.Module, stride: int = 1, margin: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.stride = stride
        self.margin = margin

    def admissible(self, size: int) -> bool:
        return size % self.stride == 0

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.layers(image)
        return result


def conv(reach: int) -> nn.Module:
    return nn.Conv2d(1, 1, 2 * reach + 1, padding=reach)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Stack(conv(1), nn.ReLU(), conv(3)), 4),
        (Stack(nn.Conv2d(1, 1, (3, 7), padding=(1, 3))), 3),
        (Stack(nn.Conv2d(1, 1, (7, 3), padding=(3, 1))), 3),
        (Stack(nn.Conv2d(1, 1, 3, padding=4, dilation=4)), 4),
        (Stack(nn.MaxPool2d(3, stride=1, padding=1)), 1),
        (Stack(nn.ZeroPad2d((0, 2, 0, 2)), nn.MaxPool2d(3, stride=1)), 2),  # to one side only
        (Stack(nn.MaxPool2d(2), nn.Upsample(scale_factor=2), stride=2), 0),
        (Stack(nn.MaxPool2d(2), conv(1), nn.Upsample(scale_factor=2), stride=2), 2),
        (Stack(nn.MaxPool2d(4), conv(1), nn.Upsample(scale_factor=4), conv(1), stride=4), 8),
        (Stack(conv(1), nn.ReLU6(), conv(1), nn.SiLU(), nn.Dropout()), 2),
        (Stack(*[conv(1) for _ in range(60)]), 60),
    ],
)
def test_other_networks(network, expected):
    assert context(network) == expected


def test_halo_is_enough_at_its_own_phase():
    """Padded before pooling, unpadded after: 3 px are enough in phase, but no window has 3.

    Cells of 4 px. With a halo of 4 the core's neighbours lie in two cells more, of which the
    padding can be seen; with 6 they do not.
    """
    layers = (conv(1), nn.MaxPool2d(4), nn.Upsample(scale_factor=4), nn.Conv2d(1, 1, 3))
    torch.manual_seed(0)
    network = Stack(*layers, stride=4, margin=1).double()
    assert context(network) == 3
    assert halo(network, 3) == 6

    image = torch.rand(1, 1, 60, 60, dtype=torch.float64) + 1

    def core(halo: int) -> Tensor:
        """Outputs of pixels [20, 28) from a window, as in the halo's own whole image."""
        with torch.no_grad():
            return network(image[:, :, 20 - halo : 28 + halo, 20 - halo : 28 + halo])[
                :, :, halo - 1 : halo + 7, halo - 1 : halo + 7
            ]

    assert torch.equal(core(6), core(6 + 8))
    assert not torch.equal(core(4), core(4 + 8))


class Mean(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image + image.mean(dim=(2, 3), keepdim=True)


def test_global_pooling_has_no_context():
    with pytest.raises(ModelError, match="cannot be tiled exactly"):
        context(Stack(Mean(), stride=16))
