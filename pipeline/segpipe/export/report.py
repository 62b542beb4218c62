"""The report of an OUT as a page: a table of all slides, and the details of each.

Pure: what is told comes as `Slide`s; whoever calls it has read them. Every text is escaped here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any
from urllib.parse import quote

from segpipe.export.charts import histogram_svg, lines_svg
from segpipe.export.page import page
from segpipe.sizes import quantile

STAGES = ("tile", "infer", "stitch", "measure")
OPEN = 4
"""Slides at most whose details are open from the start."""
_FILES = {".png": "picture", ".parquet": "table", ".ome.zarr": "image and labels (OME-Zarr)"}
NAMED_REGIONS = 50
"""Failed regions of one slide that are told; run.json tells all."""


@dataclass(frozen=True)
class Slide:
    """What the report tells of one image.

    entry
        As in run.json.
    command
        That makes the result again.
    thumbnail
        JPEG; empty where there is no picture.
    files
        Results that there are, relative to OUT.
    """

    name: str
    entry: Mapping[str, Any]
    command: str = ""
    thumbnail: str = ""
    files: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """done, failed or unfinished."""
        return str(self.entry["status"])

    @property
    def shape(self) -> tuple[int, int] | None:
        """Height and width."""
        shape = self.entry.get("shape")
        return (int(shape[1]), int(shape[2])) if shape else None

    @property
    def pixel_size_um(self) -> float | None:
        """Of the full-resolution image, if it is known."""
        return self.entry.get("pixel_size_um")

    @property
    def megapixels(self) -> float | None:
        """Of one channel."""
        return None if self.shape is None else self.shape[0] * self.shape[1] / 1e6

    @property
    def worked_megapixels(self) -> float | None:
        """What the stages worked on, where that is another resolution."""
        shape = self.entry.get("working_shape")
        return shape[1] * shape[2] / 1e6 if shape else self.megapixels

    @property
    def looked_at(self) -> float | None:
        """Share of the image that is inside the user's mask; None: objects were looked for in all."""
        pixels = self.entry.get("looked_at_px")
        return None if pixels is None or not self.megapixels else pixels / (self.megapixels * 1e6)

    @property
    def searched_megapixels(self) -> float | None:
        """Of the part in which objects were looked for."""
        share = self.looked_at
        return self.megapixels if share is None or not self.megapixels else share * self.megapixels

    @property
    def is_of_classes(self) -> bool:
        """Whether its labels are classes: then there are as many objects as classes that occur."""
        return bool(self.entry.get("classes"))

    @property
    def sizes(self) -> Mapping[str, Any]:
        """The histogram of objects; empty where there is none."""
        return {} if self.is_of_classes else self.entry.get("sizes") or {}

    @property
    def density(self) -> tuple[float, str] | None:
        """Objects per area in which they were looked for, and its unit."""
        objects, megapixels = self.entry.get("objects"), self.searched_megapixels
        if objects is None or not megapixels or self.is_of_classes:
            return None
        if self.pixel_size_um:
            return objects / (megapixels * self.pixel_size_um**2), "/mm\u00b2"  # Mpx um2 = mm2
        return objects / megapixels, "/Mpx"

    @cached_property
    def diameter(self) -> tuple[float, str] | None:
        """The median equivalent diameter, and its unit."""
        edges, counts = self.sizes.get("diameter_edges_px", []), self.sizes.get("counts", [])
        middle = quantile(edges, counts, 0.5)
        if middle is None:
            return None
        return (middle * self.pixel_size_um, "um") if self.pixel_size_um else (middle, "px")

    @property
    def covered(self) -> float | None:
        """Share that objects cover of where they were looked for."""
        if not self.sizes or not self.searched_megapixels:
            return None
        return float(self.sizes["area_px"] / (self.searched_megapixels * 1e6))

    @property
    def occupied(self) -> float | None:
        """Share of the tiles that held something to look at."""
        tiles = self.entry.get("tiles")
        return 1 - (self.entry.get("tiles_skipped") or 0) / tiles if tiles else None

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return float(sum((self.entry.get("seconds") or {}).values()))

    @property
    def peak_bytes(self) -> int:
        """Memory of the largest process."""
        return max((self.entry.get("peak_memory_bytes") or {}).values(), default=0)

    @property
    def seams(self) -> Mapping[str, Any]:
        """The seam check; empty where it was not made."""
        return self.entry.get("seam_check") or {}


