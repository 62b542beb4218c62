"""`segpipe view`: strings to arguments, no more. Heavy imports stay inside the command."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--port", type=click.IntRange(1, 65535), help="Of 127.0.0.1. [default: any that is free]"
)
@click.option("--no-browser", is_flag=True, help="Print the address, and open nothing.")
def view(out: Path, port: int | None, no_browser: bool) -> None:
    """Look at the images of OUT and their objects, in the browser.

    Only this machine can see the page, and only at the address that is printed. From another one:
    ssh -L PORT:127.0.0.1:PORT, with the same --port.
    """
    from segpipe.viewer import Server, serve
    from segpipe.viewer.catalogue import Catalogue

    serve(Server(Catalogue(out), port or 0), browser=not no_browser, told=click.echo)
