"""One run of patchworks with network and watershed as its function: `peers.py` starts it.

Runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

import dask.array as da
import numpy as np
import tifffile
import torch
import zarr
from patchworks import tile_process
from peers_network import Predictor, normalise, seeded_watershed


class Segmentation:
    """The function of a tile: pixels (Y, X) to labels (Y, X) int32; one network for all threads."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.range = given.range
        self.predictor = Predictor(given.model, given.layout, 1)
        self.seen = threading.local()

    def __call__(self, tile: np.ndarray) -> np.ndarray:
        if not hasattr(self.seen, "set"):
            torch.set_num_threads(1)  # torch keeps the number per thread that calls
            self.seen.set = True
        pixels = torch.from_numpy(normalise(tile, *self.range))
        probabilities = self.predictor(pixels[None, None])[0].numpy()
        return seeded_watershed(probabilities, self.predictor.card)


def main() -> None:
    """Labels of IMAGE into LABELS (a Zarr folder)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--range", type=float, nargs=2, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layout", default="channels_last")
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--overlap", type=int, default=96)
    parser.add_argument("--stitch", default="touch")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tifffile.imread(given.image, aszarr=True) as store:
        image = da.from_zarr(zarr.open_array(store, mode="r"))
        tile_process(
            image,
            Segmentation(given),
            tile_shape=(given.tile, given.tile),
            overlap=given.overlap,
            max_workers=given.workers,
            write_to=given.labels,
            stitch=given.stitch,
            progress=False,
        )


if __name__ == "__main__":
    main()
