"""What is done: completion records of regions, manifests of stages, and the lock of an image.

A stage owns a folder of records. Each process that writes appends to a file of its own there,
`<writer>.records`, one entry per pass and region:

    +{"pass": ..., "region": ..., "arrays": {name: [bytes, crc32, dtype, shape], ...}, ...}\n
    the arrays that the region hands on, as plain bytes in C order

A region is done when an entry says so under the pass's fingerprint, with its arrays whole, and its
shard has the recorded length. An entry that is not to count any more begins with `-`.

The shard is on disk before its record is appended, and nobody waits for the record: what a power
failure takes (of work that the system had not written yet, on Linux half a minute) is done again, and
what it tears is told from what is whole by length and checksums, when a stage that was interrupted
reads its records once, at its beginning.

Not a file or folder per pass: of many small images, making files is what takes longest besides the
work itself.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import secrets
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.errors import BusyError, SegpipeError
from segpipe.store import Shard, sync_folder
from segpipe.whole_file import write_whole

Array = np.ndarray[Any, np.dtype[Any]]
PUBLISH = "publish"
"""The pass whose shards replace those of the passes before it."""
FORMAT = 3
"""Of entries. Records of another format count as none: their regions are done again."""
GLANCE_S = 0.1
"""After which a lock is tried a second time: `is_locked` may have looked at it just then."""

KEPT_BYTES = 2**20
"""Arrays of at most so many bytes are kept for whoever asks next."""

_JSON = json.JSONEncoder(ensure_ascii=False, default=str)
_SORTED = json.JSONEncoder(sort_keys=True, default=str)
_PLAIN = json.JSONEncoder(default=str)


def fingerprint(*parts: object) -> str:
    """Short hash of plain values, the same in every process."""
    return hashlib.sha256(_SORTED.encode(parts).encode()).hexdigest()[:16]


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """Replace a JSON file; as `write_text`."""
    write_text(path, json_text(content) + "\n", durable=durable)


def json_text(content: Any, lines: int = 2, indent: int = 1) -> str:
    """JSON with a line for each key of the first two levels; json's own `indent` knows no bounds, and
    takes ten times as long.

    >>> print(json_text({"a": 1, "b": {"c": [2, {"d": 3}], "e": {}}}))
    {
     "a": 1,
     "b": {
      "c": [2, {"d": 3}],
      "e": {}
     }
    }
    """
    if not lines or not isinstance(content, dict) or not content:
        return _JSON.encode(content)
    inside = (
        f"{' ' * indent}{_JSON.encode(str(key))}: {json_text(value, lines - 1, indent + 1)}"
        for key, value in content.items()
    )
    return "{\n" + ",\n".join(inside) + f"\n{' ' * (indent - 1)}}}"


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a file atomically; durably where its loss would cost more than doing work again."""
    try:
        write_whole(path, text.encode("utf-8", "surrogateescape"), durable=durable)
    except OSError as error:
        raise SegpipeError(f"cannot write {path}: {error.strerror or error}") from error
    if durable:
        sync_folder(path.parent)


def _created(path: Path) -> BufferedWriter:
    """A new file, open; its folder is made if need be."""
    try:
        return path.open("wb")
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")


def read_json(path: Path) -> Any | None:
    """Content of a JSON file, None when it is absent or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Record:
    """One finished region: its shard, facts about how it was made, and where its arrays lie.

    Small, because there is one per region and pass: what arrays there are, the entry says.
    """

    pass_name: str
    fingerprint: str
    region: str
    shard: Shard | None
    array: str | None
    """The one that the shard belongs to, from the records' folder."""
    facts: Mapping[str, Any]
    file: str
    offset: int
    """Of the entry, in `file`."""


@functools.cache
def _writer_name(_process: int) -> str:
    return f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(3)}"


class Records:
    """The records of one pass over the regions of one image.

    Parameters
    ----------
    folder
        Where those of the stage lie. Made, emptied and read by one process; appended to by any.
    name
        Of the pass.
    fingerprint
        Of everything that decides the content: input, settings, model.
    array
        The one whose shards the records tell of, if any.
    """

    def __init__(
        self, folder: Path, name: str, fingerprint: str, array: Path | None = None
    ) -> None:
        self.folder = folder
        self.name = name
        self.fingerprint = fingerprint
        self.array = None if array is None else os.path.relpath(array, folder)
        self._latest: tuple[Record, Mapping[str, Array]] | None = None

    def add(
        self,
        region: str,
        shard: Shard | None = None,
        payload: Mapping[str, Array] | None = None,
        **facts: Any,
    ) -> Record:
        """Say that a region is done; its shard must be on disk already.

        Raises
        ------
        OSError
            When it cannot be written; then nothing is said.
        """
        line: dict[str, Any] = {
            "pass": self.name,
            "fingerprint": self.fingerprint,
            "region": region,
            "facts": facts,
        }
        if shard is not None:
            line |= {"shard": [shard.length, shard.checksum], "array": self.array}
        parts = []
        if payload:
            line["arrays"] = told = {}
            for key, array in payload.items():
                # Not as .npy, of which to write and read the header takes longer than all else.
                data, described = array.tobytes(), np.lib.format.dtype_to_descr(array.dtype)
                told[key] = [len(data), zlib.crc32(data), described, array.shape]
                parts.append(data)
        text = _PLAIN.encode(line)
        file, offset = _append(self.folder, b"".join([b"+", text.encode(), b"\n", *parts]))
        record = _record(json.loads(text), file, offset)
        small = sum(map(len, parts)) <= KEPT_BYTES
        self._latest = (record, payload) if payload and small else None
        return record

    def payload(self, record: Record, names: Collection[str] | None = None) -> dict[str, Array]:
        """The arrays that a region handed on, all of them or those asked for; as `read_arrays`.

        Those of the region that this process did last need not be read: of a small image that is all.
        """
        if self._latest is not None and self._latest[0] is record:
            arrays = self._latest[1]
            return {key: arrays[key] for key in arrays if names is None or key in names}
        return read_arrays(self.folder, record.file, record.offset, names)


