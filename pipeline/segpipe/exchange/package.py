"""A package of the BioImage Model Zoo: a zip that says in rdf.yaml how to run what else is in it.

    rdf.yaml          what it is, checked by bioimageio.spec before the package is handed out
    README.md         the card in words, and where the description falls short of segpipe
    weights.onnx      of the same network; see `segpipe.exchange.graphs`
    weights.pt
    test_input.npy    (1, C, H, W) float32, an image as it comes
    test_output.npy   (1, K, H, W) float32, probabilities of the network itself in torch
    cover.png

The same model gives the same bytes, but for the TorchScript archive and with other versions of torch.
"""

from __future__ import annotations

import gc
import io
import re
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from segpipe import __version__
from segpipe.errors import ModelError
from segpipe.exchange.example import cover_png, example_image
from segpipe.exchange.graphs import OPSET, eager_logits, onnx_bytes, torchscript_bytes
from segpipe.exchange.package_text import citations, readme
from segpipe.models.card import ModelCard
from segpipe.models.geometry import ModelGeometry
from segpipe.models.modelfile import load_model, model_geometry
from segpipe.segmenter.forward import activate

FORMAT = "0.5.5"
"""Of the description: as old as softmax, newer readers take it."""
EPSILON = 1e-12
"""The format wants one to divide by; float32 does not see this one unless an image is constant."""
TEST_SIZE = 256
LARGEST_DESCRIPTION = 512
MADE = (2020, 1, 1, 0, 0, 0)
"""Time of the files in the zip, which is not told, so that the same model gives the same bytes."""

Array = NDArray[np.float32]


def bioimageio_package(model: Path, authors: Sequence[str] = ()) -> bytes:
    """The package of a model file, as the bytes of a zip.

    Parameters
    ----------
    authors
        Names; the zoo wants at least one before it publishes a model.

    Raises
    ------
    ModelError
        As `load_model` and the exporters; when bioimageio.spec is not installed, or finds fault with
        the description.
    """
    spec = _import_spec()
    network, card = load_model(model)
    geometry = model_geometry(card)
    image = example_image(card, _test_size(geometry))
    raw = image[np.newaxis].astype(np.float32)
    logits = eager_logits(network, described_scaling(raw, card))
    files = {
        "README.md": readme(card, geometry).encode(),
        "weights.onnx": onnx_bytes(network, card, geometry),
        "weights.pt": torchscript_bytes(network, card, geometry),
        "test_input.npy": _npy(raw),
        "test_output.npy": _npy(activate(logits, card.classes)),
        "cover.png": cover_png(image, model, card),
    }
    description = describe_package(card, geometry, authors)
    if not _is_spdx(card.licence):
        files["LICENCE.txt"] = card.licence.encode()
        description["license"] = {"source": "LICENCE.txt"}
    files = {"rdf.yaml": _yaml(description), **files}
    _validate(spec, files, card.name)
    return _zip(files)


def describe_package(
    card: ModelCard, geometry: ModelGeometry, authors: Sequence[str]
) -> dict[str, Any]:
    """What rdf.yaml says, as a tree."""
    import torch

    smallest = 2 * geometry.halo + geometry.stride
    outputs, name = ", ".join(card.outputs), card.architecture.name
    about = f"Segments {', '.join(card.channels)}: {outputs} by {name}."
    return {
        "type": "model",
        "format_version": FORMAT,
        "name": re.sub(r"[^A-Za-z0-9_+\- ()]", "-", f"{card.name} (segpipe)"),
        "description": f"{about} {card.limits}"[:LARGEST_DESCRIPTION],
        "version": __version__,
        "timestamp": "2020-01-01T00:00:00",
        "authors": [{"name": name} for name in authors],
        "cite": citations(card.architecture.name),
        "license": card.licence,
        "documentation": "README.md",
        "covers": ["cover.png"],
        "tags": [*("segmentation", "instance-segmentation", "nuclei", "2d", "unet", "segpipe")],
        "inputs": [
            {
                "id": "image",
                "description": f"{', '.join(card.channels)}; intensities as they are"[:128],
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": list(card.channels)},
                    *(
                        {
                            "type": "space",
                            "id": axis,
                            "size": {"min": smallest, "step": geometry.stride},
                            **_scale(card),
                        }
                        for axis in ("y", "x")
                    ),
                ],
                "data": {"type": "float32"},
                "test_tensor": {"source": "test_input.npy"},
                "preprocessing": _preprocessing(card),
            }
        ],
        "outputs": [
            {
                "id": "probabilities",
                "description": f"probability of {outputs}"[:128],
                "axes": [
                    {"type": "batch"},
                    {"type": "channel", "channel_names": list(card.outputs)},
                    *(_output_axis(axis, card, geometry) for axis in ("y", "x")),
                ],
                "data": {"type": "float32", "range": [0.0, 1.0]},
                "test_tensor": {"source": "test_output.npy"},
                "postprocessing": [
                    {"id": "softmax", "kwargs": {"axis": "channel"}}
                    if card.classes
                    else {"id": "sigmoid"}
                ],
            }
        ],
        "weights": {
            "torchscript": {"source": "weights.pt", "pytorch_version": _release(torch.__version__)},
            "onnx": {"source": "weights.onnx", "opset_version": OPSET, "parent": "torchscript"},
        },
        "config": {
            "segpipe": {
                "card": card.model_dump(mode="json"),
                "geometry": dict(vars(geometry)),
                "test_image": "synthetic",
            }
        },
    }


