"""Which library runs the network: a rule, never a timing, because the bytes depend on it."""

from __future__ import annotations

import importlib.util
import logging

from segpipe.errors import SettingsError

log = logging.getLogger(__name__)

EAGER, OPENVINO = "eager", "openvino"
BACKENDS = (EAGER, OPENVINO)
"""`eager` is torch as it comes, and the reference. `openvino` compiles the network for the CPU."""


def choose_backend(name: str, *, on_gpu: bool) -> str:
    """One of `BACKENDS`. "auto" is OpenVINO on a CPU, eager on a GPU.

    Where OpenVINO is not installed (there are platforms that it is not made for) "auto" is eager,
    and a warning says so: slower, and equal to rounding only.

    Raises
    ------
    SettingsError
        When OpenVINO is asked for by name where it cannot be.
    """
    if name == "auto":
        if on_gpu:
            return EAGER
        if not _installed():
            log.warning(
                "OpenVINO is not installed, so the network runs in eager torch, which is slower; "
                "pip install openvino, or set infer.backend=eager"
            )
            return EAGER
        return OPENVINO
    if name not in BACKENDS:
        raise SettingsError(f"backend is {name!r}; expected auto, {' or '.join(BACKENDS)}")
    if name == OPENVINO and on_gpu:
        raise SettingsError("infer.backend openvino is for the CPU; use --device cpu, or auto")
    if name == OPENVINO and not _installed():
        raise SettingsError(
            "the network is to run by OpenVINO, which is not installed here: pip install openvino, "
            "or set infer.backend=eager (what was inferred is then done again)"
        )
    return name


def _installed() -> bool:
    return importlib.util.find_spec("openvino") is not None
