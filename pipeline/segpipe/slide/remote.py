"""OME-Zarr that is not on a disk: http, https, s3 and what else fsspec knows (extra `remote`).

An address is a Path like every other input: `Path("https://host/a.zarr")`, which Path itself writes
with one slash, is told from a file by its scheme.

A store that does not answer within `TIMEOUT_S`, or answers that it is busy or broken, is asked again
after a pause that doubles. What is absent (404) is absent: the fill value, as in a folder.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from segpipe.slide.source import printable, unusable

TIMEOUT_S = 60.0
ATTEMPTS = 5
FIRST_PAUSE_S = 0.5
LEFT_S = 5.0
"""How long an error waits for what was asked for beside it."""

_SCHEME = re.compile(r"(https?|s3|gs|gcs|az|abfs|memory):/+")
_FINAL = (FileNotFoundError, PermissionError, ImportError, TypeError, ValueError)
_BUSY = frozenset({408, 425, 429})


def remote_url(path: Path) -> str | None:
    """The address that a path stands for; None when it is a file or folder.

    >>> remote_url(Path("https://host/a.zarr")), remote_url(Path("a.zarr"))
    ('https://host/a.zarr', None)
    """
    text = path.as_posix()
    found = _SCHEME.match(text)
    return None if found is None else f"{found[1]}://{text[found.end() :]}"


def address(path: Path) -> str:
    """What a path is called by whoever gives it: a path keeps one of the two slashes of an address.

    >>> address(Path("s3://bucket/a.zarr")), address(Path("a.zarr"))
    ('s3://bucket/a.zarr', 'a.zarr')
    """
    return remote_url(path) or os.fspath(path)


def open_store(path: Path) -> Store:
    """The store at a path or address, for reading.

    Raises
    ------
    InputError
        When fsspec, or what it needs for this scheme, is not installed.
    """
    url = remote_url(path)
    if url is None:
        return LocalStore(path, read_only=True)
    try:
        return PatientStore(FsspecStore.from_url(url, read_only=True))
    except ImportError as error:
        raise unusable(
            path,
            f"needs a package that is not installed ({printable(error)})",
            "pip install 'segpipe[remote]'",
        ) from error


class PatientStore(WrapperStore[FsspecStore]):
    """A store for reading over a network: patient within bounds."""

    def __init__(self, store: FsspecStore) -> None:
        super().__init__(store)
        self._asked: set[asyncio.Future[None]] = set()

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The value, None when there is none; errors as `_patiently`."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked.add(ended)
        try:
            value = await _patiently(key, lambda: self._store.get(key, prototype, byte_range))
        except OSError:
            # Zarr asks for several keys at once, and takes the first error for the end. What is left
            # then would say so in tracebacks when the process ends.
            self._asked.remove(ended)
            if self._asked:
                await asyncio.wait(self._asked, timeout=LEFT_S)
            raise
        finally:
            self._asked.discard(ended)
            ended.set_result(None)
        return value if value is None else _part(value, byte_range)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """As `get`, of several."""
        return list(
            await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))
        )

    async def exists(self, key: str) -> bool:
        """Whether there is a value. fsspec takes any answer that is an error for a no."""
        from zarr.core.buffer import default_buffer_prototype

        return await self.get(key, default_buffer_prototype()) is not None


def _part(value: Buffer, wanted: ByteRequest | None) -> Buffer:
    """The part that was asked for, also from a server that does not know ranges and sent all."""
    if isinstance(wanted, RangeByteRequest) and len(value) > wanted.end - wanted.start:
        return value[wanted.start : wanted.end]
    if isinstance(wanted, SuffixByteRequest) and len(value) > wanted.suffix:
        return value[len(value) - wanted.suffix :]
    if isinstance(wanted, OffsetByteRequest):
        raise OSError("a part without an end cannot be told from the whole")
    return value


async def _patiently(key: str, ask: Callable[[], Awaitable[Buffer | None]]) -> Buffer | None:
    """What the store answers, asked up to `ATTEMPTS` times.

    Raises
    ------
    OSError
        When it does not answer, or with an error.
    """
    begun, pause = time.monotonic(), FIRST_PAUSE_S
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await asyncio.wait_for(ask(), TIMEOUT_S)
        except Exception as error:
            if not _may_pass(error) or attempt == ATTEMPTS:
                times = "once" if attempt == 1 else f"{attempt} times"
                asked = f"asked {times} in {time.monotonic() - begun:.0f} s"
                raise OSError(f"{printable(key)}: {_reason(error)}, {asked}") from error
        await asyncio.sleep(pause)
        pause *= 2
    raise AssertionError


def _may_pass(error: Exception) -> bool:
    """Whether it may go well the next time."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status >= 500 or status in _BUSY
    if "Credential" in type(error).__name__:  # botocore's, of which there are several
        return False
    return not isinstance(error, _FINAL)


def _reason(error: Exception) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int) and status:
        return f"the server answers {status} {printable(getattr(error, 'message', ''), 60)}".strip()
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT_S:g} s"
    return printable(str(error) or type(error).__name__, 100)


def remote_fingerprint(path: Path) -> str:
    """Hash of the metadata at an address: chunks that change beneath the same metadata are not seen.

    Raises
    ------
    OSError, ValueError
        When there is no group.
    """
    group = zarr.open_group(open_store(path), mode="r", use_consolidated=False)
    digest = hashlib.blake2b(repr(sorted(group.attrs.asdict().items())).encode(), digest_size=8)
    for dataset in _datasets(group.attrs.asdict()):
        digest.update(repr(group[dataset].metadata.to_dict()).encode())
    return digest.hexdigest()


def _datasets(attributes: dict[str, Any]) -> list[str]:
    metadata = attributes.get("ome", attributes)
    multiscales = metadata.get("multiscales", []) if isinstance(metadata, dict) else []
    return [str(one["path"]) for scale in multiscales for one in scale.get("datasets", [])]
