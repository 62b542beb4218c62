"""Which reader opens a file: those of other packages by its suffix, segpipe's own by its content.

Another package adds a reader, or replaces one, by an entry point whose name is the suffix:

    [project.entry-points."segpipe.readers"]
    czi = "my_package:open_czi"

`open_czi(path) -> Contents` reads headers, not pixels, and raises InputError (from `unusable`) for a
file that it cannot read. See docs/readers.md.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from segpipe.slide.planes import Contents
from segpipe.slide.source import printable, reading, unusable

GROUP = "segpipe.readers"
Opener = Callable[[Path], Contents]


@dataclass(frozen=True)
class OwnReader:
    """A reader of ours that needs packages of an extra; `function` is its place in this package."""

    function: str
    extra: str


_OPENSLIDE = OwnReader("openslide_reader:open_openslide", "wsi")
_BIOIO = OwnReader("bioio_reader:open_bioio", "bioio")
OPTIONAL = {
    **dict.fromkeys((".mrxs", ".vms", ".vmu", ".svslide", ".bif", ".dcm"), _OPENSLIDE),
    ".czi": OwnReader("czi_reader:open_czi", "bioio"),
    **dict.fromkeys((".nd2", ".lif", ".vsi", ".dv"), _BIOIO),
}
"""By suffix in lower case. VSI and DV need a bioio reader that no extra holds; the error says so."""

NOT_SEARCHED = frozenset({".dcm"})
"""Several such files are one slide: one of them is named, a folder of them is not searched."""


def searched_suffixes() -> frozenset[str]:
    """Suffixes of files that are images when a folder is searched, whoever reads them."""
    return (frozenset(OPTIONAL) | frozenset(_plugins())) - NOT_SEARCHED


def find_reader(path: Path) -> Opener | None:
    """What opens files of this suffix; None where the content decides.

    Raises
    ------
    InputError
        When the package that it needs is not installed, or cannot be imported.
    """
    suffix = path.suffix.lower()
    plugins = _plugins().get(suffix, ())
    if len(plugins) > 1:
        named = ", ".join(sorted(printable(plugin.value) for plugin in plugins))
        raise unusable(path, f"is read by several installed packages ({named})", "keep one of them")
    if plugins:
        return _loaded(path, plugins[0].load, printable(plugins[0].value))
    optional = OPTIONAL.get(suffix)
    if optional is None:
        return None
    try:
        return _own(optional.function)
    except ImportError as error:
        raise unusable(
            path,
            f"needs a package that is not installed ({printable(error)})",
            f"pip install 'segpipe[{optional.extra}]'",
        ) from error


def _own(function: str) -> Opener:
    module, name = function.split(":")
    opener: Opener = getattr(importlib.import_module(f"segpipe.slide.{module}"), name)
    return opener


def _loaded(path: Path, load: Callable[[], Any], name: str) -> Opener:
    """An opener of another package, whose exceptions are the file's fault."""
    try:
        opener = load()
    except Exception as error:  # whatever the package does when it is imported
        why = printable(str(error) or type(error).__name__)
        raise unusable(
            path, f"has a reader {name} that cannot be loaded ({why})", "repair it"
        ) from error

    def opened(given: Path) -> Contents:
        with reading(given, f"cannot be read by {name}", "copy or export it again"):
            contents: Contents = opener(given)
        return contents

    return opened


@functools.cache
def _plugins() -> dict[str, tuple[EntryPoint, ...]]:
    """Entry points by the suffix that they are named after; none is loaded yet."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=GROUP):
        suffix = "." + entry.name.strip().lower().removeprefix(".")
        found[suffix] = (*found.get(suffix, ()), entry)
    return found
