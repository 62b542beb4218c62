"""What `segpipe models import` understands that is not a segpipe model file."""

from __future__ import annotations

import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segpipe.errors import ModelError

FLAT_KEYS = {
    "foreground_threshold": ("decode", "foreground"),
    "interior_thresholds": ("decode", "interior"),
    "min_area": ("decode", "min_area"),
    "growth_levels": ("decode", "growth_levels"),
    "growth_steps": ("decode", "growth_steps"),
    "trained_on": ("training_data",),
    "outputs": ("outputs",),
    "normalisation": ("normalisation",),
}
"""Key of a flat card -> where it stands in ours."""
ARCHITECTURE_KEYS = ("width", "depth", "padding", "norm")
DAMAGED = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)
"""What torch's reader was seen to raise for files of which bytes were changed."""
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
"""Under which training scripts store the state dict beside other things."""


def read_card_fields(header: Mapping[str, Any]) -> dict[str, Any]:
    """Fields for our card, as far as a safetensors header has any.

    A card of ours is returned as it is. A flat one, whose `architecture` is a name, gives what
    `FLAT_KEYS` and `ARCHITECTURE_KEYS` name; its other keys say what the weights already say, or
    nothing that we know, and are dropped.
    """
    metadata = header.get("__metadata__")
    text = metadata.get("card") if isinstance(metadata, dict) else None
    try:
        card = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        card = None
    if not isinstance(card, dict):
        return {}
    if not isinstance(card.get("architecture"), str):
        return card
    parameters = {key: card[key] for key in ARCHITECTURE_KEYS if key in card}
    fields: dict[str, Any] = {
        "architecture": {"name": card["architecture"], "parameters": parameters}
    }
    for key, place in FLAT_KEYS.items():
        if key in card:
            part = fields
            for step in place[:-1]:
                part = part.setdefault(step, {})
            part[place[-1]] = card[key]
    return fields


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt or .pth file, by name; the file's code is never run.

    Understands a bare state dict, one under "state_dict", "model_state_dict" or "model", and the
    "module." that data-parallel training puts before each name.

    Raises
    ------
    ModelError
        When the file cannot be read, or holds anything but tensors and plain values.
    """
    _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickle protocols: it loads, or it does not
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except DAMAGED as error:
        raise ModelError(
            f"{path}: not a state dict of plain tensors ({_reason(error)}); "
            "save one with torch.save(model.state_dict(), path)"
        ) from None
    for key in STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ModelError(f"{path}: holds no state dict of tensors by name")
    for key, value in content.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise ModelError(f"{path}: tensor {key[:100]} is sparse, quantised or complex")
        if value.nbytes > value.untyped_storage().nbytes():  # a few bytes can be of any shape
            raise ModelError(f"{path}: tensor {key[:100]} has more values than the file holds")
    if content and all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return content


def _check_archive(path: Path) -> None:
    """Refuse an archive whose parts are compressed, which torch.save never does: they may be bombs."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return  # torch says what is wrong with it
    if any("/code/" in name for name in names):
        raise ModelError(
            f"{path}: a TorchScript program, which would have to be run; "
            "save the weights with torch.save(model.state_dict(), path)"
        )
    if packed:
        raise ModelError(f"{path}: its parts are compressed, which torch.save does not do")


def _reason(error: Exception) -> str:
    """What made torch refuse a file, in a few words."""
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)|to the global ([\w.]+)|global[: ]+([\w.]+\.[\w.]+)", text)
    if named:
        name = next(group for group in named.groups() if group)
        return f"it holds objects or code, such as {name[:100]}, which is not run"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds something else, or is damaged"
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else "cut short"
