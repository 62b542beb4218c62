"""Which exports of an image there are, and which are still to be made.

They are recorded in the manifest of measure, each with a key of all that decides it. With other
settings of `export` an export is made again and nothing else; with other labels all of them go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segpipe.records import fingerprint
from segpipe.settings import ExportSettings

SUFFIXES: Mapping[str, str] = {
    "geojson": ".geojson.gz",
    "geoparquet": ".geoparquet",
    "csv": ".csv",
    "anndata": ".h5ad",
    "tiff": ".labels.ome.tif",
}
"""Of the files beside the table. None is the suffix of another: no image overwrites another's."""
OUTLINES = ("geojson", "geoparquet")
"""Those that hold outlines: written in one go."""
VERSION = {"geojson": 2, "geoparquet": 2, "csv": 1, "anndata": 1, "tiff": 1}
"""Raised when a format's content changes."""
FACT = "exports"
"""In the facts of the manifest."""


def export_path(out: Path, name: str, format_: str) -> Path:
    """Where an export lies."""
    return out / f"{name}{SUFFIXES[format_]}"


def export_key(format_: str, settings: ExportSettings) -> str:
    """Hash of all that decides an export besides labels and table."""
    own: list[Any] = []
    if format_ in OUTLINES:
        own.append(settings.simplify_px)
    if format_ == "geojson":
        own.append(settings.classification)
    return fingerprint(format_, VERSION[format_], own)


def missing_exports(
    out: Path, name: str, settings: ExportSettings, facts: Mapping[str, Any]
) -> list[str]:
    """The formats asked for that are not there with these settings; `facts` of measure's manifest."""
    recorded = facts.get(FACT, {})
    missing: list[str] = []
    for format_ in settings.formats:
        told = recorded.get(format_, {})
        path = export_path(out, name, format_)
        try:
            whole = path.stat().st_size == told.get("bytes")
        except OSError:
            whole = False
        if not whole or told.get("key") != export_key(format_, settings):
            missing.append(format_)
    return missing


def remove_exports(out: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Remove the exports that a manifest of measure tells of: they are of labels that go."""
    for format_ in facts.get(FACT, {}):
        if format_ in SUFFIXES:
            export_path(out, name, format_).unlink(missing_ok=True)


def check_formats(formats: Sequence[str]) -> None:
    """Say what is lacking for these formats, before anything is started.

    Raises
    ------
    SettingsError
        When a package is not installed.
    """
    if "anndata" in formats:
        from segpipe.export.h5ad import check_h5ad

        check_h5ad()
