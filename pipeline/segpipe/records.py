"""What is done: completion records of regions, manifests of stages, and the lock of an image.

A stage owns a folder of records. Each process that writes appends to files of its own:
`<writer>.jsonl` with one line per pass and region, `<writer>.bin` with the small arrays that the region
hands on. A region is done when a line says so under the pass's fingerprint and its shard has the
recorded length. A torn last line, or one under another fingerprint, says nothing.

Not a folder per pass: of many small images, making files and folders is what takes longest besides
the work itself.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segpipe.errors import BusyError, SegpipeError
from segpipe.store import Shard, sync_folder

Array = np.ndarray[Any, np.dtype[Any]]
PUBLISH = "publish"
"""The pass whose shards replace those of the passes before it."""
FORMAT = 2
"""Of lines and arrays. Records of another format count as none: their regions are done again."""


def fingerprint(*parts: object) -> str:
    """Short hash of plain values, the same in every process."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """Replace a JSON file; as `write_text`."""
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    write_text(path, text + "\n", durable=durable)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace a file atomically; durably where its loss would cost more than doing work again."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with _created(partial) as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
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


class Piece(NamedTuple):
    """Where an array lies, as plain bytes in C order, in a file of the records' folder."""

    file: str
    offset: int
    length: int
    checksum: int
    """crc32."""
    dtype: Any = "|u1"
    """As `np.lib.format.dtype_to_descr` tells it."""
    shape: Sequence[int] = (-1,)


@dataclass(frozen=True)
class Record:
    """One finished region: its shard, where its arrays lie, and facts about how it was made."""

    region: str
    shard: Shard | None
    payload: Mapping[str, Piece]
    """Where each of its arrays lies."""
    facts: Mapping[str, Any]


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

    def discard(self, regions: Collection[str] | None = None) -> None:
        """Forget all regions, or those whose shard turned out missing or torn.

        Only for the process that holds the image's lock, while no worker writes.
        """

        drop_lines(
            self.folder,
            lambda line: (
                line.get("pass") == self.name and (regions is None or line.get("region") in regions)
            ),
        )

    def add(
        self,
        region: str,
        shard: Shard | None = None,
        payload: Mapping[str, Array] | None = None,
        **facts: Any,
    ) -> None:
        """Say that a region is done; its shard must be on disk already."""
        line: dict[str, Any] = {"pass": self.name, "region": region, "facts": facts}
        if shard is not None:
            line |= {"shard": [shard.length, shard.checksum], "array": self.array}
        if payload is not None:
            name = f"{_writer_name(os.getpid())}.bin"
            pieces = {}
            with (self.folder / name).open("ab") as file:
                offset = file.seek(0, os.SEEK_END)
                for key, array in payload.items():
                    # Not as .npy, of which to write and read the header takes longer than all else.
                    data, described = array.tobytes(), np.lib.format.dtype_to_descr(array.dtype)
                    file.write(data)
                    pieces[key] = [offset, len(data), zlib.crc32(data), described, array.shape]
                    offset += len(data)
                file.flush()
                os.fsync(file.fileno())
            line |= {"file": name, "payload": pieces}
        self._append(line)

    def _append(self, line: dict[str, Any]) -> None:
        append_line(self.folder, line | {"fingerprint": self.fingerprint}, durable=True)

    def read(self) -> dict[str, Record]:
        """The finished regions by name."""
        found: dict[str, Record] = {}
        for line in _lines(self.folder, _pass_mark(self.name)):
            if (line.get("pass"), line.get("fingerprint")) != (self.name, self.fingerprint):
                continue
            shard, name = line.get("shard"), line.get("file", "")
            found[line["region"]] = Record(
                line["region"],
                Shard(*shard) if shard is not None else None,
                {key: Piece(name, *piece) for key, piece in line.get("payload", {}).items()},
                line.get("facts", {}),
            )
        return found

    def payload(self, record: Record, names: Collection[str] | None = None) -> dict[str, Array]:
        """The arrays that a region handed on; all of them, or those asked for.

        Raises
        ------
        SegpipeError
            When they are damaged.
        """
        chosen = record.payload if names is None else {name: record.payload[name] for name in names}
        return dict(zip(chosen, read_pieces(self.folder, list(chosen.values())), strict=True))


