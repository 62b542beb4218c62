"""What `segpipe models import` understands that is not a segpipe model file."""

from __future__ import annotations

import json
import pickle
import warnings
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickle protocols: it loads, or it does not
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else "cut short"
        raise ModelError(
            f"{path}: not a state dict of plain tensors ({reason}); "
            "save one with torch.save(model.state_dict(), path)"
        ) from None
    for key in STATE_DICT_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ModelError(f"{path}: holds no state dict of tensors by name")
    if content and all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return content
