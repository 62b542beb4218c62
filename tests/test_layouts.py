"""State dicts of networks written elsewhere: what is imported computes what they computed.

The networks here are written anew, as plainly as can be, with the names of their modules.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from segpipe.errors import ModelError
from segpipe.models.modelfile import import_model, load_model, model_geometry

WIDTH = 2
FIELDS = {
    "name": "imported",
    "channels": ["red", "green", "blue"],
    "outputs": [f"class{index}" for index in range(11)],
    "normalisation": {"kind": "fixed", "low": 0, "high": 255},
    "licence": "CC0-1.0",
    "training_data": "none",
}


def stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class OverviewUNet(nn.Module):
    """Level 2 of its decoder ends in as many channels as level 1 has."""

    def __init__(self, classes: int = 11, w: int = WIDTH) -> None:
        super().__init__()
        last = 3
        for level in range(1, 6):
            here = w * 2 ** (level - 1)
            setattr(self, f"enc{level}_1", stage(last, here))
            setattr(self, f"enc{level}_2", stage(here, here))
            last = here
        for level in range(4, 0, -1):
            here = w * 2 ** (level - 1)
            out = w if level == 2 else here
            setattr(self, f"unpool{level}", nn.ConvTranspose2d(last, here, 2, stride=2))
            setattr(self, f"dec{level}_2", stage(2 * here, here))
            setattr(self, f"dec{level}_1", stage(here, out))
            last = out
        self.score_fr = nn.Conv2d(w, classes, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in range(1, 6):
            x = self.get_submodule(f"enc{level}_2")(self.get_submodule(f"enc{level}_1")(x))
            if level < 5:
                skips.append(x)
                x = self.pool(x)
        for level in range(4, 0, -1):
            x = torch.cat([self.get_submodule(f"unpool{level}")(x), skips.pop()], dim=1)
            x = self.get_submodule(f"dec{level}_1")(self.get_submodule(f"dec{level}_2")(x))
        return self.score_fr(x)


class Nested(nn.Module):
    """A node of a nested U-Net."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()


