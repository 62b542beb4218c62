"""What leaving out bare glass costs and spares: objects lost, and tiles skipped, for several cores.

    python tests/benchmarks/tissue.py IMAGE_OR_FOLDER ... [-m nuclei-he] [--cores 64,128,...]

Each image goes through the network once, whole; the tiles that `segpipe.occupancy` takes for glass are
then set to nothing, and both are decoded. Images that are not of three colours are passed over.

    tiles, skipped    of all images together; share that is bare glass
    objects           with no tile left out
    lost, new         not found again (IoU of at least .5), with tiles left out; found only then
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import numpy as np

from segpipe import occupancy
from segpipe.errors import InputError
from segpipe.geometry import Box, TileGrid
from segpipe.inference import predict_region
from segpipe.inputs import find_files
from segpipe.memory import find_ranges, label_instances
from segpipe.models.modelfile import find_model
from segpipe.segmenter import load_segmenter
from segpipe.settings import load_settings
from segpipe.slide import open_slide
from segpipe.stages.image import decode_of


def lost(before: np.ndarray, after: np.ndarray) -> int:
    """Objects of one label image that have no counterpart in the other."""
    one = before.astype(np.int64) << 32 | after
    coded, common = np.unique(one[(before > 0) & (after > 0)], return_counts=True)
    sizes = [np.bincount(labels.ravel()) for labels in (before, after)]
    old, new = coded >> 32, coded & 0xFFFFFFFF
    same = 2 * common >= sizes[0][old] + sizes[1][new] - common
    found = set(old[same].tolist())
    return int(before.max()) - len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("-m", "--model", default="nuclei-he")
    parser.add_argument("--cores", default="64,128,256,512,1024")
    arguments = parser.parse_args()
    cores = [int(core) for core in arguments.cores.split(",")]
    segmenter = load_segmenter(find_model(arguments.model), "cpu", threads=1, backend="openvino",
                               core_only=True)  # fmt: skip
    settings = load_settings(None, [])
    decode = decode_of(settings, segmenter.card)
    sums: dict[int, Counter[str]] = {core: Counter() for core in cores}
    files = [path for path, _ in find_files(arguments.images, Path("none"))]
    seconds = 0.0
    for path in files:
        try:
            with open_slide(path) as slide:
                if not slide.rgb or slide.shape[0] != 3:
                    continue
                pixels = slide.read(Box(0, 0, *slide.shape[1:]))
        except InputError as error:
            print(f"passed over: {error}")
            continue
        shape, box = pixels.shape[1:], Box(0, 0, *pixels.shape[1:])
        grid = TileGrid(shape, 1024, segmenter.halo, segmenter.stride)
        ranges = find_ranges(pixels, segmenter.card, settings)
        started = time.perf_counter()
        planes = predict_region(pixels, box, grid, box, ranges, segmenter)
        seconds += time.perf_counter() - started
        names = segmenter.outputs
        whole = label_instances(
            planes[names.index("foreground")], planes[names.index("interior")], decode
        )
        line = f"{path.name[:40]:<42}{shape[1]} x {shape[0]}, {whole.max()} objects"
        for core in cores:
            tiles = TileGrid(shape, core, segmenter.halo, segmenter.stride)
            cell = occupancy.cell_size(core)
            extremes = occupancy.cell_extremes(pixels, cell)
            glass = occupancy.glass_tiles(occupancy.tile_density(extremes, cell, tiles))
            left = planes.copy()
            for tile in tiles:
                if glass[tile.index]:
                    left[(slice(None), *tile.keep.slices)] = 0
            found = label_instances(
                left[names.index("foreground")], left[names.index("interior")], decode
            )
            counts = {"tiles": len(tiles), "skipped": int(glass.sum()), "objects": int(whole.max())}
            sums[core] += Counter(
                counts | {"lost": lost(whole, found), "new": lost(found, whole), "images": 1}
            )
            line += f" | {core}: {glass.sum()}/{len(tiles)} -{lost(whole, found)}"
        print(line, flush=True)
    print(f"{'core':>6}{'images':>8}{'tiles':>8}{'skipped':>9}{'objects':>9}{'lost':>6}{'new':>6}")
    for core, total in sums.items():
        share = 100 * total["skipped"] / max(total["tiles"], 1)
        print(
            f"{core:>6}{total['images']:>8}{total['tiles']:>8}{share:>7.1f} %{total['objects']:>9}"
            f"{total['lost']:>6}{total['new']:>6}"
        )
    print(f"the network took {seconds:.0f} s for all of it")


if __name__ == "__main__":
    main()
