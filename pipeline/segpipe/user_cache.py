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
import importlib.util
import logging
import os
import time
from collections.abc import Iterator
from importlib import metadata
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
PROBE = "probe"


def cache_folder() -> Path | None:
    """Where things are kept; None where the system knows no place."""
    named = os.environ.get(FOLDER_VARIABLE)
    try:
        if named:
            folder = Path(named).expanduser() / "segpipe"
        else:
            folder = platformdirs.user_cache_path("segpipe", appauthor=False)
    except RuntimeError:  # no home
        return None
    if folder.is_absolute():
        return folder
    if named:
        _warn_once(f"{FOLDER_VARIABLE} is {named!r}, which is no absolute path: nothing is kept")
    return None


def read_kept(name: str) -> memoryview | None:
    """What was kept under this name; None where there is none that is whole."""
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / (name + SUFFIX)
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return None
    if content[:DIGEST_BYTES] != hashlib.sha256(content[DIGEST_BYTES:]).digest():
        _warn_once(f"{path} is damaged, and is made again")
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # it was used now
    return content[DIGEST_BYTES:]


def is_kept(name: str) -> bool:
    """Whether something was kept under this name, damaged or not."""
    folder = cache_folder()
    return folder is not None and (folder / (name + SUFFIX)).is_file()


def keep(name: str, content: bytes) -> bool:
    """Keep content under a name; whether there was room and leave to."""
    folder = cache_folder()
    if folder is None or len(content) + DIGEST_BYTES > MOST_BYTES:
        return False
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(folder / (name + SUFFIX), hashlib.sha256(content).digest() + content)
    except OSError:
        return False
    _tidy(folder)
    return True


def kept_bytes() -> int | None:
    """Bytes of all that is kept; None where nothing can be."""
    folder = cache_folder()
    if folder is None or not keep(PROBE, b""):
        return None
    (folder / (PROBE + SUFFIX)).unlink(missing_ok=True)
    return sum(size for _, _, size in _files(folder))


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
    sources = [package / "geometry.py"]
    for folder in ("models", "segmenter"):
        sources += sorted((package / folder).glob("*.py"))
    for path in sources:
        if path.is_file():  # else segpipe is installed in another form, and its version must do
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for library in libraries:
        digest.update(f"{library} {_version(library)}\0".encode())
    return digest.hexdigest()[:12]


def _version(library: str) -> str:
    """Told by what is installed, since importing it may take seconds, or do more than that."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:  # it came under another name, or was built here
        spec = importlib.util.find_spec(library)
        if spec is None or spec.origin is None:
            return "none"
        return f"{spec.origin} of {Path(spec.origin).stat().st_mtime_ns}"


@functools.cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def _tidy(folder: Path) -> None:
    """Remove what was not used for longest, and what was left half written."""
    total = 0
    for used, path, size in sorted(_files(folder), reverse=True):
        partial = path.name.endswith(PARTIAL)
        abandoned = partial and time.time() - used > ABANDONED_S
        if abandoned or (not partial and total + size > MOST_BYTES):
            with contextlib.suppress(OSError):
                path.unlink()
        else:
            total += size


def _files(folder: Path) -> Iterator[tuple[float, Path, int]]:
    """When each file of ours was last used, the file, and its bytes."""
    for path in folder.iterdir():
        if path.name.endswith((SUFFIX, PARTIAL)):
            with contextlib.suppress(OSError):  # another process has removed it
                status = path.stat()
                yield status.st_mtime, path, status.st_size
