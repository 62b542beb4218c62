"""A network as a graph that other programs run: ONNX and TorchScript.

Both take normalised windows (N, C, H, W) float32 and give logits (N, K, H - 2 margin, W - 2 margin);
N is free, and so are H and W as far as the network takes them. Normalisation, sigmoid, tiling and
decode are not in them: the card is, which says how (in the ONNX file's metadata, and as `card.json`,
an extra file of the TorchScript archive).

Graphs are made by a tracer, which is blind to what depends on data or shape. So each is run on windows
of another size and number than it was traced with, and compared with the network, before it is handed
out.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segpipe.errors import ModelError
from segpipe.models.card import ModelCard
from segpipe.models.geometry import ModelGeometry
from segpipe.models.network import Network
from segpipe.models.onnx_weights import CARD_KEY, import_onnx
from segpipe.models.tensors import check_shapes

OPSET = 18
"""Of ONNX: of December 2022, so that runtimes of some years read it."""
TOLERANCE = 1e-4
"""Difference to the network, relative to the largest logit, from which a graph is another one; float32
rounding makes 1e-6 to 1e-5."""

Logits = NDArray[np.float32]


def onnx_bytes(network: Network, card: ModelCard, geometry: ModelGeometry) -> bytes:
    """An ONNX file of the network. Its initializers have the names and values of our weights.

    So no operation is folded into another, batch norm included: whoever runs it does that when loading.
    Compared with the network by OpenVINO, where that is installed.

    Raises
    ------
    ModelError
        When onnx or onnxscript is not installed, the exporter cannot follow the network, or what it
        made gives other numbers.
    """
    onnx = import_onnx()
    if importlib.util.find_spec("onnxscript") is None:
        raise ModelError(
            "ONNX export needs the package onnxscript; install it with pip install 'segpipe[export]'"
        )
    dim = torch.export.Dim
    offset = 2 * geometry.halo if geometry.margin else 0
    shapes = {0: dim("windows"), 2: _sizes("h", geometry, offset), 3: _sizes("w", geometry, offset)}
    example = torch.zeros(2, network.channels, *_example_size(geometry))
    with _quiet():
        try:
            program = torch.onnx.export(
                _frozen(network),
                (example,),
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=(shapes,),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ModelError(f"{card.name}: not exported ({_first_line(error)})") from error
    if program is None:
        raise ModelError(f"{card.name}: torch gave no ONNX program")
    model = program.model_proto
    _keep_all_weights(onnx, model, network)
    entry = model.metadata_props.add()
    entry.key, entry.value = CARD_KEY, card.model_dump_json()
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString(deterministic=True)
    if importlib.util.find_spec("openvino") is not None:
        _compare(_openvino_runner(data), network, geometry, card.name)
    return data


def torchscript_bytes(network: Network, card: ModelCard, geometry: ModelGeometry) -> bytes:
    """A TorchScript archive of the network, for `torch.jit.load`.

    Raises
    ------
    ModelError
        When torch cannot trace the network, or what it made gives other numbers.
    """
    example = torch.zeros(1, network.channels, *_example_size(geometry))
    file = io.BytesIO()
    with _quiet(), torch.inference_mode():
        traced: Any = torch.jit.trace(_frozen(network), example, check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, file, _extra_files={"card.json": card.model_dump_json()})
        loaded: Any = torch.jit.load(io.BytesIO(file.getvalue()))  # type: ignore[no-untyped-call]
        _compare(
            lambda windows: loaded(torch.from_numpy(windows)).numpy(), network, geometry, card.name
        )
    return file.getvalue()


def eager_logits(network: Network, windows: Logits) -> Logits:
    """What the network itself gives: (N, C, H, W) -> (N, K, H - 2 margin, W - 2 margin) float32."""
    with torch.inference_mode():
        result: Logits = _frozen(network)(torch.from_numpy(windows)).numpy()
    return result


def _frozen(network: Network) -> Network:
    return network.requires_grad_(False).eval()


def _sizes(name: str, geometry: ModelGeometry, offset: int) -> Any:
    """Heights or widths that the network takes: stride * n + offset."""
    number = torch.export.Dim(name, min=1, max=2**16)
    scaled = geometry.stride * number if geometry.stride > 1 else number
    return scaled + offset if offset else scaled


def _example_size(geometry: ModelGeometry) -> tuple[int, int]:
    """Two sizes that differ, of more than one stride."""
    offset = 2 * geometry.halo if geometry.margin else 0
    return offset + 3 * geometry.stride, offset + 4 * geometry.stride


def _keep_all_weights(onnx: Any, model: Any, network: Network) -> None:
    """Add what the graph does not use, such as heads that only a training looks at, and refuse a graph
    whose initializers are not our weights: `segpipe models import` could not read it."""
    weights = {
        key: tensor
        for key, tensor in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    found = {entry.name for entry in model.graph.initializer}
    used = {name for node in model.graph.node for name in node.input}
    for key, tensor in weights.items():
        if key not in found and key not in used:
            model.graph.initializer.append(onnx.numpy_helper.from_array(tensor.numpy(), key))
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    kept = {entry.name: tuple(entry.dims) for entry in model.graph.initializer}
    check_shapes({key: kept[key] for key in kept if key in shapes}, shapes, "the ONNX graph")


def _openvino_runner(data: bytes) -> Callable[[Logits], Logits]:
    from segpipe.segmenter.openvino import import_quietly

    core = import_quietly().Core()
    options = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16 on CPUs that have it
    compiled = core.compile_model(core.read_model(io.BytesIO(data)), "CPU", options)
    return lambda windows: compiled(windows)[0]


def _compare(
    run: Callable[[Logits], Logits], network: Network, geometry: ModelGeometry, name: str
) -> None:
    """Refuse a graph that is not the network, by windows of other sizes than it was traced with."""
    random = np.random.default_rng(0)
    for count, more in ((1, 5), (3, 2)):
        height, width = (size + more * geometry.stride for size in _example_size(geometry))
        windows = random.standard_normal((count, network.channels, height, width), np.float32)
        expected, found = eager_logits(network, windows), run(windows)
        if found.shape != expected.shape:
            raise ModelError(
                f"{name}: not exported (the graph gives {found.shape} for windows of {windows.shape}, "
                f"not {expected.shape})"
            )
        apart = float(np.abs(found - expected).max() / max(1, np.abs(expected).max()))
        if not apart <= TOLERANCE:
            raise ModelError(
                f"{name}: not exported (the graph's numbers are {apart:.2g} of the largest away from "
                "those of the network)"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of themselves: deprecations, missing packages, tracing."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines()
    return lines[0][:300] if lines else type(cause).__name__
