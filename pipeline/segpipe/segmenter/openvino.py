"""The network compiled by OpenVINO, on the CPU: batch norm folded, activations fused and reused.

The graph comes from torch's own trace of the network and is compiled once per process, for windows
of any size. Nothing is cached on disk: a compiled network is good for one version and one CPU.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from segpipe.errors import ModelError, SettingsError
from segpipe.models.context import next_admissible
from segpipe.models.network import Network
from segpipe.segmenter.forward import Core, activate

if TYPE_CHECKING:
    from types import ModuleType

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
TOLERANCE = 1e-3
"""Difference to eager, relative to the largest logit, from which a compiled network is another one;
rounding makes 1e-6."""


class OpenVino:
    """A network compiled for the CPU; see `segpipe.segmenter.forward.Forward`.

    Raises
    ------
    ModelError
        When OpenVINO cannot compile the network, or what it made of it gives other numbers.
    SettingsError
        When this CPU does not have the precision.
    """

    def __init__(
        self,
        network: Network,
        *,
        halo: int,
        classes: bool,
        threads: int,
        batch: int,
        precision: str,
    ) -> None:
        openvino = import_quietly()
        self._version = str(openvino.__version__).split("-")[0]
        self._classes = classes
        self._lock = threading.Lock()  # a request serves one caller at a time
        core = process_core()
        if precision == "bfloat16" and "BF16" not in core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise SettingsError(
                "infer.precision is bfloat16, which this CPU does not have; use float32"
            )
        module = Core(network.requires_grad_(False), halo).eval()
        try:
            try:
                graph = _graph(module, batch)
            except RuntimeError:
                # Seen once, of a worker that started on a busy machine: a graph with two inputs of a
                # network that has one. Why is not known; it could not be brought about again.
                graph = _graph(module, batch)
            compiled = core.compile_model(graph, "CPU", _options(threads, "float32"))
            _compare(compiled, module, batch)
            if precision != "float32":
                compiled = core.compile_model(graph, "CPU", _options(threads, precision))
        except Exception as error:  # whatever a network makes torch or OpenVINO raise
            raise ModelError(
                f"OpenVINO cannot run this network ({' '.join(str(error).split())[:300]}); "
                "set infer.backend=eager"
            ) from error
        self._request: Any = compiled.create_infer_request()

    @property
    def made_by(self) -> str:
        """OpenVINO, and the CPU's instructions."""
        return f"openvino {self._version}, cpu {torch.backends.cpu.get_cpu_capability()}"

    def __call__(self, windows: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Probabilities, as `Forward`."""
        with self._lock:
            # the output is memory of the request's, which the next call overwrites
            logits = self._request.infer([windows], share_inputs=True, share_outputs=True)[0]
            return activate(logits, self._classes)


def import_quietly() -> ModuleType:
    """The package openvino, without its telemetry.

    Its import would otherwise report to its maker's analytics over the network, and leave files in
    the user's home, unless the user has opted out. Without the package openvino_telemetry OpenVINO
    takes a stub of its own; None makes that import fail.
    """
    cast("dict[str, ModuleType | None]", sys.modules).setdefault("openvino_telemetry", None)
    import openvino

    return cast("ModuleType", openvino)


@functools.cache
def process_core() -> Any:
    """OpenVINO's core, one for the life of the process.

    Its CPU plugin gives the thread that first compiles a network a stack for signal handlers, and unmaps
    that memory with the last core or network, whichever thread lets go of it: if another one does, the
    next signal, be it Ctrl-C, ends the process in a segmentation fault.
    """
    return import_quietly().Core()


def _options(threads: int, precision: str) -> dict[str, Any]:
    """What could differ between machines or runs, said explicitly.

    Pinning is off because several processes on one machine would be pinned to the same cores. The
    default precision is bfloat16 on CPUs that have it.
    """
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "EXECUTION_MODE_HINT": "ACCURACY" if precision == "float32" else "PERFORMANCE",
        "CPU_DENORMALS_OPTIMIZATION": False,
    }


def _graph(module: Core, batch: int) -> Any:
    """OpenVINO's graph of the network, for `batch` windows of any size."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    channels = module.network.channels
    size = next_admissible(module.network, 2 * module.halo + 1)
    with warnings.catch_warnings(), torch.inference_mode():
        # of its deprecation, and of shapes that become constants: `_compare` takes another shape
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


def _compare(compiled: Any, module: Core, batch: int) -> None:
    """Refuse a graph that is not the network: a trace is blind to what depends on data or shape."""
    height = next_admissible(module.network, 2 * module.halo + 1)
    width = next_admissible(module.network, height + 1)
    shape = (batch, module.network.channels, height, width)
    windows = np.random.default_rng(0).standard_normal(shape, np.float32)
    with torch.inference_mode():
        expected = module(torch.from_numpy(windows)).numpy()
    found = compiled(windows)[0]
    if found.shape != expected.shape:
        raise ValueError(f"it gives an output of shape {found.shape}, not {expected.shape}")
    apart = float(np.abs(found - expected).max() / max(1, np.abs(expected).max()))
    if not apart <= TOLERANCE:
        raise ValueError(f"its numbers are {apart:.2g} of the largest away from those of torch")
