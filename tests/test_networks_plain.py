"""ResUNet, U-Net 3+ and the blocks of the mobile encoders against plain versions of their tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segpipe.models.effunet import MBConv
from segpipe.models.mobileunet import InvertedResidual
from segpipe.models.network import build_network

Tensors = dict[str, Tensor]


def unsettled(network: nn.Module) -> nn.Module:
    """In float64, with biases and statistics that count."""
    torch.manual_seed(1)
    network = network.double().eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.2)
    return network


def norm(x: Tensor, t: Tensors, name: str) -> Tensor:
    mean, variance, scale, shift = (
        t[f"{name}.{part}"][:, None, None]
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def conv(x: Tensor, t: Tensors, name: str, **how: int) -> Tensor:
    weight = t[f"{name}.weight"]
    return F.conv2d(x, weight, t.get(f"{name}.bias"), padding=weight.shape[-1] // 2, **how)


def same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float(expected.std()) > 1e-3
    assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("shortcut", ["identity", "convolution"])
def test_resunet(shortcut):
    network = unsettled(
        build_network("resunet", {"width": 3, "depth": 2, "shortcut": shortcut}, 5, 2)
    )
    t = network.state_dict()

    def unit(x: Tensor, name: str, outputs: int, stride: int = 1, first: bool = False) -> Tensor:
        y, at = x, 0
        if not first:
            y, at = norm(x, t, f"{name}.body.0").clamp(min=0), 2
        y = conv(y, t, f"{name}.body.{at}", stride=stride)
        y = conv(norm(y, t, f"{name}.body.{at + 1}").clamp(min=0), t, f"{name}.body.{at + 3}")
        if shortcut == "convolution":
            return y + conv(x, t, f"{name}.shortcut", stride=stride)
        for channel in range(min(outputs, x.shape[1])):
            y[:, channel] += x[:, channel, ::stride, ::stride]
        return y

    image = torch.randn(2, 5, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        a = unit(image, "encoder.0", 3, first=True)
        b = unit(a, "encoder.1", 6, stride=2)
        x = unit(b, "encoder.2", 12, stride=2)
        for level, skip, outputs in ((1, b, 6), (0, a, 3)):
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = unit(torch.cat([skip, x], dim=1), f"decoder.{level}", outputs)
        same(network(image), conv(x, t, "head"))


def test_unet3plus():
    network = unsettled(build_network("unet3plus", {"width": 2, "depth": 2}, 1, 2))
    t = network.state_dict()

    def block(x: Tensor, name: str) -> Tensor:
        return norm(conv(x, t, f"{name}.conv"), t, f"{name}.norm").clamp(min=0)

    def up(x: Tensor, times: int) -> Tensor:
        """Bilinear, one axis after the other: a pixel's centre in the coarser pixels' places."""
        for axis in (2, 3):
            size = x.shape[axis]
            place = (torch.arange(size * times, dtype=torch.float64) + 0.5) / times - 0.5
            place = place.clamp(0, size - 1)
            low = place.floor().long()
            high = (low + 1).clamp(max=size - 1)
            shape = [1, 1, 1, 1]
            shape[axis] = -1
            part = (place - low).reshape(shape)
            x = x.index_select(axis, low) * (1 - part) + x.index_select(axis, high) * part
        return x

    image = torch.randn(1, 1, 16, 12, dtype=torch.float64)
    with torch.no_grad():
        e = [block(block(image, "encoder.0.0"), "encoder.0.1")]
        for level in (1, 2):
            x = F.max_pool2d(e[-1], 2)
            e.append(block(block(x, f"encoder.{level}.0"), f"encoder.{level}.1"))
        sources = [F.max_pool2d(e[0], 2), e[1], up(e[2], 2)]
        parts = [block(x, f"branches.1_{level}") for level, x in enumerate(sources)]
        d1 = block(torch.cat(parts, dim=1), "fuse.1")
        sources = [e[0], up(d1, 2), up(e[2], 4)]
        parts = [block(x, f"branches.0_{level}") for level, x in enumerate(sources)]
        d0 = block(torch.cat(parts, dim=1), "fuse.0")
        sides = network.forward_training(image).sides
        same(sides[0], up(conv(e[2], t, "heads.2"), 4))
        same(sides[1], up(conv(d1, t, "heads.1"), 2))
        same(sides[2], conv(d0, t, "heads.0"))
        same(network(image), sides[2])


@pytest.mark.parametrize(
    ("outputs", "stride", "expansion"), [(4, 1, 6), (5, 1, 6), (4, 2, 3), (4, 1, 1)]
)
def test_inverted_residuals_and_squeeze_and_excite(outputs, stride, expansion):
    image = torch.randn(2, 4, 10, 14, dtype=torch.float64)
    wide = 4 * expansion
    for mobile in (True, False):
        block = unsettled(
            InvertedResidual(4, outputs, stride=stride, expansion=expansion)
            if mobile
            else MBConv(4, outputs, expansion=expansion, size=5, stride=stride)
        )
        t = {key.removeprefix("body."): value for key, value in block.state_dict().items()}
        at = 3 if expansion > 1 else 0

        def bent(x: Tensor, mobile: bool = mobile) -> Tensor:
            return x.clamp(0, 6) if mobile else x / (1 + (-x).exp())

        with torch.no_grad():
            x = bent(norm(conv(image, t, "0"), t, "1")) if at else image
            x = conv(x, t, str(at), stride=stride, groups=wide)
            x = bent(norm(x, t, str(at + 1)))
            if not mobile:
                gate = t[f"{at + 3}.squeeze.weight"] @ x.mean(dim=(2, 3)).T
                gate = bent(gate + t[f"{at + 3}.squeeze.bias"][:, None])
                gate = t[f"{at + 3}.excite.weight"] @ gate + t[f"{at + 3}.excite.bias"][:, None]
                x = x / (1 + (-gate.T[:, :, None, None]).exp())
                at += 1
            x = norm(conv(x, t, str(at + 3)), t, str(at + 4))
            same(block(image), x + image if outputs == 4 and stride == 1 else x)
