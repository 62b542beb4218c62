"""A model written for other programs, in the format that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from segpipe.errors import SettingsError
from segpipe.exchange.graphs import onnx_bytes, torchscript_bytes
from segpipe.exchange.package import bioimageio_package
from segpipe.models.modelfile import find_model, load_model, model_geometry
from segpipe.models.tensors import write_atomically

SUFFIXES = {".onnx": "onnx", ".pt": "torchscript", ".pth": "torchscript", ".zip": "bioimageio"}


def export_model(
    model: str, destination: Path, kind: str | None = None, authors: Sequence[str] = ()
) -> str:
    """Write a model; what was written, in a few words.

    Parameters
    ----------
    kind
        onnx, torchscript or bioimageio; None: by the suffix of the destination.

    Raises
    ------
    SettingsError
        When neither says the format.
    ModelError
        When the model cannot be used or not be exported, or the file not be written.
    """
    kind = kind or SUFFIXES.get(destination.suffix.lower())
    if kind not in SUFFIXES.values():
        raise SettingsError(
            f"{destination}: which format? give it with --format, or end the name in .onnx, .pt or .zip"
        )
    path = find_model(model)
    if kind == "bioimageio":
        write_atomically(destination, bioimageio_package(path, authors))
        return "a package that bioimageio.spec finds valid"
    network, card = load_model(path)
    write = onnx_bytes if kind == "onnx" else torchscript_bytes
    write_atomically(destination, write(network, card, model_geometry(card)))
    return f"{', '.join(card.channels)} -> logits of {', '.join(card.outputs)}"
