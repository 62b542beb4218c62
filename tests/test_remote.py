"""OME-Zarr at an address: from a server that is well, slow, busy, broken, or knows no ranges."""

from __future__ import annotations

import asyncio
import gc
import http.server
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr

from fields import labels_of, nuclei, run
from segpipe.errors import InputError
from segpipe.geometry import Box
from segpipe.inputs import find_inputs
from segpipe.slide import Level, input_fingerprint, open_slide, remote, remote_url

Pixels = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Behaviour:
    """What the server does; `asked` are the paths that it was asked for."""

    answer: Callable[[str, int], int] = lambda path, times: 200
    delay_s: Callable[[str], float] = lambda path: 0.0
    ranges: bool = True
    asked: list[str] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder."""

    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, behaviour: Behaviour, *args: Any) -> None:
        self.folder, self.behaviour = folder, behaviour
        super().__init__(*args)

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.behaviour.asked.append(name)
        time.sleep(self.behaviour.delay_s(name))
        status = self.behaviour.answer(name, self.behaviour.asked.count(name))
        file = self.folder / name
        if status == 200 and not file.is_file():
            status = 404
        data = file.read_bytes() if status == 200 else b"sorry"
        wanted = self.headers.get("Range")
        if status == 200 and wanted and self.behaviour.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1] if first else data[-int(last) :]
            status = 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        try:
            self.wfile.write(data)
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


class Quiet(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A client that has had enough is no error of the server."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str, Behaviour]]:
    """A folder, its address, and what its server does."""
    behaviour = Behaviour()
    server = Quiet(("127.0.0.1", 0), partial(Handler, tmp_path, behaviour))
    thread = threading.Thread(target=partial(server.serve_forever, 0.01))
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}", behaviour
    server.shutdown()
    thread.join()
    server.server_close()
    gc.collect()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(remote, "ATTEMPTS", 3)


def write(path: Path, version: str = "0.5", pixels: Pixels | None = None, **options: Any) -> Pixels:
    if pixels is None:
        pixels = np.random.default_rng(0).integers(1, 60_000, (2, 90, 130)).astype(np.uint16)
    root = zarr.open_group(str(path), mode="w", zarr_format=3 if version == "0.5" else 2)
    for number, level in enumerate((pixels, pixels[:, ::2, ::2])):
        options = {"chunks": (1, 32, 32)} | options
        root.create_array(str(number), data=level, **options)
    multiscales = [
        {
            "version": version,
            "axes": [
                {"name": "c", "type": "channel"},
                *({"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"),
            ],
            "datasets": [
                {
                    "path": str(number),
                    "coordinateTransformations": [
                        {"type": "scale", "scale": [1, 0.5 * 2**number, 0.5 * 2**number]}
                    ],
                }
                for number in range(2)
            ],
        }
    ]
    metadata: dict[str, Any] = {"multiscales": multiscales}
    root.attrs.update({"ome": metadata | {"version": version}} if version == "0.5" else metadata)
    return pixels


BOX = Box(0, 0, 90, 130)


def test_an_address_is_told_from_a_file() -> None:
    assert remote_url(Path("https://host:80/a/b.zarr")) == "https://host:80/a/b.zarr"
    assert remote_url(Path("s3://bucket/a.zarr")) == "s3://bucket/a.zarr"
    assert remote_url(Path("/data/a.zarr")) is None
    assert remote_url(Path("https/a.zarr")) is None


@pytest.mark.parametrize("version", ["0.4", "0.5", "sharded", "sharded, no ranges"])
def test_what_a_server_has_reads_as_from_a_folder(
    served: tuple[Path, str, Behaviour], version: str
) -> None:
    folder, address, behaviour = served
    options = {"shards": (1, 64, 64)} if "sharded" in version else {}
    pixels = write(folder / "a.zarr", "0.4" if version == "0.4" else "0.5", **options)
    behaviour.ranges = "no ranges" not in version
    with open_slide(Path(f"{address}/a.zarr")) as slide:
        assert slide.pixel_size_um == 0.5
        assert slide.levels == (Level((90, 130), 1.0), Level((45, 65), 2.0))
        np.testing.assert_array_equal(slide.read(BOX), pixels)
        np.testing.assert_array_equal(
            slide.read(Box(3, 5, 40, 60), level=1), pixels[:, 6:80:2, 10:120:2]
        )
        np.testing.assert_array_equal(slide.read(Box(1, 2, 3, 4), [1]), pixels[1:, 1:3, 2:4])


def test_an_address_is_an_input(served: tuple[Path, str, Behaviour], tmp_path: Path) -> None:
    folder, address, _ = served
    write(folder / "a.ome.zarr")
    url = Path(f"{address}/a.ome.zarr")
    (found,) = find_inputs([url], tmp_path / "out")
    assert (found.name, found.source) == ("a", url)
    before = input_fingerprint(url)
    assert before == input_fingerprint(url)
    zarr.open_group(str(folder / "a.ome.zarr")).attrs["note"] = "changed"
    assert input_fingerprint(url) != before


def test_predict_over_an_address_gives_what_the_folder_gives(
    served: tuple[Path, str, Behaviour], tmp_path: Path
) -> None:
    folder, address, behaviour = served
    field = tifffile.imread(nuclei(tmp_path / "field.tif", (130, 150)))
    write(folder / "a.ome.zarr", pixels=np.stack([field, field // 2]))
    behaviour.answer = lambda path, times: 503 if "/c/" in path and times < 2 else 200
    results = [
        run(where, tmp_path / out, "tile.channel=[0]")
        for where, out in (
            (Path(f"{address}/a.ome.zarr"), "far"),
            (folder / "a.ome.zarr", "near"),
        )
    ]
    assert [result.exit_code for result in results] == [0, 0]
    far, near = (labels_of(tmp_path / out, "a") for out in ("far", "near"))
    assert near.any()
    np.testing.assert_array_equal(far, near)
    asked = len([path for path in behaviour.asked if "/c/" in path])
    assert run(Path(f"{address}/a.ome.zarr"), tmp_path / "far", "tile.channel=[0]").exit_code == 0
    assert len([path for path in behaviour.asked if "/c/" in path]) == asked


def test_a_missing_chunk_is_the_fill_value(served: tuple[Path, str, Behaviour]) -> None:
    folder, address, _ = served
    pixels = write(folder / "a.zarr")
    (folder / "a.zarr/0/c/1/0/0").unlink()
    with open_slide(Path(f"{address}/a.zarr")) as slide:
        read = slide.read(BOX)
    assert not read[1, :32, :32].any()
    np.testing.assert_array_equal(read[0], pixels[0])


def test_a_busy_server_is_asked_again(served: tuple[Path, str, Behaviour]) -> None:
    folder, address, behaviour = served
    pixels = write(folder / "a.zarr")
    behaviour.answer = lambda path, times: 503 if times < 3 else 200
    with open_slide(Path(f"{address}/a.zarr")) as slide:
        np.testing.assert_array_equal(slide.read(BOX), pixels)
    assert behaviour.asked.count("a.zarr/0/c/0/0/0") == 3


def test_a_broken_server_is_an_error_and_no_black(served: tuple[Path, str, Behaviour]) -> None:
    folder, address, behaviour = served
    write(folder / "a.zarr")
    behaviour.answer = lambda path, times: 500 if path.endswith("c/0/1/1") else 200
    with open_slide(Path(f"{address}/a.zarr")) as slide:
        with pytest.raises(
            InputError, match=r"a\.zarr: cannot be read .*the server answers 500 .*asked 3 times"
        ) as error:
            slide.read(BOX)
        assert slide.read(Box(0, 0, 30, 30)).all()
    assert "\n" not in str(error.value)


def test_a_server_that_refuses_is_not_asked_again(served: tuple[Path, str, Behaviour]) -> None:
    folder, address, behaviour = served
    write(folder / "a.zarr")
    behaviour.answer = lambda path, times: 403
    with pytest.raises(InputError, match=r"a\.zarr: .*answers 403 .*, asked once") as error:
        open_slide(Path(f"{address}/a.zarr"))
    assert "\n" not in str(error.value)
    assert max(behaviour.asked.count(path) for path in behaviour.asked) == 1


def test_a_slow_server_is_left_after_a_while(
    served: tuple[Path, str, Behaviour], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address, behaviour = served
    write(folder / "a.zarr")
    with open_slide(Path(f"{address}/a.zarr")) as slide:
        monkeypatch.setattr(remote, "TIMEOUT_S", 0.2)
        behaviour.delay_s = lambda path: 0.6
        begun = time.monotonic()
        with pytest.raises(InputError, match=r"no answer within 0\.2 s, asked 3 times"):
            slide.read(Box(0, 0, 10, 10), [0])
        assert time.monotonic() - begun < 5


def test_nobody_at_the_address(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.zarr: .*asked 3 times") as error:
        open_slide(Path("http://127.0.0.1:9/a.zarr"))
    assert "\n" not in str(error.value)


def test_an_address_without_an_image(served: tuple[Path, str, Behaviour]) -> None:
    folder, address, _ = served
    with pytest.raises(InputError, match=r"nothing\.zarr: is no OME-Zarr image"):
        open_slide(Path(f"{address}/nothing.zarr"))
    (folder / "garbage.zarr").mkdir()
    (folder / "garbage.zarr/zarr.json").write_bytes(b"\x00<html>not found</html>")
    with pytest.raises(InputError, match=r"garbage\.zarr: is no OME-Zarr image"):
        open_slide(Path(f"{address}/garbage.zarr"))


def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote.FsspecStore, "from_url", missing)
    with pytest.raises(InputError, match=r"a\.zarr: needs a package .*segpipe\[remote\]"):
        open_slide(Path("s3://bucket/a.zarr"))


def test_an_error_comes_when_what_was_asked_beside_it_has_ended() -> None:
    """Else s3fs tells in tracebacks, when the process ends, of what was under way."""
    ended = []

    class Refusing:
        async def get(self, key: str, *_: Any) -> None:
            await asyncio.sleep(0.01 if key == "quick" else 0.3)
            ended.append(key)
            raise PermissionError("Forbidden")

    async def ask() -> list[str]:
        store = remote.PatientStore(Refusing())  # type: ignore[arg-type]
        both = [asyncio.ensure_future(store.get(key, None)) for key in ("quick", "slow")]  # type: ignore[arg-type]
        with pytest.raises(OSError, match="Forbidden"):
            await asyncio.gather(*both)
        seen = list(ended)
        await asyncio.wait(both)
        return seen

    assert asyncio.run(ask()) == ["quick", "slow"]
