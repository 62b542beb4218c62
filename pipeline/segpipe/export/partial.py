"""Files that appear under their name when they are whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segpipe.errors import SegpipeError
from segpipe.whole_file import replacing


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name to write to; what lies there afterwards replaces `path`, and nothing does on an error.

    Raises
    ------
    SegpipeError
        When the disk is full or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            yield partial
    except OSError as error:
        if isinstance(error, SegpipeError):
            raise
        raise SegpipeError(f"cannot write {path}: {error.strerror or error}") from error
