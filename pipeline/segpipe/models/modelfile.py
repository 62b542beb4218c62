"""The model file: safetensors with the weights, and the card as JSON in its header.

Weights are float32, or float16 to half the file where its writer asked for that (`write_model`); the
header says which, tensor by tensor. In memory they are float32.

A model file may come from anywhere and is hostile until checked (`segpipe.models.tensors`): tensor
names and shapes are compared with those of the architecture before anything is built, and nothing
in it is executed. A pickle is read only by `import_model`, as weights only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segpipe.errors import ModelError
from segpipe.models.card import ModelCard, nearest, parse_card, parse_card_json
from segpipe.models.geometry import ModelGeometry
from segpipe.models.tensors import (
    Storage,
    check_shapes,
    read_header,
    read_shapes,
    read_tensors,
    write_atomically,
)
from segpipe.user_cache import code_digest, keep, read_kept

if TYPE_CHECKING:
    from torch import Tensor

    from segpipe.models.network import Network

__all__ = [
    "ModelCard",
    "find_model",
    "import_model",
    "is_model_name",
    "list_models",
    "load_model",
    "model_geometry",
    "model_hash",
    "read_card",
    "write_model",
]

SUFFIX = ".safetensors"
WEIGHTS = Path(__file__).parent / "weights"
"""The models that come with segpipe."""
FOLDER_VARIABLE = "SEGPIPE_MODELS"
"""Environment variable that names a folder of the user's models."""


def read_card(path: Path) -> ModelCard:
    """The card of a model file; reads only its header, and does not need torch.

    Raises
    ------
    ModelError
        When the file cannot be read, is no model file, or its card is not valid.
    """
    metadata = read_header(path).get("__metadata__")
    text = metadata.get("card") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise ModelError(
            f"{path}: no model card in its header; bring it in with 'segpipe models import'"
        )
    return parse_card_json(text, str(path))


def load_model(path: Path) -> tuple[Network, ModelCard]:
    """The network of a model file, on CPU in eval mode, and its card.

    Raises
    ------
    ModelError
        As `read_card`, and when tensors are missing, unexpected, or of another shape or type than
        the card's architecture has, or hold NaN.
    """
    import torch

    from segpipe.models.network import build_network, describe_tensors

    card = read_card(path)
    expected = describe_tensors(*card.network_arguments)
    check_shapes(read_shapes(path), expected, str(path))
    tensors = _finite(read_tensors(path), path)
    with torch.device("meta"):
        network = build_network(*card.network_arguments)
    network.load_state_dict(tensors, assign=True)
    return network.eval(), card


