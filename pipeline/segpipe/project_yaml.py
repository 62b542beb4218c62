"""`init`: a commented project YAML for a folder that was looked at.

What the images leave open is marked FILL IN; what has its default is commented out.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from segpipe import __version__
from segpipe.advice import Advice, advise
from segpipe.choosing import auto_model
from segpipe.errors import SettingsError
from segpipe.inputs import plain_name
from segpipe.models.modelfile import find_model, read_card
from segpipe.results import counted
from segpipe.settings_docs import described, schema_line, setting_line, value_text
from segpipe.slide import is_zarr_folder
from segpipe.slide.source import printable
from segpipe.survey import LISTED, Survey, survey
from segpipe.whole_file import write_whole
from segpipe.workflow import find_snakefile

WIDTH = 100
MORE = {
    "infer": ("device", "backend", "skip_empty"),
    "stitch": (*("foreground", "interior", "min_area", "max_area", "min_probability", "max_hole"),),
    "measure": ("preview",),
    "export": ("formats",),
    "engine": ("workers",),
}
"""The other keys that people change most."""


def write_project_yaml(given: Path, path: Path, *, force: bool = False) -> list[tuple[str, str]]:
    """Look at the images and write their YAML; what was found, as keys and values to be shown.

    Raises
    ------
    SettingsError
        When there is a file at `path` already and it is not to be replaced, or it cannot be written;
        as `survey`.
    InputError
        As `survey`.
    """
    if path.is_dir():
        raise SettingsError(f"{path} is a folder; name a file with -o")
    if path.exists() and not force:
        raise SettingsError(f"{path} exists; replace it with --force, or name another with -o")
    out = _absolute(path).parent / f"{_name(given)}-segmented"
    found = survey(given, out)
    advices = advise(found)
    text = project_yaml(found, advices, given, out, path)
    try:
        write_whole(path, text.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from error
    return list(_told(found, advices, path))


def _told(found: Survey, advices: Sequence[Advice], path: Path) -> Iterator[tuple[str, str]]:
    yield "images", found.told_sizes()
    yield from (("channels", line) for line in found.told_channels())
    yield "pixel size", found.told_pixel_sizes()
    yield from (("unreadable", one) for one in found.unreadable[:LISTED])
    if len(found.unreadable) > LISTED:
        yield "unreadable", f"and {len(found.unreadable) - LISTED} more"
    yield "wrote", str(path)
    for advice in advices:
        if advice.kind == "set":
            yield "set", f"{advice.key}: {value_text(advice.value)}"
    for advice in advices:
        if advice.kind == "fill in":
            yield "fill in", f"{advice.key}: {advice.told.rstrip('.')}"
    yield from zip(("then", "or"), _commands(path), strict=True)


def _name(given: Path) -> str:
    path = given.resolve()
    folder = path.is_dir() and not is_zarr_folder(path)
    return (path.name if folder else plain_name(path)) or "images"


def _commands(path: Path) -> tuple[str, str]:
    name = shlex.quote(str(path))
    return (
        f"segpipe predict -c {name}",
        f'snakemake --snakefile "$(segpipe workflow)" --cores 2 --configfile {name}',
    )


def project_yaml(
    found: Survey, advices: Sequence[Advice], given: Path, out: Path, path: Path
) -> str:
    """Text of the YAML at `path` for what was given, with results in OUT."""
    configs = find_snakefile().parent / "configs"
    settings = {f"{section}.{key}".lstrip("."): schema for section, key, schema in described()}
    card = _card_values(found)
    lines = [
        schema_line((configs / "schema.json").absolute().as_uri()),
        *_comment(
            f"Written by segpipe init {__version__} from the headers of {counted(found.files, 'file')}. "
            f"FILL IN marks what only you can tell; what is commented out has its default. "
            f"All keys: {printable(configs / 'default.yaml', 2**12)}"
        ),
        "#",
        *(f"#   {printable(command, 2**12)}" for command in _commands(Path(path.name))),
        *_unreadable(found),
        "",
        *_comment(f"{found.told_sizes()}."),
        _line("input", str(_absolute(given))),
        _line("output", str(out)),
    ]
    section, commented = "", True
    for advice in advices:
        if advice.key.rpartition(".")[0] != section:
            section = advice.key.rpartition(".")[0]
            lines += ["", f"{section}:"]
        elif commented or advice.told:
            lines.append("")
        commented = bool(advice.told)
        lines += _advised(advice, settings[advice.key])
    for section, keys in MORE.items():
        lines += ["", f"{section}:"]
        if section == "stitch" and card:
            lines += _comment(
                f"{', '.join(card)}: as in the card of {auto_model(rgb=False)}.", "  "
            )
        for key in keys:
            schema = settings[f"{section}.{key}"]
            value = card.get(key, schema["default"]) if section == "stitch" else schema["default"]
            lines.append("  # " + setting_line(key, value, schema["description"]))
    return "\n".join(lines) + "\n"


def _advised(advice: Advice, schema: dict[str, Any]) -> Iterator[str]:
    section, _, key = advice.key.rpartition(".")
    indent = "  " if section else ""
    told = f"FILL IN: {advice.told}" if advice.kind == "fill in" else advice.told
    yield from _comment(f"{told} {advice.more}".strip(), indent)
    for one in advice.listed:
        yield from _comment(f"  {one}", indent)
    if advice.kind == "set":
        yield _line(key, advice.value, indent)
    elif advice.kind == "fill in":
        yield f"{indent}{key}:"
    else:
        yield f"{indent}# {setting_line(key, schema['default'], schema['description'])}"


def _card_values(found: Survey) -> dict[str, Any]:
    """Settings that have the value of the model's card; none where the model is not known."""
    model = auto_model(rgb=found.rgb == len(found.images))
    decode = read_card(find_model(model)).decode.model_dump()
    return {key: decode[key] for key in MORE["stitch"] if key in decode}


def _unreadable(found: Survey) -> list[str]:
    if not found.unreadable:
        return []
    lines = ["#", f"# Could not be read, and predict will say so too ({len(found.unreadable)}):"]
    for one in found.unreadable[:LISTED]:
        lines += _comment(f"  {one}")
    return lines + ["#   and others"] * (len(found.unreadable) > LISTED)


def _absolute(path: Path) -> Path:
    """From whatever folder it is used; through links as they were given."""
    return path.resolve() if ".." in path.parts else path.absolute()


def _line(key: str, value: Any, indent: str = "") -> str:
    return f"{indent}{key}: {value_text(value)}"


def _comment(text: str, indent: str = "") -> list[str]:
    """Lines of a comment; spaces at the start of the text stay at the start of each line."""
    start = f"{indent}# " + " " * (len(text) - len(text.lstrip()))
    return textwrap.wrap(
        text.strip(),
        WIDTH,
        initial_indent=start,
        subsequent_indent=start,
        break_long_words=False,
        break_on_hyphens=False,
    )
