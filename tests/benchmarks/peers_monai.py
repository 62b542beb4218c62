"""One run of MONAI's sliding window and scikit-image's watershed: `peers.py` starts it.

The image is read whole, normalised, mirrored by the halo, inferred window by window, decoded in one
piece, and the labels are saved. Runs in an environment of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import tifffile
import torch
from monai.inferers import sliding_window_inference
from peers_network import Predictor, normalise, seeded_watershed


def main() -> None:
    """Labels of IMAGE into LABELS (npy)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--range", type=float, nargs=2, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layout", default="channels_last")
    parser.add_argument("--window", type=int, default=1216)
    parser.add_argument("--pitch", type=int, default=1024)
    parser.add_argument("--halo", type=int, default=96, help="pixels mirrored at the border")
    parser.add_argument("--blend", default="constant")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    predictor = Predictor(given.model, given.layout, given.threads)
    pixels = normalise(tifffile.imread(given.image), *given.range)
    mirrored = np.pad(pixels, given.halo, mode="reflect")
    probabilities = sliding_window_inference(
        torch.from_numpy(mirrored)[None, None],
        (given.window, given.window),
        1,
        predictor,
        # the pitch is the integer part of window * (1 - overlap)
        overlap=1 - (given.pitch + 0.5) / given.window,
        mode=given.blend,
    )
    halo, (height, width) = given.halo, pixels.shape
    kept = probabilities[0, :, halo : halo + height, halo : halo + width].numpy()
    np.save(given.labels, seeded_watershed(kept, predictor.card).astype(np.uint32))


if __name__ == "__main__":
    main()
