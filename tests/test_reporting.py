"""report.html: it says what OUT holds, whoever made it, and nothing in a name can do anything."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shlex
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image

from fields import nuclei, run, threshold_model
from segpipe import reporting
from segpipe.cli import main
from segpipe.export.report import Slide, by_need, report_page
from segpipe.reporting import write_report
from segpipe.sizes import SizeHistogram, quantile

HOSTILE = "<img src=x onerror=alert(1)>'\"&amp;</title><script>alert(2)</script>"


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.inside = [], [], None
        self.code = {"script": "", "style": ""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside in self.code:
            self.code[self.inside] += data
        else:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def page_of(out):
    return Page((out / "report.html").read_text(errors="surrogateescape"))


def rows_of(page_text):
    """Name and state of each slide, in the order of the table."""
    body = page_text[page_text.index("<tbody>") : page_text.index("</tbody>")]
    cells = [re.findall("<td[^>]*>(.*?)</td>", row) for row in body.split("<tr>")[1:]]
    return [tuple(re.sub("<[^>]*>", "", cell) for cell in row[:2]) for row in cells]


def entry(**more):
    """As in run.json."""
    return {
        "status": "done",
        "error": None,
        "source": "in/a.tif",
        "objects": 500,
        "shape": [1, 2000, 1000],
        "pixel_size_um": 0.5,
        "tiles": 4,
        "tiles_skipped": 1,
        "seconds": {"tile": 1.0, "infer": 3.0},
        "sizes": {
            "diameter_edges_px": [16.0, 19.03, 22.63],
            "counts": [100, 400],
            "area_px": 10**5,
        },
        **more,
    }


def harmless(page):
    """Nothing is loaded, nothing runs but the page's own script, and its policy holds it to that."""
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.code[kind].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
        assert sum(tag == kind for tag, _ in page.tags) == 1
    assert "default-src 'none'" in policy and "img-src data:" in policy
    for tag, attrs in page.tags:
        assert tag not in ("iframe", "object", "embed", "link", "form", "base")
        assert not any(name.startswith("on") or name == "style" for name in attrs), (tag, attrs)
        assert attrs.get("src", "data:").startswith("data:image/jpeg;base64,") or tag != "img"
        assert attrs.get("href", "#").startswith(("#", "./"))


# --- the page -------------------------------------------------------------------------------------


def test_a_hostile_name_is_text_everywhere():
    told = entry(
        source=f"in/{HOSTILE}.tif",
        status="failed",
        error=HOSTILE,
        warnings=[HOSTILE],
        failed_regions=[
            {"stage": HOSTILE, "region": HOSTILE, "box": [0, 1, 2, 3], "error": HOSTILE}
        ],
        model=HOSTILE,
        model_chosen=HOSTILE,
        segpipe=HOSTILE,
        made_by=[HOSTILE],
        plane={"z": HOSTILE},
        seam_check={"verdict": HOSTILE, "p": 1.0, "lattices": []},
    )
    files = (f"{HOSTILE}.png", f"{HOSTILE}.parquet")
    slide = Slide(HOSTILE, told, f"segpipe predict {HOSTILE}", "data:image/jpeg;base64,AA==", files)
    last = {"libraries": {HOSTILE: HOSTILE}, "platform": HOSTILE, "settings": {HOSTILE: HOSTILE}}
    page = Page(report_page(HOSTILE, [slide], last))
    harmless(page)
    assert page.text.count(HOSTILE) >= 12
    assert all(attrs.get("src") != "x" for _, attrs in page.tags)


def test_a_name_is_no_scheme():
    slide = Slide("javascript:alert(1)", entry(), files=("javascript:alert(1).png",), thumbnail="x")
    links = [a["href"] for tag, a in Page(report_page("out", [slide], {})).tags if tag == "a"]
    assert "./javascript%3Aalert%281%29.png" in links


def test_figures_are_in_units_that_are_known():
    sized, unsized = Slide("a", entry()), Slide("b", entry(pixel_size_um=None))
    assert sized.density == (pytest.approx(500 / (2 * 0.25)), "/mm\u00b2")
    assert unsized.density == (pytest.approx(250), "/Mpx")
    middle = 19.03 * (22.63 / 19.03) ** (150 / 400)
    assert sized.diameter == (pytest.approx(middle / 2), "um")
    assert unsized.diameter == (pytest.approx(middle), "px")
    assert sized.occupied == 0.75 and sized.covered == pytest.approx(0.05)
    assert sized.seconds == 4.0
    empty = Slide("c", {"status": "failed", "error": "no"})
    assert (empty.density, empty.diameter, empty.covered, empty.occupied) == (None,) * 4