def _record(line: Mapping[str, Any], file: str, offset: int) -> Record:
    shard = line.get("shard")
    return Record(
        line["pass"],
        line["fingerprint"],
        line["region"],
        None if shard is None else Shard(*shard),
        line.get("array"),
        line["facts"],
        file,
        offset,
    )


def _append(folder: Path, entry: bytes) -> tuple[str, int]:
    """Append to the file of this process, all or nothing; the file's name and where the entry is."""
    name = f"{_writer_name(os.getpid())}.records"
    handle = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        offset = os.lseek(handle, 0, os.SEEK_END)
        try:
            left = memoryview(entry)
            while left:
                left = left[os.write(handle, left) :]
        except OSError:
            os.ftruncate(handle, offset)  # what comes after it would not be read
            raise
    finally:
        os.close(handle)
    return name, offset


def read_records(folder: Path) -> list[Record]:
    """All records of a stage that count, those of a process in the order in which it wrote them."""
    try:
        files = sorted(path.name for path in folder.iterdir() if path.suffix == ".records")
    except FileNotFoundError:
        return []
    return [record for name in files for record in _records_in(folder, name)]


def _records_in(folder: Path, name: str) -> Iterator[Record]:
    with (folder / name).open("rb") as file:
        while True:
            offset = file.tell()
            try:
                counts, line = _entry(file)
                whole = [zlib.crc32(file.read(size)) == crc for size, crc, *_ in _arrays(line)]
                record = _record(line, name, offset)
            except (ValueError, KeyError, TypeError):
                return  # the end, or torn: its process died, and nothing comes after it
            if counts and all(whole):
                yield record


def _entry(file: BufferedReader) -> tuple[bool, dict[str, Any]]:
    """Whether the entry at which a file stands counts, and its line.

    Raises
    ------
    ValueError
        When there is none.
    """
    text = file.readline()
    if text[:1] not in (b"+", b"-") or text[-1:] != b"\n":
        raise ValueError("no entry")
    return text[:1] == b"+", json.loads(text[1:])


def _arrays(line: Mapping[str, Any]) -> Collection[Sequence[Any]]:
    told: Mapping[str, Sequence[Any]] = line.get("arrays", {})
    return told.values()


def read_arrays(
    folder: Path, name: str, offset: int, names: Collection[str] | None = None
) -> dict[str, Array]:
    """The arrays of one entry of a file of records, all of them or those asked for.

    Raises
    ------
    SegpipeError
        When they are damaged.
    """
    found: dict[str, Array] = {}
    try:
        with (folder / name).open("rb") as file:
            file.seek(offset)
            _, line = _entry(file)
            for key, (size, crc, described, shape) in line.get("arrays", {}).items():
                if names is not None and key not in names:
                    file.seek(size, os.SEEK_CUR)
                    continue
                data = bytearray(size)
                if file.readinto(data) < size or zlib.crc32(data) != crc:
                    raise ValueError(key)
                dtype = np.lib.format.descr_to_dtype(described)
                found[key] = np.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:
        raise SegpipeError(
            f"{folder / name} is damaged at byte {offset}; run again with --restart"
        ) from error
    return found


def drop_records(folder: Path, records: Iterable[Record]) -> None:
    """Have these count no more; only for the process that holds the image's lock, while no worker
    writes."""
    for record in records:
        with (folder / record.file).open("r+b") as file:
            file.seek(record.offset)
            file.write(b"-")


@contextmanager
def locked(folder: Path, name: str, *, wait: bool = False) -> Iterator[None]:
    """Hold an image for this process; released when the process ends, however it ends.

    Raises
    ------
    BusyError
        When another process holds it, and it is not waited for.
    """
    with _created(_lock(folder)) as file:
        for tries_left in (1, 0):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if not tries_left:
                    raise BusyError(
                        f"{name}: another segpipe is working on it in {folder}"
                    ) from None
                time.sleep(GLANCE_S)
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process holds this image. To find out, it is held for an instant, but shared."""
    try:
        with _lock(folder).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _lock(folder: Path) -> Path:
    """Beside the folder, not in it: the folder may be removed while it is held."""
    return folder.with_suffix(".lock")
