"""A model file to a Segmenter: normalised windows in, probabilities out, on one device.

What the bytes of the output depend on, found by trying (torch 2.13, x86 with AVX-512, CPU, float32,
U-Nets of several widths, 1 to 4 threads, batches of 1 to 4; `tests/test_segmenter.py`):

    =================  =============================================================================
    batch-mates        no
    slot in the batch  no with channels_last; 1x1 convolutions in contiguous format, for odd sizes
    threads            no with channels_last, once 1x1 convolutions go to oneDNN (`_steady`). Yes
                       where batch is 1 and a layer's input has 20,480 values or fewer: tiny windows
    batch size         yes, 1 against more, for the same layers. So a batch is always filled
    settings           window, memory format, precision: yes
    =================  =============================================================================

torch's own sigmoid and softmax on CPU depend on the slot and on the threads (what is left over of
a vector is computed by scalar code), and numpy's do not, so probabilities are computed by numpy
there. What is not among the settings is in `Segmenter.made_by`.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segpipe.errors import ModelError, SettingsError
from segpipe.models.card import ModelCard, nearest
from segpipe.models.context import next_admissible
from segpipe.models.modelfile import load_model, model_geometry
from segpipe.models.network import Network

logger = logging.getLogger(__name__)

MEMORY_FORMATS = {
    "channels_last": torch.channels_last,
    "contiguous": torch.contiguous_format,
}
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Segmenter:
    """Callable: windows -> probabilities. One per process and device; made by `load_segmenter`.

    Attributes
    ----------
    context, halo, stride, margin
        Pixels; see `segpipe.models.context` and `segpipe.models.network`.
    channels
        C, of the windows.
    outputs
        Names of the K outputs.
    exact
        Whether tiling cannot be seen in the result.
    card, device
        The model's card; where it runs.
    batch, batch_used
        Windows in a call of the network: as asked for, and what the memory has allowed so far.
        Where they differ the bytes are no longer those of the plan: record it.
    """

    def __init__(
        self,
        network: Network,
        card: ModelCard,
        device: torch.device,
        *,
        threads: int = 1,
        batch: int = 1,
        memory_format: str = "channels_last",
        precision: str = "float32",
    ) -> None:
        geometry = model_geometry(card)
        self.context: int = geometry.context
        self.halo: int = geometry.halo
        self.stride: int = geometry.stride
        self.margin: int = geometry.margin
        self.exact: bool = geometry.exact
        self.channels: int = network.channels
        self.outputs: tuple[str, ...] = card.outputs
        self.card = card
        self.device = device
        self.threads = threads
        self.batch = self.batch_used = batch
        self.memory_format = memory_format
        self.precision = precision
        self._network = network.requires_grad_(False).eval()
        self._network.to(device=device, memory_format=MEMORY_FORMATS[memory_format])  # type: ignore[call-overload]
        if device.type == "cpu":
            _steady(self._network)
            _keep_freed_memory()

    @property
    def made_by(self) -> str:
        """What the bytes depend on besides image, model and settings: torch, device, batch used."""
        if self.device.type == "cuda":
            kind = f"cuda {torch.cuda.get_device_name(self.device)}"
        elif self.device.type == "cpu":
            kind = f"cpu {torch.backends.cpu.get_cpu_capability()}"
        else:
            kind = self.device.type
        return f"torch {torch.__version__}, {kind}, batch {self.batch_used}"

    def __call__(self, windows: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Probabilities: (N, K, H - 2 margin, W - 2 margin) float32 in [0, 1].

        The sigmoid of each output, or the softmax over them where the card's outputs are classes.

        Parameters
        ----------
        windows
            (N, C, H, W) float32, normalised; any N of at least 1.

        Raises
        ------
        ModelError
            When the windows' channels or shape are not ones that the network takes.
        SettingsError
            When a single window is too large for the GPU's memory.
        """
        self._check(windows)
        # OpenMP keeps the number per calling thread, so a pool's threads each need it; and a dask
        # nanny sets OMP_NUM_THREADS=1, so it must be explicit
        torch.set_num_threads(self.threads)
        outputs: list[NDArray[np.float32]] = []
        done = 0
        while done < len(windows):
            group = windows[done : done + self.batch_used]
            try:
                outputs.append(self._probabilities(group))
            except torch.OutOfMemoryError as error:
                self._halve_batch(group.shape[-2:], error)
                continue
            done += len(group)
        return np.concatenate(outputs)

    def _check(self, windows: NDArray[np.float32]) -> None:
        if windows.ndim != 4 or len(windows) < 1:
            raise ValueError(f"windows of shape {windows.shape}; expected (N, C, H, W)")
        if windows.shape[1] != self.channels:
            raise ModelError(
                f"the image has {windows.shape[1]} channels, model {self.card.name} takes "
                f"{self.channels} ({', '.join(self.card.channels)}); choose with --channel"
            )
        for size in windows.shape[2:]:
            if not self._network.admissible(size):
                raise ModelError(
                    f"model {self.card.name} takes no window of {size} pixels; "
                    f"the next size up is {next_admissible(self._network, size)}"
                )

    def _probabilities(self, group: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities of at most `batch_used` windows, computed as exactly `batch_used`."""
        filled = np.zeros((self.batch_used, *group.shape[1:]), np.float32)
        filled[: len(group)] = group
        with torch.inference_mode(), self._numerics():
            logits = self._network(self._to_device(filled)).float().contiguous()
            if self.device.type == "cpu":
                result = _activate(logits.numpy(), self.card.classes)
            else:
                active = logits.softmax(dim=1) if self.card.classes else logits.sigmoid()
                result = active.cpu().numpy()
        return result[: len(group)]

    def _to_device(self, windows: NDArray[np.float32]) -> Tensor:
        tensor = torch.from_numpy(windows)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(
            self.device, non_blocking=True, memory_format=MEMORY_FORMATS[self.memory_format]
        )

    @contextmanager
    def _numerics(self) -> Iterator[None]:
        """Precision as asked for; on CUDA no TF32, and the same algorithms in every run."""
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(
                    torch.backends.cudnn.flags(
                        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
                    )
                )
            if self.precision != "float32":
                stack.enter_context(torch.autocast(self.device.type, PRECISIONS[self.precision]))
            yield

    def _halve_batch(self, shape: tuple[int, ...], error: torch.OutOfMemoryError) -> None:
        if self.batch_used == 1:
            raise SettingsError(
                f"one window of {shape[0]} x {shape[1]} pixels does not fit the memory of "
                f"{self.device}; set tile.core to a smaller multiple of {self.stride}, "
                "or use --device cpu"
            ) from error
        self.batch_used //= 2
        logger.warning(
            "%s ran out of memory; going on with batches of %d instead of %d windows",
            self.device,
            self.batch_used,
            self.batch,
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def load_segmenter(
    model: Path,
    device: str = "auto",
    *,
    threads: int = 1,
    batch: int = 1,
    memory_format: str = "channels_last",
    precision: str = "float32",
) -> Segmenter:
    """The segmenter of a model file.

    Parameters
    ----------
    model
        See `segpipe.models.modelfile.find_model`.
    device
        "auto" (CUDA, else MPS, else CPU), "cpu", "cuda", "cuda:1", "mps".
    threads
        That torch uses on CPU; part of the numeric plan, not taken from the environment.
    batch
        Windows in each call of the network.
    memory_format
        "channels_last" or "contiguous".
    precision
        "float32", or "float16" or "bfloat16" by autocast. float16 needs a GPU.

    Raises
    ------
    ModelError
        When the file is not a usable model.
    SettingsError
        When the device is not there, or a setting is not one of those above.
    """
    place = choose_device(device)
    for name, value in (("threads", threads), ("batch", batch)):
        if value < 1:
            raise SettingsError(f"{name} is {value}; expected at least 1")
    _check_setting("memory_format", memory_format, MEMORY_FORMATS)
    _check_setting("precision", precision, PRECISIONS)
    if precision == "float16" and place.type == "cpu":
        raise SettingsError("precision float16 needs a GPU; use float32 or bfloat16 on CPU")
    network, card = load_model(model)
    return Segmenter(
        network,
        card,
        place,
        threads=threads,
        batch=batch,
        memory_format=memory_format,
        precision=precision,
    )


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA, else MPS, else CPU.

    Raises
    ------
    SettingsError
        When the name is none, or this machine or this build of torch lacks the device.
    """
    present = {"cpu": 1, "cuda": torch.cuda.device_count()}
    present["mps"] = int(torch.backends.mps.is_available())
    if name == "auto":
        return torch.device("cuda" if present["cuda"] else "mps" if present["mps"] else "cpu")
    kind, _, index = name.partition(":")
    if kind not in present or not (index == "" or index.isdecimal()):
        raise SettingsError(f"device {name!r} is none; expected auto, cpu, cuda, cuda:1 or mps")
    if int(index or 0) >= present[kind]:
        raise SettingsError(
            f"device {name} was asked for, but torch {torch.__version__} sees "
            f"{present[kind]} {kind} devices here; use --device cpu, or auto"
        )
    return torch.device(name)


def gpu_count(name: str) -> int:
    """CUDA devices that `device` may use: 0 where it is another type."""
    return torch.cuda.device_count() if device_type(name) == "cuda" else 0


def device_type(name: str) -> str:
    """ "cpu", "cuda" or "mps": what `choose_device(name)` comes to."""
    return choose_device(name).type


def _check_setting(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise SettingsError(
            f"{name} is {value!r}{nearest(value, known)}; expected one of {', '.join(known)}"
        )


def _keep_freed_memory() -> None:
    """Have glibc reuse large buffers in this process instead of giving each back to the kernel.

    A network allocates and frees its activations layer by layer, tens of megabytes each; by default
    every one is mapped anew, and its pages zeroed. Measured on windows of 1216 x 1216 and one
    thread: 1.4 times the speed (a third of the time was the kernel's), for 0.4 GB more per process.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        never, trim_threshold, mmap_max = 0, -1, -4
        mallopt(mmap_max, never)
        mallopt(trim_threshold, 2**31 - 1)


def _activate(logits: NDArray[np.float32], classes: bool) -> NDArray[np.float32]:
    """Softmax over axis 1 or sigmoid, each pixel by itself: see the top of the module."""
    result: NDArray[np.float32]
    with np.errstate(over="ignore"):  # exp of a large number: infinity, and so 0
        if classes:
            result = np.exp(logits - logits.max(axis=1, keepdims=True))
            result /= result.sum(axis=1, keepdims=True)
        else:
            one = np.float32(1)
            result = one / (one + np.exp(-logits))
    return result


def _steady(network: nn.Module) -> None:
    """Send 1x1 convolutions to oneDNN whatever the number of threads; modifies the network.

    With one thread torch computes undilated 1x1 convolutions itself, with more by oneDNN, and the
    last bits differ (`use_mkldnn` in aten/src/ATen/native/Convolution.cpp: "for 1x1 filters MKLDNN
    is faster than THNN when multi-threaded"; measured here, oneDNN is faster with one as well).
    Dilation means nothing to a 1x1 kernel, and a dilated convolution always goes to oneDNN.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            module.dilation = (2, 2)