def test_what_needs_a_look_comes_first():
    suspicious = {"verdict": "suspicious"}
    slides = [
        Slide("a", entry()),
        Slide("z", entry(status="failed", error="bad")),
        Slide("b", entry(seam_check=suspicious)),
        Slide("c", {"status": "unfinished", "error": None}),
    ]
    assert [one.name for one in by_need(slides)] == ["z", "c", "b", "a"]


def test_sizes_are_those_of_numpy():
    rng = np.random.default_rng(0)
    area = rng.integers(1, 5000, 2000)
    sizes = SizeHistogram()
    for part in np.array_split(area, 7):
        sizes.add(part)
    told = sizes.to_json()
    diameter = np.sqrt(4 * area / np.pi)
    edges = np.array(told["diameter_edges_px"])
    expected, _ = np.histogram(diameter, 2.0 ** (np.arange(0, 97) / 4))
    assert told["counts"] == expected[expected.nonzero()[0][0] :][: len(told["counts"])].tolist()
    assert sum(told["counts"]) == 2000 and told["area_px"] == area.sum()
    middle = quantile(told["diameter_edges_px"], told["counts"], 0.5)
    assert middle == pytest.approx(np.median(diameter), rel=0.1)
    assert edges[0] <= diameter.min() and diameter.max() < edges[-1]
    assert SizeHistogram().to_json()["counts"] == [] and quantile([], [], 0.5) is None


# --- of an OUT ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two runs into one OUT: one image that is damaged in part, one with a hostile name, one lost."""
    folder = tmp_path_factory.mktemp("in")
    good = nuclei(folder / "<img src=x onerror=alert(1)>.tif", (200, 300))
    torn = nuclei(folder / "torn.tif", (200, 300))
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size * 2 // 3])
    lost = folder / "lost.tif"
    lost.write_bytes(b"II*\x00")
    out = folder / "out"
    preview = ("measure.preview=true", "tile.pixel_size_um=0.5")
    assert run(good, out, *preview).exit_code == 0
    for bad in (torn, lost):
        assert run(bad, out, "stitch.min_area=30").exit_code == 1
    return out


def test_predict_writes_it_over_all_runs(out):
    text = (out / "report.html").read_text()
    page = page_of(out)
    harmless(page)
    name = "_img src=x onerror=alert(1)_"
    assert rows_of(text) == [("lost", "failed"), ("torn", "failed"), (name, "done")]
    assert "<img src=x onerror=alert(1)>.tif" in page.text  # the source, as text
    images = json.loads((out / "run.json").read_text())["images"]
    assert f"{images[name]['objects']} objects" in page.text
    assert "/mm\u00b2" in page.text and images[name]["seam_check"]["verdict"] in page.text
    regions = images["torn"]["failed_regions"]
    assert regions
    for one in regions:
        box = one["box"]
        assert f"{box[0]}:{box[2]}, {box[1]}:{box[3]}" in page.text
        assert one["error"] in page.text
    thumbnails = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(thumbnails) == 1  # the others were made without a picture
    data = base64.b64decode(thumbnails[0].partition(",")[2])
    assert Image.open(io.BytesIO(data)).size[0] > 200


def test_run_json_says_the_same(out):
    images = json.loads((out / "run.json").read_text())["images"]
    told = images["_img src=x onerror=alert(1)_"]
    assert sum(told["sizes"]["counts"]) == told["objects"]
    assert told["seam_check"]["lattices"][0]["name"] == "tiles"
    assert set(told["peak_memory_bytes"]) == {"tile", "infer", "stitch", "measure"}
    assert min(told["peak_memory_bytes"].values()) > 10e6
    assert told["overrides"]["tile.core"] == 64
    assert images["torn"]["overrides"]["stitch.min_area"] == 30


