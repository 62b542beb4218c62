"""A network of torch to the graph that OpenVINO compiles: torch's own trace of it."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segpipe.errors import SettingsError
from segpipe.models.context import next_admissible
from segpipe.models.network import Network
from segpipe.segmenter.core import Core
from segpipe.segmenter.graph import Graph
from segpipe.segmenter.openvino import import_quietly, refused


def trace(network: Network, *, halo: int, batch: int) -> Graph:
    """The graph of what a network makes of the cores of `batch` windows of any size.

    Raises
    ------
    ModelError
        When there is none.
    SettingsError
        When temporary files cannot be written.
    """
    module = Core(network.requires_grad_(False), halo).eval()
    with refused():
        try:
            graph = _converted(module, batch)
        except RuntimeError:
            # Seen once, of a worker that started on a busy machine: a graph with two inputs of a
            # network that has one. Why is not known; it could not be brought about again.
            graph = _converted(module, batch)
        example = _example(module, batch)
    return Graph(*_as_files(graph), *example)


def _converted(module: Core, batch: int) -> Any:
    import_quietly()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    channels = module.network.channels
    size = next_admissible(module.network, 2 * module.halo + 1)
    with warnings.catch_warnings(), torch.inference_mode():
        # of its deprecation, and of shapes that become constants: the example has another shape
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            module, torch.zeros(batch, channels, size, size), check_trace=False
        )
        # Not openvino.convert_model, which silences the program's logging while it works, and after
        # a failure for good.
        decoder = TorchScriptPythonDecoder(traced)  # must outlive the conversion
        frontend = FrontEndManager().load_by_framework("pytorch")
        graph = frontend.convert(frontend.load(decoder))
    graph.reshape([batch, channels, -1, -1])
    return graph


def _as_files(graph: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Structure and weights, as uint8. OpenVINO writes them to files, and to nothing else."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            structure, weights = Path(folder) / "graph.xml", Path(folder) / "graph.bin"
            import_quietly().serialize(graph, structure, weights)
            return np.fromfile(structure, np.uint8), np.fromfile(weights, np.uint8)
    except (OSError, RuntimeError) as error:
        raise SettingsError(
            f"cannot write temporary files ({' '.join(str(error).split())}); is the disk full? Set "
            "TMPDIR to a folder with room, or infer.backend=eager"
        ) from error


def _example(module: Core, batch: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Windows, and what torch makes of them."""
    height = next_admissible(module.network, 2 * module.halo + 1)
    width = next_admissible(module.network, height + 1)
    shape = (batch, module.network.channels, height, width)
    windows = np.random.default_rng(0).standard_normal(shape, np.float32)
    with torch.inference_mode():
        return windows, module(torch.from_numpy(windows)).numpy()
