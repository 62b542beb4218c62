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
NUMBERS = ("params", "context", "halo")
LEFT_OUT = ("licence", "network", "halo", "channels")
"""Columns that a narrow terminal has no room for, the first to go first."""


def list_lines(width: int) -> Iterator[str]:
    """A table of the models that are known by name, no line wider than `width` columns.

    A file that cannot be used is a line of its own that says why.
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
    """Columns as wide as they need. Where that is too wide channels are shortened, then columns are
    left out, and last the names are shortened."""
    widths = {column: max(len(row[place]) for row in rows) for place, column in enumerate(HEADER)}

    def over() -> int:
        return sum(widths.values()) + 2 * (len(widths) - 1) - width

    def shorten(column: str) -> None:
        widths[column] -= max(0, min(over(), widths[column] - len(column)))

    shorten("channels")
    for column in LEFT_OUT:
        if over() > 0:
            del widths[column]
    shorten("name")
    for row in rows:
        cells = dict(zip(HEADER, row, strict=True))
        fitted = [
            _cut(cells[column], size).rjust(size)
            if column in NUMBERS
            else _cut(cells[column], size).ljust(size)
            for column, size in widths.items()
        ]
        yield "  ".join(fitted).rstrip()


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
