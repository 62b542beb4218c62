"""Every export of an image of a million objects: seconds, CPU time, size, memory of each process.

    python tests/benchmarks/exports.py --objects 250000 1000000 --folder FOLDER

Wanted: a million within 2 GB and a few minutes, and memory that does not grow with their number. The
objects are those that stitch and measure make of the field of `scale.py`, repeated. Beside the outlines
stands what cannot be done without: reading the labels once, and compressing the text of the GeoJSON.
Memory is the resident set without the pages of files, sampled ten times a second, each export in
processes of its own. CPU seconds are those of all its processes, start included.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import sys
import tempfile
import time
import zlib
from importlib import import_module
from pathlib import Path

from scale import Silent, image_of, made_probabilities, make
from scipy import ndimage

from segpipe.export.geojson import GZIP, LEVEL
from segpipe.records import read_json
from segpipe.store import read_box
from segpipe.usage import watch

FORMATS = ("geojson,geoparquet", "geojson", "csv", "anndata", "tiff")


def finish(folder: Path, gigapixels: float, workers: int) -> None:
    """Stitch and measure."""
    from segpipe.compute import open_engine

    image = image_of(folder, gigapixels)
    with open_engine("local", workers, 1) as engine:
        for stage in ("stitch", "measure"):
            getattr(import_module(f"segpipe.stages.{stage}"), stage)(image, engine, Silent())


def export(folder: Path, formats: str, workers: int) -> None:
    """Make exports, as `segpipe export` does."""
    from segpipe.compute import open_engine
    from segpipe.settings import load_settings
    from segpipe.stages.exports import make_exports

    settings = load_settings(options={"export.formats": formats, "export.simplify_px": 0.0})
    with open_engine("serial" if workers == 1 else "local", workers, 1) as engine:
        make_exports(folder / "out", "small", settings.export, engine)


def floors(folder: Path, gigapixels: float) -> tuple[float, float]:
    """CPU seconds to read all labels once, and to compress the GeoJSON again."""
    image = image_of(folder, gigapixels)
    started = time.process_time()
    for region in image.label_lattice:
        read_box(image.labels, region.box)
    read = time.process_time() - started
    spent = 0.0
    packer = zlib.compressobj(LEVEL, zlib.DEFLATED, GZIP)
    with gzip.open(folder / "out" / "small.geojson.gz") as file:
        while data := file.read(2**24):
            started = time.process_time()
            packer.compress(data)
            spent += time.process_time() - started
    return read, spent


def main() -> None:
    """Make each size and export it, a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one if not given")
    parser.add_argument("--gigapixels", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--formats", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.formats == "finish":
        finish(given.folder, given.gigapixels, given.workers)
        return
    if given.formats:
        export(given.folder, given.formats, given.workers)
        return
    foreground = made_probabilities(7, 0.1)[0] > 127
    per_gigapixel = ndimage.label(foreground)[1] / foreground.size * 1e9 * 1.2  # some touch
    print(f"{'objects':>9} {'export':<20}{'s':>7}{'CPU s':>7}{'MB':>7}  peak MB of each process")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for wanted in given.objects:
            gigapixels = round(wanted / per_gigapixel, 3)
            make(folder, gigapixels)
            command = [
                *(
                    sys.executable,
                    __file__,
                    "--folder",
                    str(folder),
                    "--workers",
                    str(given.workers),
                ),
                *("--gigapixels", str(gigapixels), "--formats"),
            ]
            subprocess.run([*command, "finish"], check=True)
            facts = read_json(folder / "out" / "manifests" / "small.measure.json")["facts"]
            for formats in FORMATS:
                if formats == "geojson":
                    (folder / "out" / "small.geojson.gz").unlink()
                used = watch([*command, formats])
                told = read_json(folder / "out" / "manifests" / "small.measure.json")["facts"]
                size = sum(told["exports"][one]["bytes"] for one in formats.split(","))
                each = ", ".join(f"{peak / 1e6:.0f}" for peak in used.peaks_bytes if peak > 100e6)
                print(
                    f"{facts['objects']:>9} {formats:<20}{used.seconds:>7.0f}{used.cpu_seconds:>7.0f}"
                    f"{size / 1e6:>7.0f}  {each}",
                    flush=True,
                )
            read, packed = floors(folder, gigapixels)
            print(
                f"{facts['objects']:>9} floor: {gigapixels:g} Gpx of labels read {read:.0f} CPU s, "
                f"GeoJSON compressed {packed:.0f} CPU s",
                flush=True,
            )


if __name__ == "__main__":
    main()
