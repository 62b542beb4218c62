"""The network compiled by OpenVINO, on the CPU: batch norm folded, activations fused and reused.

The graph is torch's own trace of the network (`segpipe.segmenter.tracing`), kept in the user's cache;
it is compiled once per process, for windows of any size, which takes a tenth of a second. What is
compiled is not kept: it is good for one version and one CPU.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import llvmlite.binding
import numpy as np
from numpy.typing import NDArray

from segpipe.errors import ModelError, SettingsError
from segpipe.models.modelfile import load_model, model_hash
from segpipe.segmenter.forward import activate
from segpipe.segmenter.graph import Graph
from segpipe.user_cache import cache_folder, code_digest, is_kept, keep, read_kept

if TYPE_CHECKING:
    from types import ModuleType

log = logging.getLogger(__name__)

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVino:
    """A network compiled for the CPU; see `segpipe.segmenter.forward.Forward`.

    Raises
    ------
    ModelError
        When OpenVINO cannot compile the graph, or what it made of it gives other numbers.
    SettingsError
        When this CPU does not have the precision.
    """

    def __init__(self, graph: Graph, *, classes: bool, threads: int, precision: str) -> None:
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
        with refused():
            weights = openvino.Tensor(graph.weights)  # a copy, which it may keep
            read = core.read_model(graph.structure.tobytes(), weights)
            compiled = core.compile_model(read, "CPU", _options(threads, "float32"))
            graph.compare(compiled)
            if precision != "float32":
                compiled = core.compile_model(read, "CPU", _options(threads, precision))
        self._request: Any = compiled.create_infer_request()

    @property
    def made_by(self) -> str:
        """OpenVINO, and the CPU's instructions."""
        return f"openvino {self._version}, cpu {instructions()}"

    def __call__(self, windows: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Probabilities, as `Forward`."""
        with self._lock:
            # the output is memory of the request's, which the next call overwrites
            logits = self._request.infer([windows], share_inputs=True, share_outputs=True)[0]
            return activate(logits, self._classes)


def load_openvino(
    path: Path, *, halo: int, batch: int, classes: bool, threads: int, precision: str
) -> OpenVino:
    """A model file's network compiled for the CPU; without torch where its graph was kept.

    Raises
    ------
    ModelError, SettingsError
        As `OpenVino`, and when the file is not a usable model.
    """
    compiled = functools.partial(OpenVino, classes=classes, threads=threads, precision=precision)
    identity = model_hash(path)
    name = _graph_name(identity, halo, batch)
    kept = read_kept(name)
    if kept is not None:
        try:
            return compiled(Graph.from_bytes(kept))
        except ModelError as error:  # where it is the network, that is told by making it again
            log.warning("what was kept of %s is made again: %s", path.stem, error)
    from segpipe.segmenter.tracing import trace

    network, _ = load_model(path)
    graph = trace(network, halo=halo, batch=batch)
    result = compiled(graph)
    if model_hash(path) == identity:  # else the file was replaced while it was read
        keep(name, graph.to_bytes())
    return result


def keep_graph(path: Path, *, halo: int, batch: int) -> bool:
    """Have `load_openvino` find a graph, in the processes that are going to ask for it.

    Returns
    -------
    bool
        Whether it will: there may be no room for it.

    Raises
    ------
    ModelError, SettingsError
        As `load_openvino`.
    """
    if cache_folder() is None:
        return False
    if read_kept(_graph_name(model_hash(path), halo, batch)) is None:
        load_openvino(path, halo=halo, batch=batch, classes=False, threads=1, precision="float32")
    return graph_is_kept(model_hash(path), halo=halo, batch=batch)


def graph_is_kept(identity: str, *, halo: int, batch: int) -> bool:
    """Whether there is a graph of the model with this hash, so that loading it takes no torch."""
    return is_kept(_graph_name(identity, halo, batch))


def _graph_name(identity: str, halo: int, batch: int) -> str:
    return f"graph-{identity}-{halo}-{batch}-{code_digest('torch', 'openvino')}"


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Whatever a network makes torch or OpenVINO raise, as what a user can do about it."""
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"OpenVINO cannot run this network ({' '.join(str(error).split())[:300]}); "
            "set infer.backend=eager"
        ) from error


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


@functools.cache
def instructions() -> str:
    """The vector instructions of this CPU, on x86 by torch's names."""
    try:
        has = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know this CPU
        return "DEFAULT"
    if all(has.get(f"avx512{part}") for part in ("f", "bw", "dq", "vl")):
        return "AVX512"
    return "AVX2" if has.get("avx2") and has.get("fma") else "DEFAULT"


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
