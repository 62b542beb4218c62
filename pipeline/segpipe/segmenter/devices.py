"""The device by its name, and how many there are."""

from __future__ import annotations

import torch

from segpipe.errors import SettingsError


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
