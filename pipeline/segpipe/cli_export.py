"""`segpipe export`: strings to arguments, no more. Heavy imports stay inside the command."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@click.option(
    "--format", "formats", multiple=True, required=True, metavar="FORMAT,...",
    help="geojson, geoparquet, csv, anndata, tiff; several with commas, or the option again.",
)  # fmt: skip
@click.option(
    "--simplify", type=float, metavar="PX",
    help="How far outlines may be off, for fewer corners. [default: 0, exact]",
)  # fmt: skip
@click.option(
    "--classification", metavar="NAME",
    help="Class that QuPath shows the objects as. [default: Nucleus]",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1), help="Number of processes.")
def export(
    out: Path,
    images: tuple[str, ...],
    formats: tuple[str, ...],
    simplify: float | None,
    classification: str | None,
    workers: int | None,
) -> None:
    """Write the finished images in OUT, or those named, for other programs.

    \b
    geojson      OUT/<name>.geojson.gz      outlines and measurements for QuPath
    geoparquet   OUT/<name>.geoparquet      the same for geopandas, DuckDB, QGIS
    csv          OUT/<name>.csv             the table
    anndata      OUT/<name>.h5ad            the table for scanpy and squidpy
    tiff         OUT/<name>.labels.ome.tif  the labels with their pyramid

    Exports that are there already are not made again. Exit code 0: all done. 1: an image failed and is
    named. 2: wrong usage.
    """
    from segpipe.exporting import export_images
    from segpipe.progress import log_to_stderr
    from segpipe.settings import load_settings

    log_to_stderr()
    settings = load_settings(
        options={
            "export.formats": list(formats),
            "export.simplify_px": simplify,
            "export.classification": classification,
        }
    )
    sys.exit(export_images(out, images, settings.export, workers))
