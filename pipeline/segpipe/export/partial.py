"""Files that appear under their name when they are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segpipe.errors import SegpipeError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write to; what lies there afterwards replaces `path`, and nothing does on an error.

    Raises
    ------
    SegpipeError
        When the disk is full or cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if isinstance(error, SegpipeError):
            raise
        raise SegpipeError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
