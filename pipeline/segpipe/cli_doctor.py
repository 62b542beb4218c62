"""`segpipe doctor`: strings to arguments, no more. Heavy imports stay inside the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command()
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path),
    help="A folder for results, to be tried too: space, locks, speed.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="A JSON object, for machines.")
def doctor(out: Path | None, as_json: bool) -> None:
    """What this installation can do on this machine, and what is broken: to be sent with a question.

    Versions, cores, memory and its limit, the device and the backend that `auto` takes, extras that
    are missing and how to install them, models, disk. A file of 32 MB is written and removed.
    Exit code 0: segpipe can work. 1: something is broken, and is named as a problem.
    """
    from segpipe.doctor import PROBLEM, examine, to_json

    found = []
    for one in examine(out):
        found.append(one)
        if not as_json:
            click.echo(one.line())
    if as_json:
        click.echo(json.dumps(to_json(found), indent=2))
    sys.exit(1 if any(one.state == PROBLEM for one in found) else 0)
