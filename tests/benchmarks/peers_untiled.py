"""The answers without any tiling: one window over the whole image. `peers.py` starts it."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import tifffile
import torch
from peers_network import Predictor, normalise, seeded_watershed

from segpipe import load_settings, segment
from segpipe.geometry import ceil_to

HALO = 96
STRIDE = 16


def main() -> None:
    """Labels of IMAGE by watershed and by segpipe's decode into FOLDER (npy)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--range", type=float, nargs=2, required=True)
    parser.add_argument("--model", required=True)
    given = parser.parse_args()
    pixels = tifffile.imread(given.image)
    core = max(ceil_to(size, STRIDE) for size in pixels.shape)
    low, high = given.range
    settings = load_settings(
        None, [f"tile.core={core}", f"tile.chunk={core}", f"infer.normalise=[{low}, {high}]"]
    )
    np.save(given.folder / "segpipe.npy", segment(pixels, given.model, settings))
    predictor = Predictor(given.model, "channels_last", 2)
    padding = [(HALO, HALO + core - size) for size in pixels.shape]
    mirrored = np.pad(normalise(pixels, low, high), padding, mode="reflect")
    probabilities = predictor(torch.from_numpy(mirrored)[None, None])[0].numpy()
    height, width = pixels.shape
    kept = probabilities[:, HALO : HALO + height, HALO : HALO + width]
    np.save(given.folder / "watershed.npy", seeded_watershed(kept, predictor.card))


if __name__ == "__main__":
    main()
