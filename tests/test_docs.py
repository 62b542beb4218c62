"""The examples of the site run, page after page in one folder, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


def pages():
    """Names of the guides in the order of the index, which is that of reading."""
    index = (DOCS / "index.md").read_text()
    named = re.findall(r"^([a-z_]+(?:/[a-z_]+)?)$", index, re.MULTILINE)
    return [name for name in named if BLOCK.search((DOCS / f"{name}.md").read_text())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reader")


@pytest.mark.parametrize("page", pages())
def test_the_examples_of_a_page_run(folder, page):
    """Python blocks of a page are one program, in which shell blocks run where they stand."""
    program = ["import subprocess"]
    for language, text in BLOCK.findall((DOCS / f"{page}.md").read_text()):
        if language == "sh":
            program.append(
                f"subprocess.run(['bash', '-euo', 'pipefail', '-c', {text!r}], check=True)"
            )
        else:
            program.append(text)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_an_example_that_fails_is_seen(folder, monkeypatch, tmp_path):
    (tmp_path / "broken.md").write_text("```sh\nsegpipe predict nowhere -o out\n```\n")
    monkeypatch.setitem(globals(), "DOCS", tmp_path)
    with pytest.raises(AssertionError, match="nowhere"):
        test_the_examples_of_a_page_run(folder, "broken")


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page):
    for target in LINK.findall((DOCS / page).read_text()):
        assert (DOCS / target).exists(), target
