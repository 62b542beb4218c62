"""What is written from the settings, for people and editors: every key is described in `settings` only.

    configs/schema.json    JSON schema of a project's YAML: editors complete and check keys by it
    configs/default.yaml   every key once, with its default
    docs/settings.md       every key, with what it may be

`make docs` writes them; a test holds them equal to what this module gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from segpipe.settings import PROJECT_KEYS, Project

Schema = dict[str, Any]

DRAFT = "http://json-schema.org/draft-07/schema#"
"""The YAML language server has long known this one only."""

_COMMENT_COLUMN = 32
_PROJECT = "What to work on; the command line wins. Paths are relative to the current folder."

_PAGE = """\
# Settings

<!-- Written by `make docs` from pipeline/segpipe/settings.py; change it there. -->

Every key of a project's YAML, which `segpipe init FOLDER` starts for you; one that is left out has its
default. `-s SECTION.KEY=VALUE` sets a key for a run of `segpipe predict`, and
`--config SECTION='{KEY: VALUE}'` for one of Snakemake. Editors with a YAML language server complete and
check the keys where the first line names [the schema](../configs/schema.json), as in
[default.yaml](../configs/default.yaml)."""


def settings_schema() -> Schema:
    """JSON schema of a project's YAML: project keys and sections, and no others.

    It knows each key alone. That sizes divide one another, or that one model is named, is found when
    the settings are read.
    """
    whole = Project.model_json_schema()
    properties: Schema = {key: _plain(whole["properties"][key]) for key in PROJECT_KEYS}
    for name, field in whole["properties"].items():
        if name not in PROJECT_KEYS:
            section = whole["$defs"][field["$ref"].rpartition("/")[2]]
            # A section whose keys are all commented out is null.
            properties[name] = _plain(section) | {"type": ["object", "null"]}
    return {
        "$schema": DRAFT,
        "title": "segpipe project",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _plain(schema: Any) -> Any:
    """Without titles, which only repeat the keys, and in words that the draft knows."""
    if isinstance(schema, list):
        return [_plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    plain: Schema = {}
    for word, value in schema.items():
        if word == "properties":
            plain[word] = {key: _plain(inner) for key, inner in value.items()}
        elif word == "prefixItems":
            (plain["items"],) = {json.dumps(one): one for one in value}.values()
        elif word not in ("title", "format"):
            plain[word] = _plain(value)
    return plain


def schema_json() -> str:
    """Text of `configs/schema.json`."""
    return json.dumps(settings_schema(), indent=2, ensure_ascii=False) + "\n"


def schema_line(schema: str) -> str:
    """The first line of a YAML that names its schema, by a URL or a path without spaces."""
    return f"# yaml-language-server: $schema={schema}"


def default_yaml() -> str:
    """All settings with their defaults and a comment each: the text of `configs/default.yaml`."""
    lines = [
        schema_line("schema.json"),
        "# Every setting once, with its default. Copy what you change into a YAML of your own.",
        "",
        f"# {_PROJECT}",
    ]
    last = ""
    for section, key, schema in described():
        if section != last:
            lines += ["", f"{section}:"]
            last = section
        indent = "  " if section else ""
        lines.append(indent + setting_line(key, schema["default"], schema["description"]))
    return "\n".join(lines) + "\n"


def setting_line(key: str, value: Any, comment: str) -> str:
    """A key with its value and a comment, as a line of YAML.

    >>> setting_line("interior", [0.7, 0.5], "thresholds")
    'interior: [0.7, 0.5]            # thresholds'
    """
    return f"{f'{key}: {value_text(value)}':<{_COMMENT_COLUMN - 1}} # {comment}"


def value_text(value: Any) -> str:
    r"""A value as YAML on one line.

    >>> print(value_text("a: b"), value_text("two\nlines"))
    'a: b' "two\nlines"
    """
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    dumped = yaml.safe_dump(
        value, default_style=style, default_flow_style=True, allow_unicode=True, width=2**20
    )
    return dumped.splitlines()[0]


def described() -> Iterator[tuple[str, str, Schema]]:
    """Section ("" at the top), key and schema of every setting, in order."""
    for name, schema in settings_schema()["properties"].items():
        if "properties" in schema:
            yield from ((name, key, inner) for key, inner in schema["properties"].items())
        else:
            yield "", name, schema


def settings_markdown() -> str:
    """Text of `docs/settings.md`."""
    lines = [_PAGE]
    sections = settings_schema()["properties"]
    last = None
    for section, key, schema in described():
        if section != last:
            heading = f"`{section}`" if section else "At the top"
            told = sections[section]["description"] if section else _PROJECT
            table = ["| key | values | default | what |", "|---|---|---|---|"]
            lines += ["", f"## {heading}", "", told, "", *table]
            last = section
        cells = (
            f"`{key}`",
            allowed(schema),
            f"`{value_text(schema['default'])}`",
            schema["description"],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def allowed(schema: Mapping[str, Any]) -> str:
    """What a value may be, in words.

    >>> allowed({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]})
    'integer from 1 or `null`'
    """
    if "anyOf" in schema:
        words = [allowed(one) for one in schema["anyOf"]]
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{one}`" for one in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        item = allowed(schema["items"])
        return (
            f"[{', '.join([item] * schema['maxItems'] if 'maxItems' in schema else [item, '...'])}]"
        )
    words_of = {"boolean": "`true`, `false`", "null": "`null`", "string": "text"}
    kind: str = schema["type"]
    return words_of.get(kind, kind) + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    """`ge=0` and `gt=0` may both be stated: the narrower one counts."""
    words = {
        "exclusiveMinimum": "above",
        "minimum": "from",
        "exclusiveMaximum": "below",
        "maximum": "to",
    }
    if "exclusiveMinimum" in schema:
        del words["minimum"]
    return "".join(
        f" {word} {schema[bound]:,.10g}" for bound, word in words.items() if bound in schema
    )


def _columns_markdown() -> str:
    from segpipe.columns import columns_markdown  # numba

    return columns_markdown()


WRITTEN = {
    "configs/schema.json": schema_json,
    "configs/default.yaml": default_yaml,
    "docs/settings.md": settings_markdown,
    "docs/columns.md": _columns_markdown,
}
"""Files of the repository, and who gives their text."""


def write_settings_docs(root: Path) -> None:
    """Write all of them into a checkout."""
    for name, text in WRITTEN.items():
        (root / name).write_text(text(), encoding="utf-8")


if __name__ == "__main__":
    write_settings_docs(Path())
