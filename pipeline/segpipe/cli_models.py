"""`segpipe models ...`: strings to arguments, no more. Heavy imports stay inside the commands."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import click


@click.group()
def models() -> None:
    """Models: list, show, import, export, prune, calibrate."""


@models.command("list")
def list_command() -> None:
    """Models that ship with segpipe, and those in the folder $SEGPIPE_MODELS."""
    from segpipe.model_text import list_lines

    for line in list_lines(shutil.get_terminal_size().columns):
        click.echo(line)


@models.command()
@click.argument("model")
def show(model: str) -> None:
    """The card of MODEL, how far it looks, and whether tiling can be seen in its results."""
    import yaml

    from segpipe.model_text import facts
    from segpipe.prepare import load_model

    found = load_model(model)
    card = found.card.model_dump(mode="json")
    click.echo(yaml.safe_dump(card, sort_keys=False, allow_unicode=True))
    for key, value in facts(found):
        click.echo(f"{key:<11}{value}")


@models.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--card", type=click.Path(path_type=Path),
    help="YAML with fields of the card; those that SOURCE holds may be left out.",
)  # fmt: skip
@click.option(
    "--storage", type=click.Choice(["float32", "float16"]), default="float32", show_default=True,
    help="Of kernels in the file; float16 halves it, and rounds the weights.",
)  # fmt: skip
def import_command(
    source: Path, destination: Path, card: Path | None, storage: Literal["float32", "float16"]
) -> None:
    """Make the model file DESTINATION from weights of a network that segpipe knows.

    SOURCE is .safetensors, a PyTorch state dict (.pt, .pth), or ONNX as `segpipe models export` makes
    it. A state dict is read with weights_only; nothing in it is executed. A graph is not run: its
    weights are taken.

    Tensors are named as segpipe names them, or as a U-Net of milesial/Pytorch-UNet, the NestedUNet of
    4uiiurz1/pytorch-nested-unet, or the U-Net and U-Net++ of the lecture on the family does: these are
    known by their names, and need no architecture in the card. A card for a state dict:

    \b
      name: mine
      architecture: {name: unet, parameters: {width: 16, depth: 4, padding: same, norm: batch}}
      channels: [nuclei]                        one name per input channel
      outputs: [foreground]                     or [foreground, interior], or the classes' names
      normalisation: {kind: percentile, low: 1, high: 99.8}      or {kind: fixed, low: 0, high: 255}
      licence: CC-BY-4.0
      training_data: what it was trained on
    """
    from segpipe.models.modelfile import import_model
    from segpipe.settings import read_yaml

    fields = read_yaml(card) if card else {}
    import_model(source, destination, fields, storage)
    click.echo(f"wrote {destination}")


@models.command()
@click.argument("model")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["onnx", "torchscript", "bioimageio"]),
    help="[default: by DESTINATION's suffix: .onnx, .pt, .zip]",
)
@click.option(
    "--author", "authors", multiple=True, metavar="NAME", help="For bioimageio; may be repeated."
)  # fmt: skip
def export(model: str, destination: Path, kind: str | None, authors: tuple[str, ...]) -> None:
    """Write MODEL for other programs to DESTINATION.

    \b
    onnx         the network: normalised windows to logits; windows of any number and size
    torchscript  the same, for torch.jit.load
    bioimageio   a package of the BioImage Model Zoo: both, with the card in words, pre- and
                 post-processing, tiling, and test data

    What is written was run and compared with the network.
    """
    from segpipe.exchange.writing import export_model

    told = export_model(model, destination, kind, authors)
    click.echo(f"wrote {destination}: {told}")


@models.command()
@click.argument("model")
@click.option(
    "--level",
    required=True,
    type=click.IntRange(1, 6),
    help="Of the head that is kept; 1: the smallest.",
)
@click.option(
    "-o", "--output", "destination", required=True, type=click.Path(path_type=Path),
    help="Model file to write.",
)  # fmt: skip
def prune(model: str, level: int, destination: Path) -> None:
    """Cut MODEL, a U-Net++, down to the head of one level: fewer weights, less work, less context.

    Its figures are not those of MODEL: score it by `segpipe evaluate` before you use it.
    """
    from segpipe.model_text import count_parameters
    from segpipe.models.modelfile import find_model
    from segpipe.models.pruning import prune_model

    source = find_model(model)
    prune_model(source, level, destination)
    left, all_of_them = (count_parameters(path) for path in (destination, source))
    click.echo(f"wrote {destination}: {left:,} of {all_of_them:,} parameters")


@models.command()
@click.argument("model")
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "destination", required=True, type=click.Path(path_type=Path),
    help="Model file to write: MODEL with the outcome in its card.",
)  # fmt: skip
def calibrate(model: str, images: tuple[Path, ...], destination: Path) -> None:
    """Measure what MODEL sees nothing in, so that such tiles can be skipped.

    IMAGES hold objects as MODEL was trained for; they are dimmed until MODEL loses them.
    """
    from segpipe.calibration import calibrate_model

    empty = calibrate_model(model, images, destination)
    click.echo(f"wrote {destination}; empty: {empty.model_dump()}")
