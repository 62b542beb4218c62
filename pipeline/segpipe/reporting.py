"""OUT/report.html: all that OUT holds, whichever runs made it, from its manifests and run.json."""

from __future__ import annotations

import base64
import io
import json
import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from segpipe.errors import SettingsError
from segpipe.export.report import Slide, by_need, report_page
from segpipe.inputs import Input, known_inputs
from segpipe.records import locked, read_json, write_text
from segpipe.report import read_entries
from segpipe.slide import address
from segpipe.stages.image import STAGES
from segpipe.stages.manifest import Manifest, manifest_chain
from segpipe.stages.places import thumbnail_path

log = logging.getLogger(__name__)

REPORT = "report.html"
BUDGET_BYTES = 12_000_000
"""Of all thumbnails together, before they become base64."""
_WIDEST = 800
"""Pixels of a thumbnail."""
_STEPS = ((1, 80), (1, 50), (2, 80), (2, 50), (4, 60))
"""How much smaller than that it is, and quality of its JPEG; by powers of two a JPEG becomes smaller
while it is decoded, in a fraction of the time."""


def write_report(out: Path) -> Path:
    """Write OUT/report.html anew; its path.

    Raises
    ------
    SettingsError
        When OUT holds no results.
    """
    entries = read_entries(out)
    known = {one.name: one for one in known_inputs(out)}
    if not known and not entries:
        raise SettingsError(f"{out} holds no results of segpipe")
    names = sorted(known.keys() | entries.keys())
    budget = BUDGET_BYTES // len(names)
    path = out / REPORT
    with locked(out / "manifests" / ".report", REPORT, wait=True):  # the last one knows most
        found = [_slide(out, name, known.get(name), entries.get(name), budget) for name in names]
        slides = by_need([slide for slide in found if slide is not None])
        run = read_json(out / "run.json")
        text = report_page(out.resolve().name, slides, run if isinstance(run, dict) else {})
        write_text(path, text, durable=False)  # lost: `segpipe report` writes it again
    return path


def _slide(
    out: Path, name: str, known: Input | None, entry: Mapping[str, Any] | None, budget: int
) -> Slide | None:
    """What there is to tell of an image; None where that is nothing yet."""
    chain = manifest_chain(out, name)
    if entry is None and not chain:
        return None
    told = _told(entry or {}, known, chain)
    files = [f"{name}{suffix}" for suffix in (".png", ".parquet", ".ome.zarr")]
    there = tuple(file for file in files if (out / file).exists())
    return Slide(name, told, _command(told), _thumbnail(out, name, budget), there)


def _told(
    entry: Mapping[str, Any], known: Input | None, chain: Mapping[str, Manifest]
) -> dict[str, Any]:
    """An entry as in run.json, by what the manifests say now: another run may have gone on since."""
    told: dict[str, Any] = {"status": "unfinished", "error": None} | dict(entry)
    if known is not None:
        told |= {"source": address(known.source), "plane": known.plane.stated() or None}
    last = chain.get(STAGES[-1])
    if last is not None:
        told |= last.facts.get("image", {})
        told |= {
            key: last.facts.get(key) for key in ("seam_check", "sizes", "looked_at_px", "segpipe")
        }
    elif not entry or entry["status"] == "done":
        told["status"] = "unfinished"
    if not chain:
        return told
    facts = {stage: manifest.facts for stage, manifest in chain.items()}
    regions = [{"stage": one} | dict(bad) for one, mine in chain.items() for bad in mine.failed]
    told |= {
        "objects": facts.get("stitch", {}).get("objects"),
        "seconds": {stage: manifest.seconds for stage, manifest in chain.items()},
        "peak_memory_bytes": {
            s: f["peak_memory_bytes"] for s, f in facts.items() if "peak_memory_bytes" in f
        },
        "failed_regions": regions,
        "warnings": [warning for one in facts.values() for warning in one.get("warnings", [])],
        "made_by": list(facts.get("infer", {}).get("made_by", ())),
        "tiles": facts.get("infer", {}).get("tiles"),
        "tiles_skipped": facts.get("infer", {}).get("tiles_skipped"),
        "tiles_skipped_because": facts.get("infer", {}).get("tiles_skipped_because"),
    }
    lost = told["status"] == "failed" and not (entry or {}).get("failed_regions")
    if last is not None and not lost:  # lost: its file cannot be read now
        told["status"] = "failed" if regions else "done"
        told["error"] = told["error"] or "regions failed" if regions else None
    return told


def _command(entry: Mapping[str, Any]) -> str:
    """The command line that makes the result again, elsewhere too."""
    if "overrides" not in entry:
        return ""
    plan = entry["plan"]
    chosen = {
        "tile.region": entry["region"],
        "infer.batch": plan["batch"],
        "infer.backend": plan["backend"],
    } | entry["overrides"]
    model = chosen.pop("infer.model", entry["model"])
    for key, value in (entry.get("plane") or {}).items():
        chosen[f"tile.{key}"] = value
    words = ["segpipe", "predict", entry["source"], "-o", "OUT", "-m", model]
    for key, value in chosen.items():
        if key.startswith("engine."):  # who did the work cannot be seen in the result
            continue
        words += ["-s", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join(words)


def _thumbnail(out: Path, name: str, budget: int) -> str:
    """The picture as a data URI of at most `budget` bytes of JPEG; empty where there is none."""
    small, picture = thumbnail_path(out, name), out / f"{name}.png"
    try:
        data = small.read_bytes()
        if len(data) > budget:
            data = _smaller(data, budget)
    except OSError:
        try:
            data = _smaller(picture.read_bytes(), budget)
        except OSError:
            return ""
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}" if data else ""


def _smaller(data: bytes, budget: int) -> bytes:
    """A picture as the best JPEG of `_STEPS` that the budget allows; empty where none does."""
    with Image.open(io.BytesIO(data)) as picture:
        encoded, (width, height) = picture.format == "JPEG", picture.size
    fits = max(1, -(-width // _WIDEST))
    for factor, quality in _STEPS:
        expected = len(data) * quality / _STEPS[0][1] / factor**2
        if encoded and expected > 1.2 * budget and (factor, quality) != _STEPS[-1]:
            continue  # not tried: of a thousand pictures that alone would take a minute
        with Image.open(io.BytesIO(data)) as picture:
            by = fits * factor
            picture.draft("RGB", (max(1, width // by), max(1, height // by)))
            small = picture.convert("RGB").reduce(max(1, by // round(width / picture.width)))
        file = io.BytesIO()
        small.save(file, format="JPEG", quality=quality)
        if file.tell() <= budget:
            return file.getvalue()
    return b""