def append_line(folder: Path, line: Mapping[str, Any], *, durable: bool) -> None:
    """Append to the lines of this process."""
    with (folder / f"{_writer_name(os.getpid())}.jsonl").open("ab") as file:
        file.write(b"\n" + json.dumps(line, default=str).encode() + b"\n")
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _pass_mark(name: str) -> bytes:
    """What the lines of a pass have in them: to parse the others would take long."""
    return f'"pass": {json.dumps(name)}'.encode()


def _lines(folder: Path, mark: bytes = b"") -> Iterator[dict[str, Any]]:
    """What the lines in a folder of records say; those that have `mark` in them."""
    for file in sorted(folder.glob("*.jsonl")):
        yield from _lines_of(file.read_bytes(), mark)


def _lines_of(content: bytes, mark: bytes = b"") -> Iterator[dict[str, Any]]:
    """What the lines of a file say, but for torn ones."""
    for text in content.splitlines():
        if mark not in text:
            continue
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line


def drop_lines(folder: Path, goes: Callable[[Mapping[str, Any]], bool], mark: bytes = b"") -> None:
    """Remove lines; only for the process that holds the image's lock, while no worker writes.

    Files without `mark` in them have none that go.
    """
    for file in folder.glob("*.jsonl"):
        content = file.read_bytes()
        lines = list(_lines_of(content)) if mark in content else []
        kept = [line for line in lines if not goes(line)]
        if len(kept) < len(lines):
            partial = file.with_suffix(".partial")
            partial.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
            partial.replace(file)


def begin_stage(folder: Path, fingerprint: str) -> None:
    """Have a folder of records under this fingerprint; call when the stage's arrays are made."""
    folder.mkdir(parents=True, exist_ok=True)
    append_line(folder, {"stage": fingerprint}, durable=False)  # lost: the stage begins anew


def has_begun(folder: Path, fingerprint: str) -> bool:
    """Whether `begin_stage` was called with this fingerprint."""
    return any(line.get("stage") == fingerprint for line in _lines(folder, b'"stage": '))


def shards_in(folder: Path) -> Iterator[tuple[str, Path, str, Shard]]:
    """Each shard that the records of a stage tell of: pass, array, region, how it was written."""
    for line in _lines(folder):
        if line.get("array") is not None:
            array = (folder / line["array"]).resolve()
            yield line["pass"], array, line["region"], Shard(*line["shard"])


def read_pieces(folder: Path, pieces: Sequence[Piece]) -> list[Array]:
    """Arrays that a region handed on; errors as in `Records.payload`."""
    arrays: list[Array] = []
    with ExitStack() as opened:
        files: dict[str, BufferedReader] = {}
        for piece in pieces:
            if piece.file not in files:
                files[piece.file] = opened.enter_context((folder / piece.file).open("rb"))
            files[piece.file].seek(piece.offset)
            data = bytearray(piece.length)
            read = files[piece.file].readinto(data)
            if read < piece.length or zlib.crc32(data) != piece.checksum:
                raise SegpipeError(
                    f"{folder / piece.file} is damaged at byte {piece.offset}; run again with --restart"
                )
            dtype = np.lib.format.descr_to_dtype(piece.dtype)
            arrays.append(np.frombuffer(data, dtype).reshape(piece.shape))
    return arrays


@contextmanager
def locked(folder: Path, name: str, *, wait: bool = False) -> Iterator[None]:
    """Hold an image for this process; released when the process ends, however it ends.

    Raises
    ------
    BusyError
        When another process holds it, and it is not waited for.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, not in it: the folder may be removed while it is held.
    with folder.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(f"{name}: another segpipe is working on it in {folder}") from None
        yield
