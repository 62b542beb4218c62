"""`segpipe report`: strings to arguments, no more."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def report(out: Path) -> None:
    """Write OUT/report.html anew, from what OUT holds.

    One page, to be read without a network: all slides with their counts, sizes, seam check, times,
    warnings and failures, and what it takes to make them again. `predict` ends with it.
    """
    from segpipe.reporting import write_report

    click.echo(write_report(out))
