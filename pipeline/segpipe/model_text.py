"""What `segpipe models` tells of models, in lines for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from segpipe.errors import ModelError
from segpipe.models.card import ModelCard
from segpipe.models.modelfile import list_models, model_geometry, read_card
from segpipe.models.tensors import read_shapes, storage_of
from segpipe.stages.image import Model

HEADER = ("name", "network", "channels", "params", "context", "halo", "exact", "licence")
NARROWEST = 40
RIGHT = (3, 4, 5)
"""Columns of numbers."""


def list_lines(width: int) -> Iterator[str]:
    """A table of the models that are known by name, no line wider than `width` columns.

    A file that cannot be used is a line of its own that says why. What does not fit the width is cut
    off, network and licence first.
    """
    rows: list[Sequence[str]] = [HEADER]
    broken: list[str] = []
    for path in list_models():
        try:
            rows.append(_row(path))
        except ModelError as error:
            broken.append(f"{path.stem}: {error}")
    yield from _table(rows, max(width, NARROWEST))
    for line in broken:
        yield textwrap.shorten(line, max(width, NARROWEST), placeholder=" ...")


def _row(path: Path) -> Sequence[str]:
    card = read_card(path)
    geometry = model_geometry(card)
    return (
        path.stem,
        card.architecture.name,
        ", ".join(card.channels),
        f"{count_parameters(path) / 1e6:.2f} M",
        f"{geometry.context} px",
        f"{geometry.halo} px",
        "yes" if geometry.exact else "no",
        card.licence,
    )


def count_parameters(path: Path) -> int:
    """Learned values of a model: of its tensors, all but the running statistics of batch norm."""
    import math

    return sum(
        math.prod(shape)
        for key, shape in read_shapes(path).items()
        if not key.endswith((".running_mean", ".running_var"))
    )


def _table(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Columns as wide as they need; where that is too wide the longest words are shortened."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    order = [HEADER.index(name) for name in ("licence", "network", "channels", "name")]
    for column in order:
        over = sum(widths) + 2 * (len(widths) - 1) - width
        if over > 0:
            widths[column] -= min(over, max(0, widths[column] - len(HEADER[column])))
    for row in rows:
        cells = [
            _cut(cell, size).rjust(size) if place in RIGHT else _cut(cell, size).ljust(size)
            for place, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()[:width]


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1] + "\N{HORIZONTAL ELLIPSIS}"


def facts(model: Model) -> Iterator[tuple[str, str]]:
    """Keys and values about a model beside its card."""
    yield "file", str(model.path)
    yield "size", f"{model.path.stat().st_size / 1e6:.1f} MB, kernels in {storage_of(model.path)}"
    yield "hash", model.hash
    yield "parameters", f"{count_parameters(model.path) / 1e6:.2f} M"
    yield "exact", why_exact(model.card, exact=model.exact)
    yield "context", f"{model.context} px"
    yield "halo", f"{model.halo} px"
    yield "stride", f"{model.stride} px"


def why_exact(card: ModelCard, *, exact: bool) -> str:
    """Whether tiling can be seen, and why."""
    if exact:
        return "yes: every operation is local and shift-equivariant, so tiling cannot be seen"
    from segpipe.models.network import build_twin, whole_window_operations

    found = whole_window_operations(build_twin(*card.network_arguments))
    cause = (
        f"{', '.join(found)} looks at the whole window"
        if found
        else ("an operation depends on the size of the window")
    )
    return f"no: {cause}, so tiles may show"
