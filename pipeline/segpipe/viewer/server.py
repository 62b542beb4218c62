"""HTTP on the loopback: the page, and the files of one OUT that it shows.

What keeps others out, in the order in which it is asked:

    host     the Host header names the loopback: a page of another site cannot reach us by a name of
             its own that it has resolved to 127.0.0.1 (DNS rebinding)
    token    every path begins with a secret of this process; compared in constant time
    method   GET and HEAD; nothing is ever changed
    route    a fixed table; a name must be one that OUT has given, an asset one that we ship
    file     inside the image's OME-Zarr, after symbolic links are resolved

and the content security policy lets the page run nothing but its own scripts, and ask no one else.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import re
import secrets
import signal
import sys
import threading
import webbrowser
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

from segpipe.errors import SegpipeError, SettingsError
from segpipe.viewer.catalogue import Catalogue, Slide

log = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
HOSTS = ("127.0.0.1", "localhost")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",  # not from the system's table, which may lack it
    ".json": "application/json",
    ".png": "image/png",
    ".txt": "text/plain; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_PART = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_.-]+")


class Refused(Exception):
    """A request that is answered by a status and a line of text."""

    def __init__(self, status: HTTPStatus, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers


class Server(ThreadingHTTPServer):
    """Serves one OUT on 127.0.0.1; `url` is where, its secret included.

    Raises
    ------
    SettingsError
        When the port cannot be had.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, catalogue: Catalogue, port: int = 0) -> None:
        self.catalogue = catalogue
        self.token = secrets.token_urlsafe(24)
        self.assets = {
            path.relative_to(PAGE).as_posix(): path for path in PAGE.rglob("*.*") if path.is_file()
        }
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            raise SettingsError(
                f"port {port} cannot be used ({error.strerror}); leave --port out for any that is free"
            ) from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error; the rest is a bug and keeps its traceback."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            log.exception("a request failed")


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets; the second would wait 40 ms
    timeout = 60  # s without a request

    def do_GET(self) -> None:
        """Answer."""
        try:
            self._answer()
        except Refused as refused:
            self._send(
                refused.text.encode("utf-8", "replace"), ".txt", refused.status, refused.headers
            )
        except ConnectionError:
            self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def _answer(self) -> None:
        host, _, _ = self.headers.get("Host", "").partition(":")
        if host.lower() not in HOSTS:
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, f"only as {' or '.join(HOSTS)}")
        token, *parts = self.path.partition("?")[0].removeprefix("/").split("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "use the address that segpipe view printed")
        match parts:
            case [""]:
                self._send_file(PAGE / "index.html")
            case ["page", *names] if (name := "/".join(names)) in self.server.assets:
                self._send_file(self.server.assets[name])
            case ["slides.json"]:
                self._send_json(self._told(self.server.catalogue.to_json))
            case ["slides", key, *rest] if slide := self._told(
                lambda: self.server.catalogue.slide(key)
            ):
                self._answer_about(slide, rest)
            case _:
                raise Refused(HTTPStatus.NOT_FOUND, "no such page")

    def _answer_about(self, slide: Slide, rest: list[str]) -> None:
        match rest:
            case ["slide.json"]:
                self._send_json(self._told(slide.to_json))
            case ["thumbnail.png"]:
                self._send(self._told(slide.thumbnail), ".png")
            case ["preview.png"]:
                self._send_file(inside(slide.out, slide.preview))
            case ["objects", number] if re.fullmatch(r"[0-9]{1,10}\.json", number):
                row = self._told(lambda: slide.row(int(number.removesuffix(".json"))))
                if row is None:
                    raise Refused(HTTPStatus.NOT_FOUND, "no such object")
                self._send_json(row)
            case ["image.ome.zarr", *names] if names and all(map(_PART.fullmatch, names)):
                self._send_file(inside(slide.out, slide.zarr, *names))
            case _:
                raise Refused(HTTPStatus.NOT_FOUND, "no such page")

    def _told(self, ask: Callable[[], Any]) -> Any:
        """What a question of the catalogue is answered; its errors become lines."""
        try:
            return ask()
        except FileNotFoundError as error:
            raise Refused(HTTPStatus.NOT_FOUND, f"{error.filename} is not there") from error
        except (SegpipeError, OSError, ValueError) as error:
            raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, str(error)) from error

    def _send_json(self, content: Any) -> None:
        self._send(json.dumps(_finite(content)).encode(), ".json")

    def _send(
        self,
        body: bytes,
        kind: str,
        status: HTTPStatus = HTTPStatus.OK,
        headers: dict[str, str] | None = None,
    ) -> None:
        self._begin(status, kind, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_file(self, path: Path | None) -> None:
        try:
            file = None if path is None or not path.is_file() else path.open("rb")
        except OSError:
            file = None
        if path is None or file is None:
            raise Refused(HTTPStatus.NOT_FOUND, "no such file")
        with file:
            size = os.fstat(file.fileno()).st_size
            start, end = byte_range(self.headers.get("Range"), size)
            headers = {"Accept-Ranges": "bytes"}
            status = HTTPStatus.OK
            if "Range" in self.headers:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
                status = HTTPStatus.PARTIAL_CONTENT
            self._begin(status, path.suffix, end - start, headers)
            if self.command != "HEAD":
                file.seek(start)
                _copy(file, self.wfile, end - start)

    def _begin(self, status: HTTPStatus, kind: str, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", TYPES.get(kind, "application/octet-stream"))
        self.send_header("Content-Length", str(length))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")  # the address is the secret
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "no-store")  # a run may replace a shard
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses itself: methods, broken requests. As text, not as HTML."""
        self.close_connection = True
        self._send((message or HTTPStatus(code).phrase).encode(), ".txt", HTTPStatus(code))

    def version_string(self) -> str:
        """No versions."""
        return "segpipe"

    def log_message(self, format: str, *values: Any) -> None:
        """Requests are told to those who debug."""
        log.debug(format, *values)


def byte_range(asked: str | None, size: int) -> tuple[int, int]:
    """Start and end of the bytes that a Range header asks of a file of `size` bytes.

    >>> byte_range("bytes=2-5", 10), byte_range("bytes=8-", 10), byte_range("bytes=-3", 10)
    ((2, 6), (8, 10), (7, 10))

    Raises
    ------
    Refused
        When it is not one range of bytes, or none of them is in the file.
    """
    if asked is None:
        return 0, size
    found = _RANGE.fullmatch(asked.strip())
    first, last = found.groups() if found else ("", "")
    if first:
        start, end = int(first), min(int(last) + 1 if last else size, size)
    else:
        start, end = max(0, size - int(last or 0)), size
    if start >= end:
        text = f"one range of bytes in a file of {size}, not {asked[:80]}"
        raise Refused(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, text, Content_Range=f"bytes */{size}"
        )
    return start, end


def inside(out: Path, top: Path, *names: str) -> Path | None:
    """The file `top/names`, symbolic links resolved; None when it is not in `top` and in OUT."""
    root, path = Path(os.path.realpath(top)), Path(os.path.realpath(top.joinpath(*names)))
    if root.is_relative_to(os.path.realpath(out)) and path.is_relative_to(root):
        return path
    return None


def serve(server: Server, *, browser: bool, told: Callable[[str], None]) -> None:
    """Open the page and answer until Ctrl-C or SIGTERM."""
    told(f"showing {server.catalogue.out} at {server.url}")
    told("Ctrl-C ends it")
    if browser and _has_screen():
        # In a thread: a browser that runs in the terminal would not return.
        threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        told("ended")
    finally:
        signal.signal(signal.SIGTERM, before)
        server.server_close()


def _has_screen() -> bool:
    return not sys.platform.startswith("linux") or any(
        name in os.environ for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )


def _finite(content: Any) -> Any:
    """The same with None for NaN and infinity, which JSON lacks."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not abs(content) < float("inf"):
        return None
    return content


def _copy(source: IO[bytes], sink: Any, length: int) -> None:
    while length and (data := source.read(min(length, 2**20))):
        sink.write(data)
        length -= len(data)
