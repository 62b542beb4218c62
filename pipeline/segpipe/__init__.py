"""Exact instance masks of images too large for memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segpipe.memory import segment
    from segpipe.run import predict
    from segpipe.settings import load_settings

__version__ = "0.1.0"
__all__ = ["__version__", "load_settings", "predict", "segment"]

_HOMES = {"predict": "run", "segment": "memory", "load_settings": "settings"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `segpipe --help` does not wait for torch."""
    if name in _HOMES:
        return getattr(import_module(f"segpipe.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'segpipe' has no attribute {name!r}")