class NestedUNet(nn.Module):
    """The overview's, of fixed size, or the other repository's with its `final` heads."""

    def __init__(self, heads: str, size: int | None = None, w: int = WIDTH) -> None:
        super().__init__()
        widths = [w * 2**level for level in range(5)]
        for level in range(5):
            for column in range(5 - level):
                inputs = (3, *widths)[level]
                if column:
                    inputs = column * widths[level] + widths[level + 1]
                setattr(self, f"conv{level}_{column}", Nested(inputs, widths[level]))
        if heads == "seg_outputs":
            self.seg_outputs = nn.ModuleList(nn.Conv2d(w, 11, 1) for _ in range(4))
        elif heads == "final4":
            for column in range(1, 5):
                setattr(self, f"final{column}", nn.Conv2d(w, 11, 1))
        else:
            self.final = nn.Conv2d(w, 11, 1)
        self.heads = heads
        self.up = nn.ModuleList(
            nn.Upsample(
                size=None if size is None else (size // 2**level,) * 2,
                scale_factor=2 if size is None else None,
                mode="bilinear",
                align_corners=True,
            )
            for level in range(4)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        rows: list[list[Tensor]] = [[] for _ in range(5)]
        for level in range(5):
            below = nn.functional.max_pool2d(rows[level - 1][0], 2) if level else x
            rows[level].append(self.get_submodule(f"conv{level}_0")(below))
            for column in range(1, level + 1):
                row = level - column
                scaled = self.up[row](rows[row + 1][column - 1])
                node = self.get_submodule(f"conv{row}_{column}")
                rows[row].append(node(torch.cat([*rows[row], scaled], dim=1)))
        if self.heads == "final":
            return [self.final(rows[0][4])]
        if self.heads == "seg_outputs":
            return [
                head(output) for head, output in zip(self.seg_outputs, rows[0][1:], strict=True)
            ]
        return [self.get_submodule(f"final{column}")(rows[0][column]) for column in range(1, 5)]


class Double(nn.Module):
    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Milesial(nn.Module):
    def __init__(self, bias: bool = False, w: int = WIDTH) -> None:
        super().__init__()
        self.inc = Double(3, w, bias)
        for level in range(1, 5):
            here = w * 2**level
            down = nn.Module()
            down.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), Double(here // 2, here, bias))
            setattr(self, f"down{level}", down)
            up = nn.Module()
            up.up = nn.ConvTranspose2d(here, here // 2, 2, stride=2)
            up.conv = Double(here, here // 2, bias)
            setattr(self, f"up{5 - level}", up)
        self.outc = nn.Module()
        self.outc.conv = nn.Conv2d(w, 11, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.inc(x)]
        for level in range(1, 5):
            skips.append(self.get_submodule(f"down{level}").maxpool_conv(skips[-1]))
        x = skips.pop()
        for number in range(1, 5):
            up = self.get_submodule(f"up{number}")
            x = up.conv(torch.cat([skips.pop(), up.up(x)], dim=1))
        return self.outc.conv(x)


def trained(network: nn.Module, size: int) -> nn.Module:
    """With statistics and biases of its own."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.5)
    with torch.no_grad():
        network.train()(torch.randn(2, 3, size, size))
    return network.eval()


def imported(network: nn.Module, folder: Path, **architecture: object):
    source = folder / "weights.pt"
    torch.save({"state_dict": network.state_dict()}, source)
    fields = {**FIELDS, "architecture": {"parameters": architecture}} if architecture else FIELDS
    card = import_model(source, folder / "out.safetensors", fields)
    return load_model(folder / "out.safetensors")[0], card


def apart(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    assert float(expected.std()) > 0.05
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "network",
    [OverviewUNet(), Milesial(), Milesial(bias=True)],
    ids=["overview", "plain", "biased"],
)
def test_unets_compute_what_they_did(network, tmp_path):
    trained(network, 64)
    ours, card = imported(network, tmp_path)
    assert card.architecture.name == "unet"
    assert card.architecture.parameters["width"] == WIDTH
    assert model_geometry(card).exact
    image = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert apart(ours(image), network(image)) < 1e-5


@pytest.mark.parametrize("heads", ["seg_outputs", "final4", "final"])
def test_nested_unets_compute_what_they_did_with_aligned_corners(heads, tmp_path):
    network = trained(NestedUNet(heads, 64 if heads == "seg_outputs" else None), 64)
    ours, card = imported(network, tmp_path, up="corners")
    assert card.architecture.name == "unetplusplus"
    assert not model_geometry(card).exact
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(image)
        sides = ours.forward_training(image).sides
        assert len(sides) == len(expected)
        for found, theirs in zip(sides, expected, strict=True):
            assert apart(found, theirs) < 1e-5
        assert apart(ours(image), torch.stack(expected).mean(dim=0)) < 1e-5


def test_a_nested_unet_without_a_size_is_exact_and_near_in_the_middle(tmp_path):
    size = 256
    network = trained(NestedUNet("seg_outputs", size), size)
    ours, card = imported(network, tmp_path)
    assert card.architecture.parameters["up"] == "bilinear"
    assert model_geometry(card).exact
    smooth = nn.functional.interpolate(torch.randn(1, 3, 9, 9), size=(size, size), mode="bicubic")
    with torch.no_grad():
        found, expected = ours(smooth), torch.stack(network(smooth)).mean(dim=0)
        off = (found - expected).abs().amax(dim=(0, 1)) / expected.abs().max()
        assert ours(torch.zeros(1, 3, 32, 48)).shape == (1, 11, 32, 48)
    middle = float(off[112:144, 112:144].mean())
    assert middle < 0.05
    assert middle < float(off.mean())


def test_the_last_head_alone(tmp_path):
    network = trained(NestedUNet("seg_outputs", 32), 32)
    ours, card = imported(network, tmp_path, up="corners", deep_supervision=False)
    assert card.architecture.parameters["deep_supervision"] is False
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert apart(ours(image), network(image)[-1]) < 1e-5


def refused(state: dict[str, Tensor], folder: Path, message: str, **fields: object) -> None:
    torch.save(state, folder / "weights.pt")
    with pytest.raises(ModelError, match=message):
        import_model(folder / "weights.pt", folder / "out.safetensors", {**FIELDS, **fields})
    assert not (folder / "out.safetensors").exists()


def test_what_does_not_fit_is_named(tmp_path):
    state = OverviewUNet().state_dict()
    more = {**state, "enc6_1.0.weight": torch.zeros(1)}
    refused(more, tmp_path, r"as in the overview's U-Net, but it has enc6_1\.0, which that has not")
    less = {key: value for key, value in state.items() if not key.startswith("dec3_2.1.")}
    refused(less, tmp_path, r"weights\.pt: .* but it lacks dec3_2\.1")
    refused(state, tmp_path, "says architecture resunet", architecture={"name": "resunet"})
    refused(state, tmp_path, "did you mean 'width'", architecture={"parameters": {"widht": 3}})
    refused(state, tmp_path, "architecture", architecture={"parameters": 3})
    refused(state, tmp_path, "architecture", architecture="unet")
    refused(state, tmp_path, r"tensor head\.weight has shape \(11", outputs=["a", "b"])
    for shape in ((), (3,), (0, 3, 3, 3), (5, 5)):
        for key in ("enc1_1.0.weight", "dec1_2.0.weight", "unpool1.weight", "dec2_1.1.weight"):
            refused({**state, key: torch.zeros(shape)}, tmp_path, "shape|width|missing")
    leaf = {key: value for key, value in state.items() if key != "dec1_2.0.weight"}
    refused(leaf, tmp_path, r"decoder\.0\.0\.conv\.weight is missing")


def test_other_names_are_left_alone(tmp_path):
    refused({"weird.weight": torch.zeros(1)}, tmp_path, "key architecture is missing")
