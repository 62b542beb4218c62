"""What a network takes, and the processes of a job."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from fields import SIZES, nuclei
from segpipe import footprint
from segpipe.inputs import find_inputs
from segpipe.models.card import parse_card
from segpipe.models.cost import LiveTensors, activation_bytes, count_operations, weight_bytes
from segpipe.models.modelfile import find_model, model_geometry, read_card
from segpipe.models.network import build_network
from segpipe.prepare import prepare
from segpipe.settings import load_settings

MB = 2**20


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_operations_are_those_of_the_convolutions_as_they_run(padding):
    parameters = {"width": 3, "depth": 2, "padding": padding, "norm": "batch"}
    card = parse_card(
        {
            "name": "a",
            "architecture": {"name": "unet", "parameters": parameters},
            "channels": ["a", "b"],
            "outputs": ["foreground", "interior"],
            "normalisation": {"kind": "fixed", "low": 0, "high": 255},
            "licence": "CC0-1.0",
            "training_data": "none",
        },
        "fields",
    )
    network = build_network(*card.network_arguments).eval()
    counted = 0

    def count(module, inputs, output):
        nonlocal counted
        per_output = module.weight[0].numel()  # what meets in a pixel
        if isinstance(module, nn.ConvTranspose2d):
            per_output = module.in_channels
        counted += 2 * output.numel() * per_output

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(count)
    halo = model_geometry(card).halo
    size = 124 if padding == "valid" else 120
    with torch.inference_mode():
        network.forward_core(torch.zeros(1, 2, size, size), halo)
    assert count_operations(card, (size, size), halo) == counted
    weights = sum(one.nbytes for one in network.state_dict().values())
    assert weight_bytes(card) == weights


def test_tensors_count_until_nothing_needs_them():
    live = LiveTensors()

    def layer(inputs, output):
        live.see(nn.Identity(), [inputs], output)
        return output

    first = torch.empty(MB, dtype=torch.uint8, device="meta")
    second = layer(first, first + 1)  # two at once
    third = layer(second, second + 1)  # three
    del first, second
    fourth = layer(third, third + 1)  # two
    layer(fourth, fourth.add_(1))  # in place
    view = fourth[:10]
    del third, fourth
    fifth = layer(view, view + 1)  # what a view shows is still there
    assert live.peak_bytes == 3 * MB
    del view
    joined = torch.cat([fifth, torch.empty(5 * MB, dtype=torch.uint8, device="meta")])
    layer(joined, joined)  # no layer made it, but one reads it
    assert live.peak_bytes == joined.nbytes + fifth.nbytes


def test_activations_grow_with_the_window_and_the_batch_and_less_where_norms_are_folded():
    card = read_card(find_model("nuclei-fluorescence"))
    halo = model_geometry(card).halo

    def taken(core, batch=1, *, folded=False):
        return activation_bytes(card, (core + 2 * halo,) * 2, halo, batch, folded=folded)

    assert taken(512, 4) == 4 * taken(512)
    assert taken(1024) > (1024 / 512) ** 2 * 0.8 * taken(512)
    assert taken(1024, folded=True) < taken(1024)
    # At the least the top level's convolution holds what it reads and what it writes.
    assert taken(1024, folded=True) > 2 * 16 * 4 * 1216 * 1216


@pytest.fixture
def image(tmp_path):
    path = nuclei(tmp_path / "a.tif", (300, 280))
    settings = load_settings(None, SIZES)
    return prepare(find_inputs([path], tmp_path / "out"), tmp_path / "out", settings).images[0]


def test_what_a_worker_holds_grows_with_its_part(image):
    def with_layout(**fields):
        return dataclasses.replace(image, layout=dataclasses.replace(image.layout, **fields))

    least = footprint.worker_bytes(image, ())
    assert least < footprint.worker_bytes(image)
    assert least < footprint.worker_bytes(with_layout(shape=(90, 300, 280)), ())
    picture = dataclasses.replace(
        with_layout(full_shape=(9000, 9000)), source=image.source.with_suffix(".PNG")
    )
    assert footprint.worker_bytes(picture, ()) > footprint.worker_bytes(image, ()) + 9000 * 9000
    huge = footprint.worker_bytes(with_layout(shape=(1, 10**6, 10**6)))
    again = footprint.worker_bytes(with_layout(shape=(1, 10**5, 10**5)))
    assert huge == again  # not with the image


def test_processes_fit_cores_and_memory(image, monkeypatch):
    monkeypatch.setattr(footprint, "check_device", lambda device: 0)
    monkeypatch.setattr("segpipe.machine.usable_cores", lambda: 64)
    monkeypatch.setattr(footprint, "usable_cores", lambda: 64)
    large = dataclasses.replace(
        image, layout=dataclasses.replace(image.layout, shape=(1, 10**4, 10**4))
    )
    settings = load_settings(None, ["engine.kind=auto"])
    each = footprint.worker_bytes(large)

    def chosen(images, memory, **changes):
        monkeypatch.setattr("segpipe.machine.usable_memory_bytes", lambda: memory)
        monkeypatch.setattr(footprint, "usable_memory_bytes", lambda: memory)
        engine = settings.engine.model_copy(update=changes)
        told = settings.model_copy(update={"engine": engine})
        return footprint.choose_processes([(one, ["tile", "infer"]) for one in images], told)

    client = footprint.CLIENT_BYTES + footprint.TORCH_BYTES  # these tests have imported it
    room = client + 5 * each
    assert chosen([large, image], room) == footprint.Processes("local", 5, 0)
    assert chosen([large], room - 1).workers == 4
    assert chosen([large], 0).workers == 1
    assert chosen([large], 10**15).workers == 64
    assert chosen([large], 0, workers=7).workers == 7
    assert chosen([image], room) == footprint.Processes("serial", 1, 0)
    assert chosen([image], room, kind="local").kind == "local"
    windows = large.plan.batch * math.prod(large.tiles.window_shape)
    roomy = 2 * max(footprint.WORKER_BYTES.values()) + footprint.ROOMY_BYTES_PER_PIXEL * windows
    assert roomy > footprint.worker_bytes(large)
    monkeypatch.setattr(footprint, "worker_bytes", lambda *_: 1 // 0)  # not asked for
    assert chosen([large], client + 64 * roomy + 1).workers == 64
