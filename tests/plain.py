"""Slow, obvious, whole-image versions that share no code with the package: what must come out."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

NO_LABEL = 2**40
CROSS = ndimage.generate_binary_structure(2, 1)


def instances(foreground, interior, f, thresholds, min_area, growth, steps):
    """Section 6 of the design, word by word, on whole arrays. Returns (Y, X) int64 labels."""
    mask = foreground >= f
    seeds: list[np.ndarray] = []
    covered = np.zeros(mask.shape, bool)
    for level in [*thresholds, None]:
        inside = mask if level is None else mask & (interior >= level)
        components, count = ndimage.label(inside, CROSS)
        for number in range(1, count + 1):
            component = components == number
            if component.sum() >= min_area and not (component & covered).any():
                seeds.append(component)
                covered |= component
    seeds.sort(key=lambda component: int(np.flatnonzero(component)[0]))
    labels = np.zeros(mask.shape, np.int64)
    for number, component in enumerate(seeds, start=1):
        labels[component] = number
    for place, level in enumerate(growth):
        made = 0
        while place == len(growth) - 1 or made < steps:
            made += 1
            smallest = np.where(labels == 0, NO_LABEL, labels)
            smallest = ndimage.minimum_filter(
                smallest, footprint=CROSS, mode="constant", cval=NO_LABEL
            )
            takes = (labels == 0) & mask & (interior >= level) & (smallest < NO_LABEL)
            if not takes.any():
                break
            labels[takes] = smallest[takes]
    return labels
