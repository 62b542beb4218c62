"""The model card: what a model file says of itself, as JSON in its header. No torch here."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from segpipe.errors import ModelError

FORMAT: Literal[1] = 1
"""Version of the card that this segpipe reads and writes."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Text = Annotated[str, Field(max_length=4000)]
Probability = Annotated[float, Field(ge=0, le=1)]
Length = Annotated[float, Field(gt=0, le=1e6)]


class Part(BaseModel):
    """Base: frozen, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=False)


class Architecture(Part):
    """Which network, and its parameters; channels and outputs are those of the card."""

    name: Name
    parameters: dict[Name, bool | int | float | Name] = {}


class Percentile(Part):
    """Each channel is scaled by two of its own percentiles, over the whole image."""

    kind: Literal["percentile"] = "percentile"
    low: Annotated[float, Field(ge=0, le=100)] = 1.0
    high: Annotated[float, Field(ge=0, le=100)] = 99.8


class Fixed(Part):
    """Each channel is scaled by the same two values in every image."""

    kind: Literal["fixed"] = "fixed"
    low: float = 0.0
    high: float = 255.0


class Decode(Part):
    """Defaults for turning probabilities into instances; thresholds as probabilities."""

    foreground: Probability = 0.5
    interior: tuple[Probability, ...] = (0.5,)
    min_area: Annotated[int, Field(ge=1)] = 10
    """Pixels."""
    growth_levels: tuple[Probability, ...] = (0.4, 0.3, 0.2, 0.1, 0.0)
    growth_steps: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Pixels that a label may grow at each level but the last."""

    @model_validator(mode="after")
    def _descend(self) -> Decode:
        for name in ("interior", "growth_levels"):
            levels = getattr(self, name)
            if list(levels) != sorted(set(levels), reverse=True):
                raise ValueError(f"{name} must descend, got {list(levels)}")
        if self.growth_levels[-1:] != (0.0,):
            raise ValueError(f"growth_levels must end in 0, got {list(self.growth_levels)}")
        return self


class Empty(Part):
    """What the model sees nothing in: windows whose level and contrast (`segpipe.occupancy`) do not
    exceed these. Measured by `segpipe models calibrate`."""

    level: Length
    contrast: Length
    foreground: Annotated[float, Field(gt=0, le=1)]
    """Probability that no pixel of such a window reaches."""


class ModelCard(Part):
    """What a model is, what it expects, and how far it can be trusted."""

    format: Literal[1] = FORMAT
    name: Name
    architecture: Architecture
    channels: tuple[Name, ...]
    """What each channel of the input shows; their number is the network's."""
    outputs: tuple[Name, ...]
    """("foreground", "interior"), ("foreground",), or the names of two classes or more."""
    normalisation: Annotated[Percentile | Fixed, Field(discriminator="kind")]
    pixel_size_um: Length | None = None
    """Of the training images; None where they had no common one."""
    object_diameter_px: Length | None = None
    """Typical equivalent diameter of the objects in the training images."""
    decode: Decode = Decode()
    empty: Empty | None = None
    """None: it was not measured, and no tile is skipped."""
    licence: Text
    training_data: Text
    figures: dict[Text, float | Text] = {}
    """What it scores, and on what."""
    limits: Text = ""
    """What it is known to get wrong."""

    @property
    def classes(self) -> bool:
        """Whether the outputs are classes that exclude one another, not independent maps."""
        return self.outputs not in (("foreground", "interior"), ("foreground",))

    @property
    def network_arguments(self) -> tuple[str, Mapping[str, Any], int, int]:
        """Arguments for `segpipe.models.network.build_network`."""
        architecture = self.architecture
        return architecture.name, architecture.parameters, len(self.channels), len(self.outputs)

    @field_validator("channels", "outputs")
    @classmethod
    def _unique(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected one name or more, each once, got {list(names)}")
        return names

    @model_validator(mode="after")
    def _agree(self) -> ModelCard:
        if self.classes and len(self.outputs) < 2:
            raise ValueError(
                "outputs must be [foreground, interior], [foreground], or two classes or more, "
                f"got {list(self.outputs)}"
            )
        if self.normalisation.low >= self.normalisation.high:
            raise ValueError("normalisation.low must be below normalisation.high")
        return self


def parse_card(fields: Mapping[str, Any], source: str) -> ModelCard:
    """The card with these fields; `source` names them in messages.

    Raises
    ------
    ModelError
        When a key is unknown or missing, or a value does not fit: one line naming the key, and
        the nearest known one.
    """
    version = fields.get("format", FORMAT)
    if isinstance(version, int) and version > FORMAT:
        raise ModelError(
            f"{source}: card format {version} is newer than this segpipe reads ({FORMAT}); "
            "update segpipe"
        )
    try:
        return ModelCard.model_validate(dict(fields))
    except ValidationError as error:
        raise ModelError(f"{source}: {first_problem(error, ModelCard)}") from None


def parse_card_json(text: str, source: str) -> ModelCard:
    """The card in `text`, JSON from a file that nobody has checked.

    Raises
    ------
    ModelError
        As `parse_card`, and when the text is not a JSON object.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{source}: the card is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{source}: the card is not a JSON object")
    return parse_card(fields, source)


def nearest(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to a message, or nothing.

    Examples
    --------
    >>> nearest("widht", ["width", "depth"])
    " (did you mean 'width'?)"
    """
    match = difflib.get_close_matches(word[:100], sorted(set(known)), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """One line about the first of the errors, and how many more there are.

    Parameters
    ----------
    model
        What was to be parsed: of its keys and those of its parts the nearest is suggested.
    """
    problems = error.errors(include_url=False, include_context=False)
    first, more = problems[0], len(problems) - 1
    key = ".".join(str(part)[:100] for part in first["loc"]) or "card"
    if first["type"] == "extra_forbidden":
        line = f"unknown key {key}" + nearest(str(first["loc"][-1]), known_keys(model))
    elif first["type"] == "missing":
        line = f"key {key} is missing"
    else:
        got = repr(first["input"])
        shown = "" if first["loc"] == () else f", got {got if len(got) < 80 else got[:77] + '...'}"
        line = f"{key}: {first['msg'].removeprefix('Value error, ')}{shown}"
    return line + (f" (and {more} more problems)" if more else "")


def known_keys(model: type[BaseModel]) -> Iterator[str]:
    """Names of all keys of a model and of the models in it."""
    for name, field in model.model_fields.items():
        yield name
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from known_keys(part)
