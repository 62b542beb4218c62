"""Safetensors files, hostile until checked: header, tensors, atomic writing.

    8 bytes  length n of the header, little-endian
    n bytes  JSON: {"__metadata__": {"card": "..."}, tensor name: {dtype, shape, data_offsets}, ...}
    rest     the tensors, float32 or float16

Lengths are bounded before they are believed. Reading a header needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from segpipe.errors import ModelError
from segpipe.models.card import nearest
from segpipe.whole_file import write_whole

if TYPE_CHECKING:
    from torch import Tensor

Storage = Literal["float32", "float16"]
"""How the kernels of a network are stored; what has one dimension is float32 always."""

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape."""

LARGEST_HEADER = 4 * 2**20
LARGEST_FILE = 8 * 2**30
DTYPES = ("F32", "F16")
"""What weights are stored as; all become float32 in memory."""
PICKLES = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(1, 6)))
"""How files of torch.save begin: a zip with a pickle in it, or a bare pickle."""


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file.

    Raises
    ------
    ModelError
        When there is none, or the file is shorter than it says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start.startswith(PICKLES) and length > LARGEST_HEADER:
                raise ModelError(
                    f"{path}: a pickle or zip, as torch.save writes, and not safetensors; if it is "
                    "weights, rename it to .pt and bring it in with 'segpipe models import'"
                )
            if len(start) < 8 or not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise ModelError(
                    f"{path}: not a safetensors file, or cut short "
                    f"(header of {length} bytes in a file of {size})"
                )
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    if size > LARGEST_FILE:
        raise ModelError(f"{path}: {size} bytes; a model file has at most {LARGEST_FILE}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise ModelError(f"{path}: the safetensors header is not JSON") from None
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the safetensors header is not a JSON object")
    return header


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the header alone.

    Raises
    ------
    ModelError
        As `read_header`, and when a tensor is not float32 or float16.
    """
    shapes = {}
    for key, entry in _entries(path).items():
        if not isinstance(entry, dict) or entry.get("dtype") not in DTYPES:
            raise ModelError(f"{path}: tensor {key[:100]} is neither float32 nor float16")
        shape = entry.get("shape")
        shapes[key] = tuple(shape) if isinstance(shape, list) else ()
    return shapes


def storage_of(path: Path) -> Storage:
    """The storage: float16 where any tensor of the file is.

    Raises
    ------
    ModelError
        As `read_header`.
    """
    entries = _entries(path).values()
    half = any(isinstance(entry, dict) and entry.get("dtype") == "F16" for entry in entries)
    return "float16" if half else "float32"


def _entries(path: Path) -> dict[str, Any]:
    return {key: entry for key, entry in read_header(path).items() if key != "__metadata__"}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name, on CPU and in memory of their own.

    Raises
    ------
    ModelError
        When the file cannot be read, or is no whole safetensors file.
    """
    import safetensors
    import safetensors.torch

    read_header(path)  # bounds
    try:
        # from bytes, not from a map of the file: a file that shrinks later would kill the process
        tensors: dict[str, Tensor] = safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: not a usable safetensors file ({error})") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    return tensors


def check_shapes(got: Shapes, expected: Shapes, source: str) -> None:
    """Refuse tensors that are not exactly those expected; `source` names them in messages.

    Raises
    ------
    ModelError
        Naming the first tensor that is missing, of another shape, or unexpected.
    """
    for key in expected:
        if key not in got:
            raise ModelError(
                f"{source}: tensor {key} is missing ({len(expected.keys() - got.keys())} of "
                f"{len(expected)} are); is the card's architecture that of the weights?"
            )
        if got[key] != expected[key]:
            raise ModelError(
                f"{source}: tensor {key} has shape {got[key]}, the architecture's has "
                f"{expected[key]}; is the card's architecture that of the weights?"
            )
    for key in got:
        if key not in expected:
            raise ModelError(
                f"{source}: tensor {key[:100]} is none of the architecture's"
                f"{nearest(key, expected)}"
            )


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file, all of it or nothing: one of that name is replaced at the end.

    Raises
    ------
    ModelError
        When the file cannot be written.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror})") from None