def report_page(out: str, slides: Sequence[Slide], run: Mapping[str, Any]) -> str:
    """The whole page.

    Parameters
    ----------
    out
        What the folder is called.
    slides
        In the order of the table: `by_need`.
    run
        run.json, for settings and versions of the last run.
    """
    opened = len(slides) <= OPEN
    rows = "\n".join(_row(place, slide) for place, slide in enumerate(slides))
    details = "\n".join(_details(place, slide, opened) for place, slide in enumerate(slides))
    heads = "".join(
        f'<th scope="col"{" class=number" if right else ""}><button>{name}</button></th>'
        for name, right in _COLUMNS
    )
    return page(
        f"segpipe: {out}",
        f"""<h1>segpipe report: <bdi>{_text(out)}</bdi></h1>
{_totals(slides)}
<p><input id="find" type="search" placeholder="find: name, failed, suspicious" aria-label="find"></p>
<div class="scroll"><table class="over"><thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody></table></div>
<h2>Slides</h2>
{details}
<h2>The last run</h2>
{_last_run(run)}""",
    )


def by_need(slides: Sequence[Slide]) -> list[Slide]:
    """Failures first, then what is unfinished or suspicious, then the rest; by name."""
    ranks = {"failed": 0, "unfinished": 1}
    return sorted(
        slides,
        key=lambda one: (
            ranks.get(one.status, 2 if one.seams.get("verdict") == "suspicious" else 3),
            one.name,
        ),
    )


# --- table ----------------------------------------------------------------------------------------

_COLUMNS = (
    ("Slide", False),
    ("State", False),
    ("Objects", True),
    ("Density", True),
    ("Diameter", True),
    ("Covered", True),
    ("Occupied", True),
    ("Seams", False),
    ("Seconds", True),
    ("Mpx/s", True),
    ("Memory", True),
    ("Warnings", True),
)


def _row(place: int, slide: Slide) -> str:
    entry = slide.entry
    verdict = str(slide.seams.get("verdict", ""))
    warned = len(entry.get("warnings") or ())
    worked = slide.worked_megapixels
    speed = worked / slide.seconds if worked and slide.seconds else None
    name = _text(slide.name)
    return "".join(
        (
            f'<tr><td class="name" data-value="{name}"><a href="#s{place}"><bdi>{name}</bdi></a></td>',
            f'<td class="{_text(slide.status)}">{_text(slide.status)}</td>',
            _number(entry.get("objects"), "{:,}"),
            _with_unit(slide.density),
            _with_unit(slide.diameter),
            _number(slide.covered, "{:.1%}"),
            _number(slide.occupied, "{:.0%}"),
            f'<td class="{"suspicious" if verdict == "suspicious" else ""}">{_text(verdict)}</td>',
            _number(slide.seconds or None, "{:,.1f}"),
            _number(speed, "{:.2f}"),
            _number(slide.peak_bytes or None, "{}", _bytes_text(slide.peak_bytes)),
            f'<td class="number" data-value="{warned}">{warned or ""}</td></tr>',
        )
    )


def _number(value: float | None, form: str, text: str | None = None) -> str:
    if value is None:
        return '<td class="number" data-value=""></td>'
    return f'<td class="number" data-value="{value:.10g}">{text or form.format(value)}</td>'


