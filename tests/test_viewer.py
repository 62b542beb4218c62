"""The server of `segpipe view`: whom it answers, what it gives, what it refuses."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from results_folder import add_image, discs, know
from segpipe.cli import main
from segpipe.viewer.catalogue import Catalogue
from segpipe.viewer.server import PAGE, Refused, Server, byte_range

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("viewer") / "OUT"
    labels = discs((300, 260))
    pixels = (labels[None] % 251).astype(np.uint8)
    add_image(folder, HOSTILE, pixels, labels, pixel_size_um=0.5)
    add_image(folder, "sub/two", pixels.astype(np.uint16), None)
    add_image(folder, "kinds", pixels, (labels > 0).astype(np.uint32), classes=("ground", "disc"))
    know(folder, "broken", status="failed", error="broken.tif: is not an image")
    (folder / "secret.txt").write_text("secret")
    (folder.parent / "outside.json").write_text("{}")
    (folder / f"{HOSTILE}.ome.zarr" / "link").symlink_to(folder.parent)
    (folder / "sub" / "moved.ome.zarr").symlink_to(folder.parent)
    know(folder, "sub/moved")
    return folder


@pytest.fixture(scope="module")
def server(out):
    with Server(Catalogue(out)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def get(server):
    """Status, headers and body of a path below the token, or of a whole path."""

    def ask(path, *, whole=False, method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        try:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path if whole else f"/{server.token}/{path}", headers=names)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    return ask


ZARR = f"slides/{quote(HOSTILE)}/image.ome.zarr"


def test_the_page_and_all_that_it_names_are_served(server, get):
    status, headers, body = get("")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    named = re.findall(r'(?:src|href)="(page/[^"]+)"', body.decode())
    for module in PAGE.glob("*.js"):
        found = re.findall(r'from "\./([^"]+)"', module.read_text())
        found += re.findall(r'new Worker\(new URL\("([^"]+)"', module.read_text())
        named += [f"page/{name}" for name in found]
    assert "page/worker.js" in named
    assert len(set(named)) >= 8
    for name in named:
        status, headers, body = get(name)
        assert status == 200 and body == (PAGE.parent / name).read_bytes()
        assert headers["Content-Type"].split(";")[0] in ("text/javascript", "text/css")
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_the_policy_lets_nothing_in_and_nothing_out(get):
    for path in ("", "slides.json", "nowhere"):
        _, headers, _ = get(path)
        policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["Referrer-Policy"] == "no-referrer"
    page = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|https?:", page)


def test_only_who_has_the_token_is_answered(server, get):
    for path in (
        "/",
        "//[",
        "/slides.json",
        "/wrong/slides.json",
        f"/{server.token[:-1]}/",
        f"/{server.token}x/",
    ):
        assert get(path, whole=True)[0] == 403
    assert get("slides.json")[0] == 200
    assert len(server.token) >= 32


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "["]
)
def test_only_the_loopback_is_a_host(get, host):
    status, _, body = get("slides.json", Host=host)
    assert status in (400, 421) and b"slides" not in body


def test_localhost_is_a_host_at_any_port(get):
    assert get("slides.json", Host="localhost:9999")[0] == 200  # as by ssh -L


def test_it_listens_on_the_loopback_only(server):
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "path",
    [
        f"{ZARR}/../secret.txt",
        f"{ZARR}/../../secret.txt",
        f"{ZARR}/%2e%2e/secret.txt",
        f"{ZARR}/..%2fsecret.txt",
        f"{ZARR}/link/outside.json",
        f"{ZARR}//etc/passwd",
        f"{ZARR}/",
        f"{ZARR}/c",
        "slides/secret/image.ome.zarr/zarr.json",
        "slides/..%2FOUT/image.ome.zarr/zarr.json",
        "slides/sub%2Fmoved/image.ome.zarr/outside.json",
        "page/../server.py",
        "page/%2e%2e/server.py",
        "page/",
        "../../etc/passwd",
        "secret.txt",
        "run.json",
        "slides/broken/preview.png",
    ],
)
def test_nothing_else_of_the_disk_is_served(get, path):
    status, _, body = get(path)
    assert status == 404 and len(body) < 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_nothing_can_be_changed(get, method):
    assert get("slides.json", method=method)[0] == 501


def test_files_of_the_zarr_are_served_whole_by_ranges_and_by_suffix(out, get):
    shard = next(
        path for path in (out / f"{HOSTILE}.ome.zarr" / "0" / "c").rglob("*") if path.is_file()
    )
    whole = shard.read_bytes()
    path = f"{ZARR}/{shard.relative_to(out / f'{HOSTILE}.ome.zarr').as_posix()}"
    assert get(path)[::2] == (200, whole)
    for asked, part in {
        "bytes=0-0": whole[:1],
        "bytes=10-99": whole[10:100],
        "bytes=100-": whole[100:],
        "bytes=-68": whole[-68:],
        f"bytes=5-{10**12}": whole[5:],
        f"bytes=-{10**12}": whole,
    }.items():
        status, headers, body = get(path, Range=asked)
        assert (status, body) == (206, part)
        start = whole.index(part) if len(part) > 10 else 0
        assert headers["Content-Range"] == f"bytes {start}-{start + len(part) - 1}/{len(whole)}"
    status, headers, body = get(path, method="HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(whole)))


@pytest.mark.parametrize(
    "asked", ["bytes=10-", "bytes=-0", "bytes=5-2", "bytes=0-1,3-4", "lines=0-1", "x"]
)
def test_a_range_that_cannot_be_had_is_refused(asked):
    with pytest.raises(Refused) as refused:
        byte_range(asked, 10)
    assert refused.value.status == 416 and refused.value.headers == {"Content_Range": "bytes */10"}


def test_chunks_that_are_background_are_not_found(get):
    assert get(f"{ZARR}/0/c/0/9/9")[0] == 404


def test_images_are_listed_with_what_became_of_them(get):
    told = json.loads(get("slides.json")[2])
    by_name = {one["name"]: one for one in told["slides"]}
    assert list(by_name) == sorted([HOSTILE, "kinds", "sub/two", "sub/moved", "broken"])
    assert by_name[HOSTILE]["status"] == "done" and by_name[HOSTILE]["objects"] == 8 * 7
    assert by_name["sub/two"]["status"] == "unfinished" and by_name["sub/two"]["shown"]
    assert not by_name["sub/two"]["labelled"]
    assert by_name["kinds"]["classes"] == ["ground", "disc"]
    assert by_name[HOSTILE]["classes"] == by_name["sub/two"]["classes"] == []
    assert by_name["broken"]["error"] == "broken.tif: is not an image"
    assert by_name["broken"]["status"] == "failed" and not by_name["broken"]["shown"]


def test_a_hostile_name_stays_text(get):
    _, headers, body = get("slides.json")
    assert headers["Content-Type"] == "application/json"
    key = next(one["key"] for one in json.loads(body)["slides"] if one["name"] == HOSTILE)
    assert re.fullmatch(r"[\w%.-]+", key)
    for path in (f"nowhere/{quote(HOSTILE)}", f"slides/{quote(HOSTILE)}/objects/x.json"):
        _, headers, body = get(path)
        assert headers["Content-Type"].startswith("text/plain") and b"<" not in body
    script = "".join(path.read_text() for path in PAGE.glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", script)


def test_an_object_is_its_row_of_the_table(out, get):
    table = pq.read_table(out / f"{HOSTILE}.parquet").to_pylist()
    for row in (table[0], table[7], table[-1]):
        found = json.loads(get(f"slides/{quote(HOSTILE)}/objects/{row['id']}.json")[2])
        assert found == row
    for number in ("0", "57", "4294967295", "9999999999", "-1", "x", "1.0", "99999999999"):
        assert get(f"slides/{quote(HOSTILE)}/objects/{number}.json")[0] == 404
    assert get("slides/sub%2Ftwo/objects/1.json")[0] == 404  # has no table yet


def test_thumbnails_show_the_whole_image(get):
    for key in (quote(HOSTILE), "sub%2Ftwo"):
        status, headers, body = get(f"slides/{key}/thumbnail.png")
        assert (status, headers["Content-Type"], body[:4]) == (200, "image/png", b"\x89PNG")
    assert get("slides/broken/thumbnail.png")[0] >= 404


def test_what_is_no_out_is_one_line(tmp_path):
    for folder, said in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no results")):
        result = CliRunner().invoke(main, ["view", str(folder), "--no-browser"])
        assert (
            result.exit_code == 2 and said in result.output and len(result.output.splitlines()) == 1
        )


def test_a_port_that_is_taken_is_one_line(out, server):
    asked = ["view", str(out), "--no-browser", "--port", str(server.server_port)]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 2 and "leave --port out" in result.output


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_stopped(out, stop):
    command = [sys.executable, "-m", "segpipe.cli", "view", str(out), "--no-browser"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        url = running.stdout.readline().split()[-1]
        assert urlsplit(url).hostname == "127.0.0.1" and urlsplit(url).port
        with urlopen(Request(f"{url}slides.json"), timeout=20) as answer:  # noqa: S310
            assert answer.status == 200
        with pytest.raises(HTTPError, match="403"):
            urlopen(url.rsplit("/", 2)[0] + "/x/", timeout=20)  # noqa: S310
        running.send_signal(stop)
        told, errors = running.communicate(timeout=20)
    assert running.returncode == 0 and errors == "" and told.endswith("ended\n")


def test_the_licence_of_every_library_is_beside_it():
    vendoring = Path(PAGE.parent / "vendoring")
    packages = json.loads((vendoring / "package-lock.json").read_text())["packages"]
    licences = (PAGE / "vendor" / "LICENSES.txt").read_text()
    shipped = ["fzstd", "openseadragon", "zarrita", "@zarrita/storage"]
    for name in shipped:
        assert f"{name} {packages[f'node_modules/{name}']['version']} (" in licences
    assert licences.count("Copyright") >= len(shipped)
