"""What can run the network on a CPU, on the same windows: speed, memory, distance to eager torch.

    python tests/benchmarks/backends.py --processes 2          a thread each: as segpipe runs
    python tests/benchmarks/backends.py --threads 2

Every row is a process of its own (or several at once, the same in each), so that its memory is its
own. Mpx/s are of the cores that are kept, per second of CPU: on a machine with nothing else to do
that is per core. The best of the repeats counts; trust ratios. "core" rows leave out what the halo's
outputs would cost. ONNX Runtime is measured where it and onnx are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from segpipe.models.modelfile import find_model, load_model
from segpipe.segmenter import load_segmenter
from segpipe.segmenter.eager import Eager
from segpipe.segmenter.forward import activate
from segpipe.segmenter.openvino import import_quietly

HALO = 96
REFERENCE = "eager channels_last"
Windows = NDArray[np.float32]


def main() -> None:
    """Measure each row, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nuclei-fluorescence")
    parser.add_argument("--core", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--processes", type=int, default=1, help="that run at once")
    parser.add_argument("--windows", type=int, default=4, help="forwards to take the best of")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rows", nargs="+", help="only these", choices=ROWS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        measure(given)
        return
    rows = [REFERENCE, *(row for row in given.rows or ROWS if row != REFERENCE)]
    print(
        f"{given.model}, core {given.core}, {given.processes} processes of {given.threads} threads, "
        f"torch {torch.__version__}, OpenVINO {import_quietly().__version__.split('-')[0]}, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
        for _ in range(given.repeats):
            for row in rows:
                found[row] += together(row, Path(folder), given)
        expected = np.load(Path(folder) / f"{REFERENCE}.npy")
        print(
            f"{'':<26}{'CPU s':>7}{'wall s':>8}{'Mpx/CPU s':>11}{'times':>7}{'peak MB':>9}  apart"
        )
        best = {row: min(one["cpu"] for one in told) for row, told in found.items() if told}
        for row, cpu in best.items():
            wall = min(one["wall"] for one in found[row])
            peak = max(one["peak"] for one in found[row])
            apart = np.abs(np.load(Path(folder) / f"{row}.npy") - expected).max()
            print(
                f"{row:<26}{cpu:>7.2f}{wall:>8.2f}{given.core**2 / 1e6 / cpu:>11.2f}"
                f"{best[REFERENCE] / cpu:>7.2f}{peak / 1e6:>9.0f}  {apart:.1e}"
            )
        for row in rows:
            if row not in best:
                print(f"NOT RUN: {row}")


def together(row: str, folder: Path, given: argparse.Namespace) -> list[dict[str, float]]:
    """One row in so many processes at once; empty where it is not to be had."""
    command = [sys.executable, __file__, "--one", row, "--model", given.model]
    for option in ("core", "threads", "windows"):
        command += [f"--{option}", str(getattr(given, option))]
    command += ["--output", str(folder / f"{row}.npy")]
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=kept)
        for _ in range(given.processes)
    ]
    told = [one.communicate()[0] for one in running]
    if any(one.returncode for one in running):
        raise SystemExit(f"{row} failed")
    return [json.loads(text) for text in told if text]


def measure(given: argparse.Namespace) -> None:
    """In a process of its own: the least seconds of a forward, and the peak of the memory."""
    size = given.core + 2 * HALO
    y, x = np.mgrid[:size, :size].astype(np.float32)
    blobs = (np.sin(x / 7) * np.sin(y / 9)).clip(0) * (1 + np.sin(x / 210) * np.cos(y / 170))
    noise = np.random.default_rng(0).standard_normal((size, size), np.float32)
    window = (blobs / 2 + noise / 20)[None, None]
    run = ROWS[given.one](given)
    if run is None:
        return
    rim = (window.shape[-1] - run(window).shape[-1]) // 2
    spent = []
    for _ in range(given.windows):
        wall, cpu = time.perf_counter(), time.process_time()
        result = run(window)
        spent.append((time.process_time() - cpu, time.perf_counter() - wall))
    edge = HALO - rim
    np.save(given.output, result[..., edge : size - 2 * rim - edge, edge : size - 2 * rim - edge])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cpu, wall = (min(column) for column in zip(*spent, strict=True))
    print(json.dumps({"cpu": cpu, "wall": wall, "peak": peak}))


# --- the rows -------------------------------------------------------------------------------------

Row = Callable[[argparse.Namespace], Callable[[Windows], Windows] | None]


def ours(**options: str | bool) -> Row:
    """A segmenter of ours with these options."""

    def make(given: argparse.Namespace) -> Callable[[Windows], Windows] | None:
        if options.get("precision") == "bfloat16" and options["backend"] == "openvino":
            core = import_quietly().Core()
            if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                return None
        return load_segmenter(find_model(given.model), "cpu", threads=given.threads, **options)

    return make


def folded(given: argparse.Namespace) -> Callable[[Windows], Windows]:
    """Eager torch with each batch norm folded into the convolution before it."""
    network, card = load_model(find_model(given.model))
    for module in network.modules():
        if isinstance(getattr(module, "norm", None), nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()
    return Eager(
        network,
        torch.device("cpu"),
        halo=network.margin,
        classes=card.classes,
        threads=given.threads,
        memory_format="channels_last",
        precision="float32",
    )


def onnxruntime(given: argparse.Namespace) -> Callable[[Windows], Windows] | None:
    """ONNX Runtime with its default optimisations."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")):
        return None
    import onnxruntime as runtime

    network, card = load_model(find_model(given.model))
    size = given.core + 2 * HALO
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/network.onnx"
        example = torch.zeros(1, network.channels, size, size)
        torch.onnx.export(network, (example,), file, dynamo=False)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = given.threads
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda windows: activate(session.run(None, {name: windows})[0], card.classes)


ROWS: dict[str, Row] = {
    "eager contiguous": ours(backend="eager", memory_format="contiguous"),
    REFERENCE: ours(backend="eager"),
    "eager, folded": folded,
    "eager, core": ours(backend="eager", core_only=True),
    "onnxruntime": onnxruntime,
    "openvino": ours(backend="openvino"),
    "openvino, core": ours(backend="openvino", core_only=True),
    "eager bfloat16, core": ours(backend="eager", precision="bfloat16", core_only=True),
    "openvino bfloat16, core": ours(backend="openvino", precision="bfloat16", core_only=True),
}


if __name__ == "__main__":
    main()
