"""A file that is there whole or not at all, with the permissions that the umask gives."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SUFFIX = ".partial"
"""Of the name under which a file is written, which begins with a dot."""


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A name to write to; what lies there afterwards replaces `path`, and nothing does on an error.

    For one writer at a time: the name is always the same, so that what a killed one left is replaced by
    the next. The folder must be there.

    Parameters
    ----------
    durable
        Whether to wait until the content is on disk: where its loss would cost more than doing work
        again.

    Raises
    ------
    OSError
        When it cannot be written.
    """
    with _replacing(path.with_name(f".{path.name}{SUFFIX}"), path, durable) as partial:
        yield partial


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file, all of it or nothing, also when several processes do so at once; its folder is made
    if need be.

    Raises
    ------
    OSError
        When it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
    with _replacing(partial, path, durable):
        try:
            partial.write_bytes(data)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)


@contextmanager
def _replacing(partial: Path, path: Path, durable: bool) -> Iterator[Path]:
    try:
        yield partial
        if durable:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