def test_its_command_makes_the_result_again(out, tmp_path):
    command = [
        text
        for text in re.findall("<pre>(.*?)</pre>", (out / "report.html").read_text())
        if "onerror" in text
    ]
    (line,) = command
    words = shlex.split(line.replace("&lt;", "<").replace("&gt;", ">").replace("&#x27;", "'"))
    words[words.index("OUT")] = str(tmp_path / "again")
    done = CliRunner().invoke(main, words[1:])
    assert done.exit_code == 0, done.output
    name = "_img src=x onerror=alert(1)_.parquet"
    assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_its_command_holds_in_any_folder(tmp_path, monkeypatch):
    """Whatever relative paths the run was given."""
    nuclei(tmp_path / "in" / "a.tif", (150, 200))
    shutil.copy(threshold_model(), tmp_path / "mine.safetensors")
    Image.new("L", (2, 1), 255).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    assert run("in", "out", "infer.model=mine.safetensors", "tile.mask=mask.png").exit_code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_report(tmp_path / "out")
    (line,) = re.findall(
        "<pre>(segpipe predict.*?)</pre>", (tmp_path / "out" / "report.html").read_text()
    )
    assert str(tmp_path / "mine.safetensors") in line
    words = shlex.split(line)
    words[words.index("OUT")] = "again"
    done = CliRunner().invoke(main, words[1:])
    assert done.exit_code == 0, done.output
    assert Path("again/a.parquet").read_bytes() == (tmp_path / "out" / "a.parquet").read_bytes()


def test_the_command_writes_it_from_the_manifests_alone(out):
    before = rows_of((out / "report.html").read_text())
    told = (out / "run.json").read_bytes()
    (out / "report.html").unlink()
    done = CliRunner().invoke(main, ["report", str(out)])
    assert done.exit_code == 0 and done.output.strip() == str(out / "report.html")
    assert rows_of((out / "report.html").read_text()) == before
    (out / "run.json").unlink()
    try:
        write_report(out)
        rows = rows_of((out / "report.html").read_text())
        assert ("_img src=x onerror=alert(1)_", "done") in rows and ("torn", "failed") in rows
    finally:
        (out / "run.json").write_bytes(told)


def test_what_another_run_has_begun_is_not_called_done(tmp_path):
    image = nuclei(tmp_path / "a.tif", (100, 120))
    out = tmp_path / "out"
    assert run(image, out).exit_code == 0
    assert rows_of((out / "report.html").read_text()) == [("a", "done")]
    assert run(image, out, "stitch.min_area=40", stages=("stitch",)).exit_code == 0
    assert rows_of((out / "report.html").read_text()) == [("a", "unfinished")]


def test_a_slide_that_cannot_be_read_any_more_has_failed(tmp_path):
    image = nuclei(tmp_path / "a.tif", (100, 120))
    out = tmp_path / "out"
    assert run(image, out).exit_code == 0
    image.write_bytes(b"II*\x00")
    assert run(image, out).exit_code == 1
    text = (out / "report.html").read_text()
    assert rows_of(text) == [("a", "failed")] and "is damaged" in text


def test_a_folder_without_results_is_named(tmp_path):
    done = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert done.exit_code == 2 and "holds no results of segpipe" in done.output


def test_a_thousand_slides(tmp_path):
    """Written in seconds, under 20 MB, with a picture of each."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((80, 90), np.uint16))
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (450, 800, 3), np.uint8).astype(np.uint8))
    file = io.BytesIO()
    noise.save(file, format="JPEG", quality=80)  # no picture is harder to compress
    manifests = tmp_path / "out" / "manifests"
    manifests.mkdir(parents=True)
    images = {f"slide {number:04d}": entry() for number in range(1000)}
    for name in images:
        (manifests / f"{name}.jpg").write_bytes(file.getvalue())
    told = {"libraries": {}, "settings": {}, "images": images}
    (tmp_path / "out" / "run.json").write_text(json.dumps(told))
    started = time.process_time()
    path = write_report(tmp_path / "out")
    assert time.process_time() - started < 20
    assert path.stat().st_size < 20e6
    text = path.read_text()
    assert len(rows_of(text)) == 1000 and text.count("data:image/jpeg;base64,") == 1000
    assert text.index("</tbody>") < text.index("data:image/jpeg")  # the table comes first


@pytest.mark.parametrize(("form", "shape"), [("JPEG", (301, 663)), ("PNG", (900, 1600))])
def test_a_thumbnail_is_as_good_as_its_budget_allows(form, shape):
    noise = np.random.default_rng(0).integers(0, 90, (*shape, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format=form, quality=80)
    widths = []
    for budget in (10**6, 60_000, 20_000, 9_000, 10):
        data = reporting._smaller(file.getvalue(), budget)
        assert len(data) <= budget
        if budget > 10:
            with Image.open(io.BytesIO(data)) as small:
                assert small.format == "JPEG" and small.convert("RGB").getextrema()
                assert abs(small.height / small.width - shape[0] / shape[1]) < 0.01
                widths.append(small.width)
    assert data == b""
    assert widths == sorted(widths, reverse=True) and widths[-1] < widths[0] <= 800