def _with_unit(value: tuple[float, str] | None) -> str:
    if value is None:
        return _number(None, "")
    return _number(value[0], "", f"{_short(value[0])}&nbsp;{_text(value[1])}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _totals(slides: Sequence[Slide]) -> str:
    failed = sum(one.status == "failed" for one in slides)
    suspicious = sum(one.seams.get("verdict") == "suspicious" for one in slides)
    objects = sum(one.entry.get("objects") or 0 for one in slides if not one.is_of_classes)
    megapixels = sum(one.megapixels or 0 for one in slides)
    sums = (
        ("slides", f"{len(slides):,}", ""),
        ("failed", f"{failed:,}", "failed" if failed else "good"),
        ("objects", f"{objects:,}", ""),
        ("megapixels", f"{megapixels:,.1f}", ""),
        ("with suspicious seams", f"{suspicious:,}", "suspicious" if suspicious else "good"),
    )
    cells = "".join(
        f'<div><b class="{kind}">{value}</b><span class="pale">{name}</span></div>'
        for name, value, kind in sums
    )
    return f'<div class="sums">{cells}</div>'


# --- details --------------------------------------------------------------------------------------


def _details(place: int, slide: Slide, opened: bool) -> str:
    entry = slide.entry
    shown = " open" if opened else ""
    noun = "classes" if slide.is_of_classes else "objects"
    count = "" if entry.get("objects") is None else f" &middot; {entry['objects']:,} {noun}"
    return f"""<details class="slide"{shown}><summary><bdi>{_text(slide.name)}</bdi> &middot;
<span class="{_text(slide.status)}">{_text(slide.status)}</span>{count}</summary><div id="s{place}">
{_failures(entry)}{_warnings(entry)}
<div class="side">{_picture(slide)}{_facts(slide)}</div>
<div class="side charts"><div>{_sizes(slide)}</div><div>{_seams(slide)}</div></div>
{_timings(slide)}
{_repeat(slide)}</div></details>"""


def _picture(slide: Slide) -> str:
    if not slide.thumbnail:
        return ""
    image = f'<img alt="the slide with its objects" decoding="async" src="{slide.thumbnail}">'
    png = f"{slide.name}.png"
    linked = f'<a href="{_link(png)}">{image}</a>' if png in slide.files else image
    return f'<div class="picture">{linked}</div>'


def _facts(slide: Slide) -> str:
    entry, size = slide.entry, slide.pixel_size_um
    facts: list[tuple[str, str]] = [("source", _text(entry.get("source", "")))]
    if entry.get("plane"):
        told = ", ".join(f"{key} {value}" for key, value in entry["plane"].items())
        facts.append(("plane", _text(told)))
    if slide.shape:
        facts.append(("size", f"{slide.shape[0]:,} x {slide.shape[1]:,} px"))
        if size:
            height, width = (side * size / 1000 for side in slide.shape)
            facts[-1] = ("size", f"{facts[-1][1]}, {height:.3g} x {width:.3g} mm")
        facts.append(("pixel size", f"{size:.4g} um" if size else "not known"))
    if entry.get("scale", 1.0) != 1.0:
        facts.append(("worked on at", f"{entry['scale']:.4g} px a side to one"))
    inside = ""
    if slide.looked_at is not None:
        inside = " of the area inside the mask"
        facts.append(("looked at", f"{slide.looked_at:.1%} of the image: inside tile.mask"))
    if slide.density:
        facts.append(("density", f"{_short(slide.density[0])} {slide.density[1]}{inside}"))
    if slide.diameter:
        facts.append(("median diameter", f"{slide.diameter[0]:.3g} {slide.diameter[1]}"))
    if slide.covered is not None:
        facts.append(("covered by objects", f"{slide.covered:.1%}{inside}"))
    if slide.occupied is not None:
        tiles, skipped = entry["tiles"], entry.get("tiles_skipped") or 0
        why = entry.get("tiles_skipped_because") or {}
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in why.items() if count)
        told = f"{slide.occupied:.0%}: {skipped:,} of {tiles:,} tiles skipped"
        facts.append(("occupied", _text(told + (f" ({kinds})" if kinds else ""))))
    if entry.get("model"):
        why = f", chosen: {entry['model_chosen']}" if entry.get("model_chosen") else ""
        exact = "" if entry.get("exact", True) else ", not exact by its nature"
        facts.append(("model", _text(f"{entry['model']}{exact}{why}")))
    links = ", ".join(
        f'<a href="{_link(file)}">{kind}</a>'
        for suffix, kind in _FILES.items()
        for file in slide.files
        if file == f"{slide.name}{suffix}"
    )
    if links:
        facts.append(("results", links))
    rows = "".join(f'<tr><th scope="row">{key}</th><td>{value}</td></tr>' for key, value in facts)
    return f'<div class="facts"><table>{rows}</table></div>'


