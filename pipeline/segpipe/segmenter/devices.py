"""The device by its name, and how many there are; torch is asked only where it could see a GPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from segpipe.errors import SettingsError

if TYPE_CHECKING:
    import torch

NVIDIA_DRIVER = "libcuda.so.1"
"""Library of the driver, without which torch sees no CUDA device."""
NVIDIA_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")
"""Signs of a driver whose library is where torch looks and this process does not."""
HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that leave torch no device; the last is Slurm's."""


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" is CUDA, else MPS, else CPU.

    Raises
    ------
    SettingsError
        When the name is none, or this machine or this build of torch lacks the device.
    """
    import torch

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
    if device_type(name) != "cuda":
        return 0
    import torch

    return torch.cuda.device_count()


def device_type(name: str) -> str:
    """ "cpu", "cuda" or "mps": what `choose_device(name)` comes to."""
    if name == "cpu" or (name == "auto" and not gpu_is_possible()):
        return "cpu"
    return choose_device(name).type


@functools.cache
def gpu_is_possible() -> bool:
    """Whether torch, were it imported (more than a second), could see a GPU here.

    Not where its build is for the CPU, nor on Linux where one for CUDA finds no driver, or all devices
    are hidden from it.
    """
    if sys.platform == "darwin":
        return True
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return True  # importing it will say what is wrong
    built = build_of(Path(spec.origin).with_name("version.py"))
    if built != {"cuda"} or sys.platform != "linux":
        return bool(built)
    if os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN:
        return False
    if any(Path(path).exists() for path in NVIDIA_FILES):
        return True
    try:
        ctypes.CDLL(NVIDIA_DRIVER)
    except OSError:
        return False
    return True


def build_of(version: Path) -> set[str]:
    """For which GPUs torch was built, by the assignments in its version.py; all if that is unknown."""
    kinds = {"cuda", "hip"}
    try:
        text = version.read_text()
    except OSError:
        return kinds
    return {
        kind
        for kind in kinds
        if not re.search(rf"^{kind}\b[^=\n]*= *None *$", text, flags=re.MULTILINE)
    }
