"""Weights and card out of an ONNX file, as `segpipe models export` writes it.

A graph is not run: what we need to know of a network, how far it looks and at which sizes it may be
cut, is a property of one of our architectures, and an arbitrary graph does not tell it. So only the
initializers are taken, by the names that they have in the architecture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segpipe.errors import ModelError

CARD_KEY = "segpipe_card"
"""Under which an exported graph holds the card, as JSON, in its metadata."""
LARGEST_FILE = 2**31 - 1
"""Bytes; protobuf's own bound."""


def import_onnx() -> Any:
    """The package onnx.

    Raises
    ------
    ModelError
        When it is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise ModelError(
            "ONNX files need the package onnx; install it with pip install 'segpipe[export]'"
        ) from None
    return onnx


def read_onnx(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of the card, none where there is no card of ours, and the weights by name.

    Integers and single numbers among the initializers are not weights but shapes and the like, and
    left out.

    Raises
    ------
    ModelError
        When the file cannot be read, is not ONNX, keeps weights outside of itself, or has weights
        that are not of floats.
    """
    onnx = import_onnx()
    from google.protobuf.message import DecodeError

    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ModelError(f"{path}: an ONNX file has at most {LARGEST_FILE} bytes")
        model = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except DecodeError:
        raise ModelError(f"{path}: not an ONNX file, or cut short") from None
    tensors: dict[str, Tensor] = {}
    for entry in model.graph.initializer:
        if entry.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelError(f"{path}: keeps its weights in other files; save it as one file")
        if not entry.dims or entry.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
            continue
        if entry.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            raise ModelError(f"{path}: tensor {entry.name[:100]} is neither float32 nor float16")
        try:
            tensors[entry.name] = torch.from_numpy(onnx.numpy_helper.to_array(entry).copy())
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"{path}: tensor {entry.name[:100]} is damaged ({' '.join(str(error).split())[:200]})"
            ) from None
    if not tensors:
        raise ModelError(f"{path}: an ONNX file without weights")
    return _card_fields(model), tensors


def _card_fields(model: Any) -> dict[str, Any]:
    text = next((entry.value for entry in model.metadata_props if entry.key == CARD_KEY), "")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