def _failures(entry: Mapping[str, Any]) -> str:
    if not entry.get("error"):
        return ""
    regions = list(entry.get("failed_regions") or ())
    rows = "".join(
        f"<tr><td>{_text(one.get('stage', ''))}</td><td>{_text(one.get('region', ''))}</td>"
        f"<td>{_text(_box(one.get('box')))}</td>"
        f'<td class="error">{_text(one.get("error", ""))}</td></tr>'
        for one in regions[:NAMED_REGIONS]
    )
    more = len(regions) - NAMED_REGIONS
    rest = f"<p>and {more:,} more, in run.json</p>" if more > 0 else ""
    head = "<tr><th>stage</th><th>region</th><th>box: y, x</th><th>error</th></tr>"
    table = f'<div class="scroll"><table>{head}{rows}</table></div>{rest}' if regions else ""
    return f'<p class="failed">{_text(entry["error"])}</p>{table}'


def _box(box: Any) -> str:
    return f"{box[0]}:{box[2]}, {box[1]}:{box[3]}" if box else ""


def _warnings(entry: Mapping[str, Any]) -> str:
    return "".join(
        f'<p><span class="suspicious">warning</span> {_text(one)}</p>'
        for one in entry.get("warnings") or ()
    )


def _sizes(slide: Slide) -> str:
    sizes = slide.sizes
    unit, factor = ("um", slide.pixel_size_um) if slide.pixel_size_um else ("px", 1.0)
    edges = [edge * factor for edge in sizes.get("diameter_edges_px", [])]
    chart = histogram_svg(
        edges, sizes.get("counts", []), "objects by diameter", f"equivalent diameter, {unit}"
    )
    return f"<h3>Size of objects</h3>{chart}" if chart else ""


def _seams(slide: Slide) -> str:
    check = slide.seams
    if not check:
        return ""
    verdict = str(check["verdict"])
    kind = "suspicious" if verdict == "suspicious" else "good" if verdict == "none seen" else "pale"
    text = f'<h3>Seam check: <span class="{kind}">{_text(verdict)}</span></h3>{_seam_words(check)}'
    if not check["lattices"]:
        return text
    figures = "".join(
        f"<tr><td>{_text(one['name'])}</td><td>{_text(figure['name'])}</td>"
        f'<td class="number">{figure["ratio"]:.2f}</td>'
        f'<td class="number">{_interval(figure)}</td><td class="number">{figure["p"]:.2g}</td></tr>'
        for one in check["lattices"]
        for figure in one["figures"]
    )
    first = check["lattices"][0]
    step = " and ".join(str(one) for one in sorted(set(first["step"])))
    chart = lines_svg(
        first["seam_share"],
        first["elsewhere_share"],
        "pixels at which an object ends, on seams and on shifted lattices",
        f"the same lattice shifted by multiples of {step} px",
    )
    head = (
        "<tr><th>seams of</th><th>beside seams</th><th class=number>times elsewhere</th>"
        "<th class=number>95 %</th><th class=number>p</th></tr>"
    )
    return (
        f"{text}<p class=pale>Pixels of a line at which an object ends:</p>{chart}"
        f"<details><summary>all figures</summary><table>{head}{figures}</table></details>"
    )


