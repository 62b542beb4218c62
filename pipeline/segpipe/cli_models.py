"""`segpipe models ...`: strings to arguments, no more. Heavy imports stay inside the commands."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def models() -> None:
    """Models: list, show, import, calibrate."""


@models.command("list")
def list_command() -> None:
    """Models that ship with segpipe, and those in the folder $SEGPIPE_MODELS."""
    from segpipe.models.modelfile import list_models, read_card

    for path in list_models():
        card = read_card(path)
        click.echo(
            f"{card.name:<24}{len(card.channels)} channel{'s' * (len(card.channels) > 1)} -> "
            f"{', '.join(card.outputs)}; {card.architecture.name}; {card.licence}"
        )


@models.command()
@click.argument("model")
def show(model: str) -> None:
    """The card of MODEL, and how far it looks."""
    import yaml

    from segpipe.prepare import load_model

    found = load_model(model)
    card = found.card.model_dump(mode="json")
    click.echo(yaml.safe_dump(card, sort_keys=False, allow_unicode=True))
    for key, value in {
        "file": found.path,
        "hash": found.hash,
        "exact": "yes" if found.exact else "no: tiles may show",
        "context": f"{found.context} px",
        "halo": f"{found.halo} px",
        "stride": f"{found.stride} px",
    }.items():
        click.echo(f"{key:<9}{value}")


@models.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--card", type=click.Path(path_type=Path), help="YAML with fields of the card.")
def import_command(source: Path, destination: Path, card: Path | None) -> None:
    """Make the model file DESTINATION from weights: .safetensors, or a PyTorch state dict.

    A state dict is read with weights_only; nothing in it is executed.
    """
    from segpipe.models.modelfile import import_model
    from segpipe.settings import read_yaml

    fields = read_yaml(card) if card else {}
    import_model(source, destination, fields)
    click.echo(f"wrote {destination}")


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