def described_scaling(raw: Array, card: ModelCard) -> Array:
    """What the description's pre-processing makes of (N, C, H, W); segpipe's own differs a little, as
    the README in the package says."""
    rule = card.normalisation
    if rule.kind == "fixed":
        gain, offset = _gain(rule.low, rule.high)
        linear: Array = (raw * np.float32(gain) + np.float32(offset)).astype(np.float32)
        return linear
    low, high = np.percentile(raw, (rule.low, rule.high), axis=(2, 3), keepdims=True)
    ranged: Array = ((raw - low) / (high - low + EPSILON)).astype(np.float32)
    return ranged


def _preprocessing(card: ModelCard) -> list[dict[str, Any]]:
    rule = card.normalisation
    if rule.kind == "fixed":
        gain, offset = _gain(rule.low, rule.high)
        if (gain, offset) == (1.0, 0.0):
            return []
        return [{"id": "scale_linear", "kwargs": {"gain": gain, "offset": offset}}]
    percentiles = {"min_percentile": rule.low, "max_percentile": rule.high}
    return [
        {"id": "scale_range", "kwargs": {"axes": ["y", "x"], **percentiles, "eps": EPSILON}},
    ]


def _gain(low: float, high: float) -> tuple[float, float]:
    return 1 / (high - low), -low / (high - low)


def _output_axis(axis: str, card: ModelCard, geometry: ModelGeometry) -> dict[str, Any]:
    size = {"tensor_id": "image", "axis_id": axis, "offset": -2 * geometry.margin}
    described = {"type": "space", "id": axis, "size": size, **_scale(card)}
    halo = geometry.halo - geometry.margin
    return described | ({"halo": halo} if halo else {})


def _scale(card: ModelCard) -> dict[str, Any]:
    size = card.pixel_size_um
    return {} if size is None else {"scale": size, "unit": "micrometer"}


def _test_size(geometry: ModelGeometry) -> int:
    """The first size from TEST_SIZE on that the description allows."""
    smallest = 2 * geometry.halo + geometry.stride
    return smallest + max(0, -(-(TEST_SIZE - smallest) // geometry.stride)) * geometry.stride


def _release(version: str) -> str:
    return version.split("+")[0]


def _import_spec() -> Any:
    try:
        import bioimageio.spec
        from loguru import logger
    except ImportError:
        raise ModelError(
            "packages need bioimageio.spec; install it with pip install 'segpipe[export]'"
        ) from None
    logger.disable("bioimageio.spec")  # what it says is in its summary too
    return bioimageio.spec


def _is_spdx(licence: str) -> bool:
    from bioimageio.spec.generic.v0_3 import LicenseId

    try:
        TypeAdapter(LicenseId).validate_python(licence)
    except ValidationError:
        return False
    return True


def _validate(spec: Any, files: dict[str, bytes], name: str) -> None:
    """Let bioimageio.spec look at the files as they will lie in the package."""
    with tempfile.TemporaryDirectory(prefix="segpipe-package-") as folder:
        for file, content in files.items():
            Path(folder, file).write_bytes(content)
        found = load_quietly(spec, Path(folder, "rdf.yaml"))
    summary = found.validation_summary
    if summary.status == "failed" or isinstance(found, spec.InvalidDescr):
        errors = [error for detail in summary.details for error in detail.errors]
        first = (
            f"{'.'.join(map(str, errors[0].loc))}: {errors[0].msg}" if errors else summary.status
        )
        raise ModelError(f"{name}: bioimageio.spec refuses the package ({first[:300]})")


def load_quietly(spec: Any, source: Path | zipfile.ZipFile) -> Any:
    """What bioimageio.spec makes of a description or package, without the warnings that it leaves
    files open, which it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        found = spec.load_description(source, perform_io_checks=True)
        gc.collect()  # closes them here
    return found


def _npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _yaml(tree: dict[str, Any]) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100).encode()


def _zip(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, MADE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return file.getvalue()