def _interval(figure: Mapping[str, Any]) -> str:
    high = figure["high"]
    return "not known" if high is None else f"{figure['low']:.2f} to {high:.2f}"


def _seam_words(check: Mapping[str, Any]) -> str:
    verdict, p = check["verdict"], check["p"]
    cuts = [one["least_cut"] for one in check["lattices"] if one["least_cut"] is not None]
    least = min(cuts, default=None)
    power = f" Cutting {least:.0%} of the objects on seams would have shown." if least else ""
    if verdict == "no seams":
        return "<p>The image is one tile and one region: there are no seams.</p>"
    if verdict == "too little to tell":
        return (
            "<p>Too few objects lie on seams for a cut of all of them to be told from chance.</p>"
        )
    if verdict == "suspicious":
        return (
            f"<p>Objects end, or lie, otherwise at seams than elsewhere; chance alone does that in "
            f"a share of {p:.1g} of slides. Look at the figures, and at the slide.</p>"
        )
    return (
        f"<p>Beside seams objects are as elsewhere: chance alone gives as conspicuous figures in "
        f"up to {p:.0%} of slides.{power}</p>"
    )


def _timings(slide: Slide) -> str:
    seconds = slide.entry.get("seconds") or {}
    peaks = slide.entry.get("peak_memory_bytes") or {}
    rows = "".join(
        f'<tr><td>{stage}</td><td class="number">{seconds[stage]:,.1f}</td>'
        f'<td class="number">{_speed(slide.worked_megapixels, seconds[stage])}</td>'
        f'<td class="number">{_bytes_text(peaks.get(stage, 0))}</td></tr>'
        for stage in STAGES
        if stage in seconds
    )
    if not rows:
        return ""
    head = (
        "<tr><th>stage</th><th class=number>seconds</th><th class=number>Mpx/s</th>"
        "<th class=number>memory</th></tr>"
    )
    return (
        f"<h3>Work</h3><table>{head}{rows}</table><p class=pale>Seconds from the stage's start to "
        "its end, beside other images in flight; memory: the most that its largest process had "
        "since that began.</p>"
    )


def _speed(megapixels: float | None, seconds: float) -> str:
    return f"{megapixels / seconds:.2f}" if megapixels and seconds else ""


def _repeat(slide: Slide) -> str:
    made = slide.entry.get("segpipe")
    text = f"<p class=pale>made by segpipe {_text(made)}</p>" if made else ""
    made_by = slide.entry.get("made_by")
    if made_by:
        text += f"<p class=pale>probabilities by {_text(' and '.join(made_by))}</p>"
    command = f"<pre>{_text(slide.command)}</pre>" if slide.command else ""
    return f"<h3>To make it again</h3>{command}{text}" if command else ""


def _last_run(run: Mapping[str, Any]) -> str:
    if not run:
        return "<p class=pale>There is no run.json.</p>"
    versions = {"segpipe": run.get("segpipe"), "python": run.get("python")}
    told = ", ".join(
        f"{key} {value}" for key, value in (versions | run.get("libraries", {})).items()
    )
    settings = json.dumps(run.get("settings"), indent=1, ensure_ascii=False)
    return (
        f"<p>{_text(told)}; {_text(run.get('platform', ''))}</p>"
        f"<details><summary>all settings</summary><pre>{_text(settings)}</pre></details>"
    )


def _text(value: object) -> str:
    return escape(str(value))


def _link(file: str) -> str:
    """A file in OUT, from the page: its name cannot be taken for anything but a path."""
    return "./" + quote(os.fsencode(file))


def _bytes_text(count: int) -> str:
    return f"{count / 1e6:,.0f}&nbsp;MB" if count else ""
