"""What takes seconds to find out and is the same in every run, kept in a folder of the user's.

The folder is `segpipe` in the user's cache folder (~/.cache on Linux), or in the one that the
environment variable SEGPIPE_CACHE names. Deleting it costs the next run those seconds, nothing else.

Invariant: nothing kept changes a result. A name says all that the content depends on, the code that
makes it included (`code_digest`); a checksum goes before the content; and what cannot be read or written
is as if it were not there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from segpipe import __version__
from segpipe.whole_file import SUFFIX as PARTIAL
from segpipe.whole_file import write_whole

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "SEGPIPE_CACHE"
SUFFIX = ".kept"
MOST_BYTES = 2**30
"""Of all files together: beyond, those go that were not used for longest."""
ABANDONED_S = 86_400
"""Age from which a file that is only partly there is one that nobody writes any more."""
DIGEST_BYTES = 32


def read_kept(name: str) -> memoryview | None:
    """What was kept under this name; None where there is none that is whole."""
    folder = _folder()
    if folder is None:
        return None
    path = folder / (name + SUFFIX)
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return None
    if content[:DIGEST_BYTES] != hashlib.sha256(content[DIGEST_BYTES:]).digest():
        log.warning("%s is damaged, and is made again", path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # it was used now
    return content[DIGEST_BYTES:]


def keep(name: str, content: bytes) -> None:
    """Keep content under a name, where there is room and leave to."""
    folder = _made_folder()
    if folder is None or len(content) > MOST_BYTES:
        return
    with contextlib.suppress(OSError):
        write_whole(folder / (name + SUFFIX), hashlib.sha256(content).digest() + content)
        _tidy(folder)


def can_keep() -> bool:
    """Whether there is a folder to write to."""
    folder = _made_folder()
    return folder is not None and os.access(folder, os.W_OK | os.X_OK)


@functools.cache
def code_digest(*libraries: str) -> str:
    """12 hexadecimal digits that change with segpipe's networks and backends, and with libraries.

    Parameters
    ----------
    libraries
        Packages whose version counts.
    """
    digest = hashlib.sha256(__version__.encode())
    package = Path(__file__).parent
    for folder in ("models", "segmenter", "."):
        for path in sorted((package / folder).glob("*.py")):
            if folder != "." or path.name == "geometry.py":
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for library in libraries:
        digest.update(f"{library} {_version(library)}\0".encode())
    return digest.hexdigest()[:12]


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # installed under another name
        return str(importlib.import_module(library).__version__)


def _folder() -> Path | None:
    """Where things are kept; None where the system knows no place."""
    named = os.environ.get(FOLDER_VARIABLE)
    try:
        folder = (
            Path(named) / "segpipe"
            if named
            else platformdirs.user_cache_path("segpipe", appauthor=False)
        )
    except RuntimeError:  # no home
        return None
    return folder if folder.is_absolute() else None


def _made_folder() -> Path | None:
    folder = _folder()
    try:
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def _tidy(folder: Path) -> None:
    """Remove what was not used for longest, and what was left half written."""
    total = 0
    for used, path, size in sorted(_files(folder), reverse=True):
        total += size
        abandoned = path.name.endswith(PARTIAL) and time.time() - used > ABANDONED_S
        if abandoned or (total > MOST_BYTES and path.name.endswith(SUFFIX)):
            with contextlib.suppress(OSError):
                path.unlink()


def _files(folder: Path) -> Iterator[tuple[float, Path, int]]:
    """When each file of ours was last used, the file, and its bytes."""
    for path in folder.iterdir():
        if path.name.endswith((SUFFIX, PARTIAL)):
            with contextlib.suppress(OSError):  # another process has removed it
                status = path.stat()
                yield status.st_mtime, path, status.st_size
