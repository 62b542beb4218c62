"""The U-Net: the paper's sizes, a plain version written from the tensors, admissible inputs."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segpipe.errors import ModelError
from segpipe.models.network import build_network
from segpipe.models.unet import UNet


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_paper_form_has_the_published_size():
    with torch.device("meta"):
        network = UNet()
        output = network(torch.zeros(1, 1, 572, 572))
    assert parameter_count(network) == 31_030_658
    assert output.shape == (1, 2, 388, 388)
    kinds = [type(module) for module in network.modules()]
    assert kinds.count(nn.Conv2d) + kinds.count(nn.ConvTranspose2d) == 23
    assert (network.stride, network.margin, network.channels, network.exact) == (16, 92, 1, True)


def test_padded_form_has_the_size_of_the_shipped_model():
    with torch.device("meta"):
        network = UNet(width=16, padding="same", norm="batch")
        output = network(torch.zeros(1, 1, 208, 160))
    assert parameter_count(network) == 1_943_778
    assert output.shape == (1, 2, 208, 160)
    assert network.margin == 0


def plain_unet(tensors: dict[str, Tensor], image: Tensor, depth: int, valid: bool) -> Tensor:
    """The U-Net, written out from its tensors."""

    def block(x: Tensor, name: str) -> Tensor:
        weight, bias = tensors[f"{name}.conv.weight"], tensors[f"{name}.conv.bias"]
        x = F.conv2d(x, weight, bias, padding=0 if valid else 1)
        if f"{name}.norm.weight" in tensors:
            mean, variance, scale, shift = (
                tensors[f"{name}.norm.{part}"][:, None, None]
                for part in ("running_mean", "running_var", "weight", "bias")
            )
            x = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
        return x.clamp(min=0)

    skips = []
    x = image
    for level in range(depth + 1):
        x = block(block(x, f"encoder.{level}.0"), f"encoder.{level}.1")
        skips.append(x)
        if level < depth:
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // 2, 2, w // 2, 2).amax(dim=(3, 5))
    for level in reversed(range(depth)):
        weight, bias = tensors[f"up.{level}.weight"], tensors[f"up.{level}.bias"]
        n, c, h, w = x.shape
        x = torch.einsum("ncyx,coij->noyixj", x, weight).reshape(n, -1, 2 * h, 2 * w)
        x = x + bias[:, None, None]
        cut = (skips[level].shape[-1] - x.shape[-1]) // 2
        skip = skips[level][:, :, cut : cut + x.shape[-2], cut : cut + x.shape[-1]]
        x = torch.cat([skip, x], dim=1)
        x = block(block(x, f"decoder.{level}.0"), f"decoder.{level}.1")
    return torch.einsum("ncyx,oc->noyx", x, tensors["head.weight"][:, :, 0, 0]) + tensors[
        "head.bias"
    ].reshape(-1, 1, 1)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_equals_a_plain_version(padding, norm):
    torch.manual_seed(1)
    network = UNet(2, 3, width=3, depth=2, padding=padding, norm=norm).double().eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)  # biases and statistics that count
        image = torch.randn(2, 2, 60, 44, dtype=torch.float64)
        expected = plain_unet(network.state_dict(), image, 2, padding == "valid")
        assert float((network(image) - expected).abs().max()) <= 1e-13 * float(expected.std())


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize(
    ("padding", "depth", "shape", "halos"),
    [
        ("same", 1, (40, 26), range(13)),
        ("same", 2, (64, 84), range(32)),
        ("same", 3, (120, 104), [0, 7, 16, 23, *range(40, 52)]),
        ("same", 4, (208, 224), [0, 64, 94, 95, 96, 102]),
        ("valid", 2, (60, 64), [20, 21, 26]),
    ],
)
def test_the_core_alone_is_that_of_the_whole_window(padding, depth, shape, halos, norm):
    torch.manual_seed(2)
    network = UNet(1, 2, width=1, depth=depth, padding=padding, norm=norm).double().eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
        image = torch.randn(1, 1, *shape, dtype=torch.float64)
        whole = network(image)
        assert whole.std() > 1e-3
        for halo in halos:
            rim = halo - network.margin
            expected = whole[..., rim : whole.shape[-2] - rim, rim : whole.shape[-1] - rim]
            found = network.forward_core(image, halo)
            assert found.shape == expected.shape
            assert float((found - expected).abs().max()) <= 1e-13 * float(whole.std())


def test_the_core_alone_is_less_work():
    network = UNet(width=1, depth=3, padding="same").eval()
    seen = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.update({name: output.shape[-1]})
            )
    with torch.no_grad():
        network.forward_core(torch.zeros(1, 1, 64 + 2 * 48, 64 + 2 * 48), 48)
    assert seen["encoder.0.1.conv"] == 160
    assert seen["encoder.3.1.conv"] == (64 + 2 * 32) // 8
    assert [seen[f"decoder.{level}.1.conv"] for level in (2, 1, 0)] == [
        (64 + 2 * 16) // 4,
        (64 + 2 * 6) // 2,
        64 + 2 * 2,
    ]
    assert seen["head"] == 64


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_admissible_sizes_are_those_that_lose_the_margin_only(padding, depth):
    network = UNet(width=1, depth=depth, padding=padding)
    for size in range(1, 2 * network.margin + 5 * network.stride):
        try:
            with torch.no_grad():
                output = network(torch.zeros(1, 1, size, size)).shape[-1]
        except RuntimeError:
            output = None
        if network.admissible(size):
            assert output == size - 2 * network.margin > 0
        elif padding == "same":
            assert output != size
        else:
            # an odd number of pixels was pooled, and the last of them lost, or nothing was left
            assert output is None or output <= 0 or output != size - 2 * network.margin


def test_initial_weights_keep_the_variance():
    torch.manual_seed(0)
    network = UNet(width=16, depth=2)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            incoming = module.in_channels * module.kernel_size[0] ** 2
        elif isinstance(module, nn.ConvTranspose2d):
            incoming = module.in_channels
        else:
            continue
        assert float(module.weight.detach().std()) == pytest.approx(sqrt(2 / incoming), rel=0.3), (
            name
        )
        assert not module.bias.any()
    image = torch.randn(1, 1, 188, 188)
    assert 0.2 < float(network(image).detach().std()) < 5


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"width": 10**9}, "width is 1000000000; expected an integer from 1 to 256"),
        ({"width": 0}, "width is 0"),
        ({"width": True}, "width is True"),
        ({"depth": 40}, "depth is 40; expected an integer from 1 to 7"),
        ({"padding": "smae"}, "did you mean 'same'"),
        ({"norm": 3}, "norm is 3"),
        ({"widht": 8}, "no parameter 'widht' \\(did you mean 'width'"),
    ],
)
def test_parameters_out_of_bounds_are_named(parameters, message):
    with pytest.raises(ModelError, match=message):
        build_network("unet", parameters, 1, 2)


def test_unknown_architecture_is_named():
    with pytest.raises(ModelError, match=r"'u-net' \(did you mean 'unet'"):
        build_network("u-net", {}, 1, 2)
