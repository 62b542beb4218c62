"""What takes seconds to find out and is the same in every run, kept in a folder of the user's.

The folder is the one that the environment variable SEGPIPE_CACHE names, else `segpipe` in the user's
cache folder (~/.cache on Linux). Deleting it costs the next run those seconds and nothing else.

Invariant: nothing kept changes a result. A name says all that the content depends on, the code that
makes it included (`code_digest`), and what cannot be read or written is as if it were not there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from segpipe.whole_file import write_whole

FOLDER_VARIABLE = "SEGPIPE_CACHE"
MOST_BYTES = 2**30
"""Of all files together: beyond, those go that were not used for longest."""


def read_kept(name: str) -> bytes | None:
    """Content of the file of this name; None where there is none that can be read."""
    with contextlib.suppress(OSError, RuntimeError):
        path = _folder() / name
        content = path.read_bytes()
        with contextlib.suppress(OSError):
            os.utime(path)  # it was used now
        return content
    return None


def is_kept(name: str) -> bool:
    """Whether there is a file of this name."""
    with contextlib.suppress(OSError, RuntimeError):
        return (_folder() / name).is_file()
    return False


def keep(name: str, content: bytes) -> None:
    """Write the file of this name, where there is room and leave to."""
    if len(content) > MOST_BYTES:
        return
    with contextlib.suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(folder / name, content)
        total = 0
        for path, size in _by_last_use(folder):
            total += size
            if total > MOST_BYTES:
                path.unlink(missing_ok=True)


@functools.cache
def code_digest(*libraries: str) -> str:
    """12 hexadecimal digits that change with segpipe's networks and backends, and with libraries.

    Parameters
    ----------
    libraries
        Packages whose version counts.
    """
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for folder in ("models", "segmenter"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for library in libraries:
        digest.update(f"{library} {importlib.metadata.version(library)}\0".encode())
    return digest.hexdigest()[:12]


def _folder() -> Path:
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else platformdirs.user_cache_path("segpipe", appauthor=False)


def _by_last_use(folder: Path) -> Iterator[tuple[Path, int]]:
    """Files and their bytes, the last used first."""
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process has removed it
            status = path.stat()
            found.append((status.st_mtime, path, status.st_size))
    yield from ((path, size) for _, path, size in sorted(found, reverse=True))
