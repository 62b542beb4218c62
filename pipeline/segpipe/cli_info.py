"""`segpipe info`: strings to arguments, no more. Heavy imports stay inside the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE..."
)
@click.option("-m", "--model", metavar="NAME|FILE", help="As for predict. [default: auto]")
@click.option(
    "-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As for predict."
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="A JSON list, for machines.")
def info(
    files: tuple[Path, ...], model: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """What each FILE is, and what predict would do with it. No pixels are segmented.

    Size, channels, pixel size and who states it, levels of the pyramid, planes and scenes, pictures
    beside the slide that are left out, what is wrong; the model that would be chosen and why, and how
    many tiles. FILE may be an address (https://..., s3://...) of an OME-Zarr.
    Exit code 0: all can be read. 1: some cannot, and are named.
    """
    from segpipe.describing import describe
    from segpipe.settings import load_project

    settings = load_project(None, overrides, {"infer.model": model}).settings
    found, failed = describe(files, settings)
    if as_json:
        click.echo(json.dumps([one.to_json() for one in found], indent=2))
    else:
        for number, one in enumerate(found):
            if number:
                click.echo()
            for key, value in one.lines():
                click.echo(f"{key:<12}{value}")
    for error in failed:
        click.echo(f"segpipe: {error}", err=True)
    sys.exit(1 if failed else 0)
