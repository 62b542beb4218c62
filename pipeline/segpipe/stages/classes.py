"""stitch of a model whose outputs are classes: each pixel by itself, so no seam and nothing to join."""

from __future__ import annotations

from typing import Any

import numpy as np

from segpipe.geometry import Box, Lattice
from segpipe.records import Record
from segpipe.semantic import likeliest
from segpipe.stages.image import Image
from segpipe.stages.seeds import probabilities_in
from segpipe.stages.stage_run import Pass, StageRun
from segpipe.store import read_box, write_shard

Array = np.ndarray[Any, np.dtype[Any]]


def label_classes(run: StageRun, lattice: Lattice) -> dict[str, Any]:
    """Write the class of each pixel; for the manifest, how many occur besides class 0.

    A class counts as one object, whose id is its place among the model's outputs.
    """
    found = run.over("classes", label_one, lattice, array=run.image.labels, counts=True)
    present = {number for record in found.values() for number in record.facts["classes"]}
    end = len(run.image.model.card.outputs)
    first_ids = [1] + [end] * lattice.count[0]
    return {"objects": len(present - {0}), "first_ids": first_ids, "growth_rounds": 0}


def label_one(work: Pass, name: str) -> Record:
    """The classes of one region."""
    image, box = work.image, work.lattice.named(name).box
    labels, _ = likeliest(read_box(image.probabilities, box))
    shard = write_shard(image.labels, box, labels)
    return work.records.add(name, shard, classes=np.unique(labels).tolist())


def certainty_in(image: Image, box: Box) -> Array:
    """(h, w) uint8, of which a label's mean probability is: the foreground, or the class that won."""
    if image.model.card.classes:
        return likeliest(read_box(image.probabilities, box))[1]
    foreground, _ = probabilities_in(image, box)
    return foreground
