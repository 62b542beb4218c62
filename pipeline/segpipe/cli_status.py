"""`segpipe status`: strings to arguments, no more. Heavy imports stay inside the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="A JSON object, for machines.")
def status(out: Path, as_json: bool) -> None:
    """How far the images in OUT are: what failed and why, what runs, what is done.

    \b
    failed      and why; the same command as before tries it again
    running     a process works on it, at this stage
    unfinished  begun, and nobody works on it now; this stage comes next
    waiting     not begun
    done        all four stages, and their seconds

    Only manifests and locks are read, while a run goes on too. Why an input cannot be read is known
    when its run ends.
    Exit code 0: nothing failed. 1: something did. 2: OUT holds no results.
    """
    from segpipe.status import FAILED, read_status

    found = read_status(out)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        for line in found.lines():
            click.echo(line)
    sys.exit(1 if FAILED in found.counts else 0)