def _finite(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors as float32, none of which may hold NaN or infinity."""
    import torch

    weights = {key: tensor.detach().to(torch.float32) for key, tensor in tensors.items()}
    for key, tensor in weights.items():
        if not np.isfinite(tensor.numpy()).all():
            raise ModelError(f"{path}: tensor {key} holds NaN or infinity")
    return weights


def write_model(
    path: Path, network: Network, card: ModelCard, storage: Storage = "float32"
) -> None:
    """Write a model file, all of it or nothing: a file of that name is replaced at the end.

    The same network and card give the same bytes.

    Parameters
    ----------
    storage
        "float16" rounds the kernels of convolutions to half precision, which halves the file: another
        model, with other probabilities and another hash. Its figures are those of the file that is
        written, so measure them after. Biases and what batch norm holds stay float32: they are few.

    Raises
    ------
    ModelError
        When the network is not that of the card, a weight is too large for float16, or the file
        cannot be written.
    """
    import safetensors.torch
    import torch

    from segpipe.models.network import describe_tensors

    tensors = {
        key: tensor.detach().to("cpu", torch.float32).contiguous()
        for key, tensor in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    check_shapes(shapes, describe_tensors(*card.network_arguments), str(path))
    if storage == "float16":
        for key, tensor in tensors.items():
            if tensor.dim() > 1:
                tensors[key] = tensor.half()
                if tensor.isfinite().all() and not tensors[key].isfinite().all():
                    raise ModelError(f"{path}: tensor {key} is too large for float16; use float32")
    data = safetensors.torch.save(tensors, metadata={"card": card.model_dump_json()})
    write_atomically(path, data)


def model_geometry(card: ModelCard) -> ModelGeometry:
    """Context, halo, stride, margin and exactness of the card's network.

    Measured on its narrow twin, so it costs no more for a large model; see `segpipe.models.context`.
    That takes torch, and so a second and more: the answer is kept for the processes that come.

    Raises
    ------
    ModelError
        When the architecture is none, or its parameters are out of bounds.
    """
    return _geometry(json.dumps(card.network_arguments))


@functools.lru_cache(maxsize=64)
def _geometry(network_arguments: str) -> ModelGeometry:
    digest = hashlib.sha256(network_arguments.encode()).hexdigest()[:16]
    name = f"geometry-{digest}-{code_digest()}"
    kept = read_kept(name)
    if kept is not None:
        return ModelGeometry(**json.loads(bytes(kept)))
    from segpipe.models.context import measure_geometry
    from segpipe.models.network import build_twin

    measured = measure_geometry(build_twin(*json.loads(network_arguments)))
    keep(name, json.dumps(vars(measured)).encode())
    return measured


def model_hash(path: Path) -> str:
    """First 16 hexadecimal digits of the file's SHA-256: the model's identity in records.

    Raises
    ------
    ModelError
        When the file cannot be read.
    """
    try:
        state = path.stat()
        return _hash(path, (state.st_ino, state.st_mtime_ns, state.st_size))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None


@functools.lru_cache(maxsize=64)
def _hash(path: Path, _state: tuple[int, int, int]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def list_models() -> list[Path]:
    """The files of the models that `find_model` knows by name, sorted by name (their stem).

    Those of the folder that the environment variable SEGPIPE_MODELS names go before those that
    come with segpipe, where the names are the same.

    Raises
    ------
    ModelError
        When SEGPIPE_MODELS names no folder.
    """
    models = {path.stem: path for path in WEIGHTS.glob(f"*{SUFFIX}")}
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        if not Path(folder).is_dir():
            raise ModelError(f"{FOLDER_VARIABLE} is {folder!r}, which is not a folder")
        models |= {path.stem: path for path in Path(folder).glob(f"*{SUFFIX}")}
    return [models[name] for name in sorted(models)]


def is_model_name(name_or_path: str | Path) -> bool:
    """Whether this is the name of a model, not a path: no .safetensors at its end, and no folder."""
    path = Path(name_or_path)
    return path.suffix != SUFFIX and len(path.parts) == 1


def find_model(name_or_path: str | Path) -> Path:
    """The file of a model given by name or by path.

    What ends in .safetensors or has a folder in it is a path; all else is a name.

    Raises
    ------
    ModelError
        When there is none: lists the known, and the nearest.
    """
    path = Path(name_or_path)
    if not is_model_name(path):
        if not path.is_file():
            raise ModelError(f"{path}: no such model file")
        return path
    models = {model.stem: model for model in list_models()}
    name = str(name_or_path)
    if name not in models:
        raise ModelError(
            f"no model {name!r}{nearest(name, models)}; known are {', '.join(models) or 'none'}, "
            f"a path to a {SUFFIX} file, or the files in the folder {FOLDER_VARIABLE} names"
        )
    return models[name]


def import_model(
    source: Path,
    destination: Path,
    card_fields: Mapping[str, Any],
    storage: Storage = "float32",
) -> ModelCard:
    """Turn foreign weights into a model file at `destination`; the card that it got.

    Parameters
    ----------
    source
        A .safetensors file, with or without a card (ours, or one with the flat keys that
        `segpipe.models.foreign` lists), or a .pt or .pth file with a state dict, of which nothing
        but tensors is read (`torch.load(weights_only=True)`), or an .onnx file, of which only the
        weights are taken (`segpipe.models.onnx_weights`). Tensors named as in one of
        `segpipe.models.layouts` are renamed.
    card_fields
        Keys of the card; they go before those of the source's own. Where the layout of the tensors
        is known, `architecture` may be left out, or give some of its parameters.
    storage
        As for `write_model`.

    Raises
    ------
    ModelError
        When the source cannot be read, a key of the card is missing or wrong, or the tensors are
        not exactly those of the architecture.
    """
    from segpipe.models.foreign import read_card_fields, read_state_dict
    from segpipe.models.layouts import architecture_fields, recognise, translate
    from segpipe.models.network import build_network, describe_tensors
    from segpipe.models.onnx_weights import read_onnx

    kind = source.suffix.lower()
    fields: dict[str, Any] = {}
    if kind == SUFFIX:
        fields, tensors = read_card_fields(read_header(source)), read_tensors(source)
    elif kind == ".onnx":
        fields, tensors = read_onnx(source)
    else:
        tensors = read_state_dict(source)
    tensors = {
        key: tensor for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")
    }
    fields |= card_fields
    layout = recognise(tensors, str(source))
    given = fields.get("architecture", {})
    if layout is not None and isinstance(given, Mapping):
        fields["architecture"] = architecture_fields(layout, tensors, given, str(source))
    card = parse_card(fields, str(source))
    if layout is not None:
        tensors = translate(layout, tensors, *card.network_arguments[1:])
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    check_shapes(shapes, describe_tensors(*card.network_arguments), str(source))
    tensors = _finite(tensors, source)
    network = build_network(*card.network_arguments)
    network.load_state_dict(tensors)
    write_model(destination, network, card, storage)
    return card
