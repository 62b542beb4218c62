"""What a model's network holds while it works, without torch where that was found out before."""

from __future__ import annotations

import json
from pathlib import Path

from segpipe.models.modelfile import model_hash, read_card
from segpipe.user_cache import code_digest, keep, read_kept


def network_memory(
    path: Path, window: tuple[int, int], halo: int, batch: int, *, folded: bool
) -> tuple[int, int]:
    """Bytes of the activations, as `segpipe.models.cost.activation_bytes`, and of the weights.

    Raises
    ------
    ModelError
        When the file is no model.
    """
    kind = "folded" if folded else "plain"
    size = "x".join(map(str, window))
    name = f"memory-{model_hash(path)}-{size}-{halo}-{batch}-{kind}-{code_digest('torch')}"
    kept = read_kept(name)
    if kept is not None:
        live, weights = json.loads(bytes(kept))
        return int(live), int(weights)
    from segpipe.models.cost import activation_bytes, weight_bytes  # torch: seconds

    card = read_card(path)
    found = activation_bytes(card, window, halo, batch, folded=folded), weight_bytes(card)
    keep(name, json.dumps(found).encode())
    return found
