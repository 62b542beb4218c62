"""The viewer on a large field: from the request for a tile to its being drawn, in headless Chromium.

    python tests/benchmarks/viewer.py --size 40000

A made field of 16-bit nuclei with its labels, as segpipe writes it, is walked over: jumps to random
places at full resolution, halfway and over all of it. Printed are quantiles over the tiles of both
layers, over the jumps from each to the last tile that it needed, and as the floor those of the same
bytes fetched by the same browser, neither decoded nor drawn. A tile's time begins when OpenSeadragon
starts its request, so that fewer at once would flatter it; a jump's holds the waiting as well. A tile
that is drawn after the jump for which it was fetched, as finer ones had covered it, does not count.
Needs chromium and chromium-driver. One square is written once and its shards are linked, so that the
field takes seconds to make and little disk; caches of the disk flatter such a field.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from chromium import DRAWN, chromium, serving, until
from results_folder import discs, know
from segpipe import store
from segpipe.geometry import Box
from segpipe.stages.image import STAGES
from segpipe.stages.manifest import Manifest
from segpipe.stages.places import manifest_path

SHARD, CHUNK = 2048, 512
WATCH = """
window.times = [];
window.jumps = [];
window.jump = (place) => { asked.clear(); jumps.push([performance.now()]); segpipe.goTo(place); };
const asked = new Map();
for (let n = 0; n < segpipe.viewer.world.getItemCount(); n++) {
  const { source } = segpipe.viewer.world.getItemAt(n);
  const start = source.downloadTileStart;
  source.downloadTileStart = (job) => { asked.set(job.src, performance.now()); start(job); };
}
segpipe.viewer.addHandler("tile-drawn", ({ tile }) => {
  const begun = asked.get(tile.getUrl());
  if (begun === undefined) return;
  asked.delete(tile.getUrl());
  times.push([tile.getUrl().split("/")[0], performance.now() - begun]);
  jumps.at(-1)[1] = performance.now();
});
"""
FETCH = """
const [url, ranges, done] = arguments;
(async () => {
  const times = [];
  for (const [path, start, end] of ranges) {
    const begun = performance.now();
    const answer = await fetch(url + path, { headers: { Range: `bytes=${start}-${end}` } });
    await answer.arrayBuffer();
    times.push(performance.now() - begun);
  }
  done(times);
})();
"""


def make_field(out: Path, size: int) -> None:
    """One square of SHARD pixels, repeated by links."""
    grid = store.Grid.fitting((size, size), SHARD, CHUNK)
    labels = discs((SHARD, SHARD), 32)
    noise = np.random.default_rng(0).normal(0, 200, labels.shape)
    pixels = np.clip(1000 + 8000 * (labels > 0) + noise, 0, 65535).astype(np.uint16)[None]
    path = out / "field.ome.zarr"
    store.create_image(
        path, ["DAPI"], grid, pixels.dtype, pixel_size_um=0.25, name="field", rgb=False
    )
    store.create_labels(path, grid, pixel_size_um=0.25)
    store.set_contrast(path, [0], [(500.0, 12000.0)])
    for level in range(len(grid.levels)):
        _fill(path / str(level), grid.level(level), pixels)
        _fill(path / store.LABEL_GROUP / str(level), grid.level(level), labels)
        pixels, labels = store.halve_mean(pixels), store.halve_nearest(labels)
        pixels = np.tile(pixels, (1, 2, 2))  # the pattern goes on
        labels = np.tile(labels, (2, 2))
    for stage in STAGES:
        Manifest(stage, "f", "t", (), {"objects": 0}).write(manifest_path(out, "field", stage))
    know(out, "field")


def _fill(path: Path, grid: store.Grid, square: np.ndarray) -> None:
    (height, width), (rows, columns) = grid.shard, grid.shape
    box = Box(0, 0, min(height, rows), min(width, columns))
    store.write_shard(path, box, square[..., : box.y1, : box.x1])
    first = store.shard_path(path, box)
    for y in range(0, rows, height):
        for x in range(0, columns, width):
            other = store.shard_path(path, Box(y, x, y + 1, x + 1))
            other.parent.mkdir(parents=True, exist_ok=True)
            if other != first:
                os.link(first, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=40_000)
    parser.add_argument("--jumps", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "OUT"
        make_field(out, given.size)
        with serving(out) as server, chromium() as page:
            begun = time.monotonic()
            page.get(server.url)
            until(page, DRAWN, 120)
            print(f"{given.size} x {given.size}, first view {time.monotonic() - begun:.1f} s")
            page.execute_script(WATCH)
            random = np.random.default_rng(1)
            for zoom in (1.0, 0.3, 0.08):
                page.execute_script("times.length = jumps.length = 0")
                for _ in range(given.jumps):
                    y, x = random.integers(0, given.size, 2)
                    page.execute_script(f"jump({{y: {y}, x: {x}, zoom: {zoom}}})")
                    time.sleep(0.1)
                    until(page, DRAWN, 60)
                times, jumps = page.execute_script("return [times, jumps]")
                for layer in ("image", "labels"):
                    _tell(
                        f"zoom {zoom}: {layer} tiles", [ms for name, ms in times if name == layer]
                    )
                _tell(f"zoom {zoom}: jumps", [jump[1] - jump[0] for jump in jumps if jump[1:]])
            _floor(server, page, out)


def _tell(what: str, times: list[float]) -> None:
    if times:
        p50, p95 = np.percentile(times, [50, 95])
        print(f"{what} ({len(times)}): p50 {p50:.0f} ms, p95 {p95:.0f} ms")


def _floor(server: object, page: object, out: Path) -> None:
    shards = [path for path in (out / "field.ome.zarr/0/c").rglob("*") if path.is_file()]
    size = shards[0].stat().st_size // (SHARD // CHUNK) ** 2  # of a chunk, about
    chosen = np.random.default_rng(2).choice(len(shards), 100)
    ranges = [
        (shards[n].relative_to(out / "field.ome.zarr").as_posix(), 0, size - 1) for n in chosen
    ]
    url = f"{server.url}slides/field/image.ome.zarr/"  # type: ignore[attr-defined]
    times = page.execute_async_script(FETCH, url, ranges)  # type: ignore[attr-defined]
    _tell(f"floor: {size / 1e3:.0f} kB fetched alone", times)


if __name__ == "__main__":
    main()
