"""A model file of a U-Net++ made smaller: the network of one of its inner heads."""

from __future__ import annotations

from pathlib import Path

from segpipe.errors import ModelError
from segpipe.models.card import Architecture, ModelCard
from segpipe.models.modelfile import load_model, model_hash, write_model
from segpipe.models.tensors import storage_of


def prune_model(source: Path, level: int, destination: Path) -> ModelCard:
    """Write the network of the head X0L of a U-Net++ as a model file of its own; its card.

    The weights are those of the source, and are stored as there. The figures of the card are told as
    those of the unpruned model, which they are, and what it sees nothing in (`empty`) is left out: both
    want to be measured anew, by `segpipe evaluate` and `segpipe models calibrate`.

    Parameters
    ----------
    level
        L, from 1 to the depth.

    Raises
    ------
    ModelError
        When the source cannot be read or is no U-Net++, has no head there, or is pruned to that level
        already.
    """
    from segpipe.models.unetplusplus import UNetPlusPlus, prune, prune_parameters

    network, card = load_model(source)
    if not isinstance(network, UNetPlusPlus):
        raise ModelError(
            f"{source}: architecture {card.architecture.name} has one head only; a unetplusplus that "
            "was trained with deep_supervision can be pruned"
        )
    pruned = prune(network, level)
    if len(pruned.state_dict()) == len(network.state_dict()):
        raise ModelError(
            f"{source}: it is the network of level {level} already; nothing can be left out"
        )
    parameters = prune_parameters(card.architecture.parameters, level)
    cut = _cut_card(card, model_hash(source), network.depth, level).model_copy(
        update={"architecture": Architecture(name=card.architecture.name, parameters=parameters)}
    )
    write_model(destination, pruned, cut, storage_of(source))
    return cut


def _cut_card(card: ModelCard, source_hash: str, depth: int, level: int) -> ModelCard:
    """The card with what does not hold any more marked or taken away."""
    told: dict[str, float | str] = {
        "pruned": f"to level {level} of {depth} of model {card.name} ({source_hash}), which gave the "
        "mean of its heads; this file has not been scored, and its thresholds are the unpruned model's"
    }
    figures = {f"unpruned: {name}": value for name, value in card.figures.items()}
    name = f"{card.name[:60]}-L{level}"
    return card.model_copy(update={"name": name, "figures": told | figures, "empty": None})
