"""Images with known instances for the comparison with peers: a made field, or a montage of real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from segpipe.synthetic import NucleiField


def made_field(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint16 and truth uint32, both (size, size), of a made field of nuclei."""
    field = NucleiField((size, size), seed=5)
    return field.pixels(field.box), field.labels(field.box)


def montage(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint16 and truth uint32, both (size, size), laid out from real images.

    The single-channel images of `folder/images` with the masks of the same names in `folder/masks`,
    each stretched alike (its 1st and 99.8th percentile become 1,000 and 21,000), stand in rows; when
    they are used up they come again, mirrored. What does not fit is cut off at the border of the
    montage, so objects there are cut in image and truth.
    """
    pieces = []
    for path in sorted((folder / "images").glob("*.tif")):
        pixels = tifffile.imread(path)
        if pixels.ndim == 2:
            low, high = np.percentile(pixels, [1, 99.8])
            stretched = (pixels - low) / max(high - low, 1) * 20_000 + 1000
            masks = tifffile.imread(folder / "masks" / path.name).astype(np.uint32)
            pieces.append((np.clip(stretched, 0, 65535).astype(np.uint16), masks))
    if not pieces:
        raise SystemExit(f"no single-channel images with masks in {folder}")
    pieces.sort(key=lambda piece: -piece[0].shape[0])
    image, truth = np.full((size, size), 1000, np.uint16), np.zeros((size, size), np.uint32)
    y = x = row_height = used = 0
    while y < size:
        pixels, masks = pieces[used % len(pieces)]
        flip = (slice(None, None, 1 - 2 * (used // len(pieces) % 2)),) * 2
        pixels, masks = pixels[flip][: size - y, : size - x], masks[flip][: size - y, : size - x]
        place = slice(y, y + pixels.shape[0]), slice(x, x + pixels.shape[1])
        image[place] = pixels
        truth[place] = np.where(masks > 0, masks + truth.max(), 0)
        row_height = max(row_height, pixels.shape[0])
        x += pixels.shape[1]
        if x >= size:
            y, x, row_height = y + row_height, 0, 0
        used += 1
    return image, truth
