"""torch as it comes, on any device: the reference."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segpipe.models.network import Network
from segpipe.segmenter.core import Core
from segpipe.segmenter.forward import MEMORY_FORMATS, PRECISIONS, OutOfMemory, activate

_FORMATS = dict(zip(MEMORY_FORMATS, (torch.channels_last, torch.contiguous_format), strict=True))
_TYPES = {name: getattr(torch, name) for name in PRECISIONS}


class Eager:
    """A network in eager torch; see `segpipe.segmenter.forward.Forward`."""

    def __init__(
        self,
        network: Network,
        device: torch.device,
        *,
        halo: int,
        classes: bool,
        threads: int,
        memory_format: str,
        precision: str,
    ) -> None:
        self._device = device
        self._classes = classes
        self._threads = threads
        self._memory_format = _FORMATS[memory_format]
        self._precision = precision
        self._network = Core(network.requires_grad_(False), halo).eval()
        self._network.to(device=device, memory_format=self._memory_format)  # type: ignore[call-overload]
        if device.type == "cpu":
            steady(self._network)
            _keep_freed_memory()

    @property
    def made_by(self) -> str:
        """torch, and the device."""
        if self._device.type == "cuda":
            kind = f"cuda {torch.cuda.get_device_name(self._device)}"
        elif self._device.type == "cpu":
            kind = f"cpu {torch.backends.cpu.get_cpu_capability()}"
        else:
            kind = self._device.type
        return f"torch {torch.__version__}, {kind}"

    def __call__(self, windows: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Probabilities, as `Forward`."""
        # OpenMP keeps the number per calling thread, so a pool's threads each need it; and a dask
        # nanny sets OMP_NUM_THREADS=1, so it must be explicit
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode(), self._numerics():
                return self._probabilities(windows)
        except torch.OutOfMemoryError as error:
            told = OutOfMemory(str(error))
        # its traceback held the activations: only now can they go
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        raise told

    def _probabilities(self, windows: NDArray[np.float32]) -> NDArray[np.float32]:
        logits = self._network(self._to_device(windows)).float().contiguous()
        if self._device.type == "cpu":
            return activate(logits.numpy(), self._classes)
        active = logits.softmax(dim=1) if self._classes else logits.sigmoid()
        result: NDArray[np.float32] = active.cpu().numpy()
        return result

    def _to_device(self, windows: NDArray[np.float32]) -> Tensor:
        tensor = torch.from_numpy(windows)
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True, memory_format=self._memory_format)

    @contextmanager
    def _numerics(self) -> Iterator[None]:
        """Precision as asked for; on CUDA no TF32, and the same algorithms in every run."""
        with ExitStack() as stack:
            if self._device.type == "cuda":
                stack.enter_context(
                    torch.backends.cudnn.flags(
                        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
                    )
                )
            if self._precision != "float32":
                stack.enter_context(torch.autocast(self._device.type, _TYPES[self._precision]))
            yield


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


def steady(network: nn.Module) -> None:
    """Send 1x1 convolutions to oneDNN whatever the number of threads; modifies the network.

    With one thread torch computes undilated 1x1 convolutions itself, with more by oneDNN, and the
    last bits differ (`use_mkldnn` in aten/src/ATen/native/Convolution.cpp: "for 1x1 filters MKLDNN
    is faster than THNN when multi-threaded"; measured here, oneDNN is faster with one as well).
    Dilation means nothing to a 1x1 kernel, and a dilated convolution always goes to oneDNN.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            module.dilation = (2, 2)
