"""The YAML of a training, parsed once: frozen, no unknown key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from segpipe.errors import SettingsError
from segpipe.models.card import (
    Architecture,
    Fixed,
    ModelCard,
    Name,
    Percentile,
    first_problem,
)
from segpipe.models.modelfile import find_model, read_card
from segpipe.settings import read_yaml

INSTANCES = ("foreground", "interior")
"""Outputs of a network that finds objects; the first may be alone."""
HEAVIEST = 1000.0
"""Largest weight of a class."""

Share = Annotated[float, Field(ge=0, le=1)]
Span = tuple[float, float]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSettings(_Section):
    """Which images, and which of them are kept for validation."""

    images: Path = Field(description="folder of images")
    masks: Path = Field(description="folder of label masks, named as the images")
    index: Path | None = Field(
        None, description="CSV with a row per image, whose column `id` is the image's stem"
    )
    where: dict[str, tuple[str, ...]] = Field(
        {}, description="columns of the index, and the values that an image must have in them"
    )
    group: str | None = Field(
        None,
        description="column of the index: images with the same value, such as the tiles of one "
        "field of view, stay on one side of the split; an empty value is no group",
    )
    stratum: str | None = Field(
        None, description="column of the index: each of its values gives its share to validation"
    )
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.15, description="share of the images that is kept for validation"
    )
    channel: tuple[str, ...] | None = Field(
        None, description="channels of the images, by name or number from 0; null: all of them"
    )


class AugmentSettings(_Section):
    """How crops are varied. Lengths in pixels; [low, high] are drawn from evenly."""

    flip: bool = Field(True, description="mirror at random")
    rotate: bool = Field(True, description="turn by any angle")
    scale: Span = Field(
        (0.7, 1.4), description="enlarge by a factor from 0.1 to 10, evenly in its logarithm"
    )
    elastic_px: float = Field(
        10.0,
        ge=0,
        le=100,
        description="standard deviation of the displacements on a coarse 3 x 3 grid; 0: none",
    )
    gain: Span = Field((0.6, 1.6), description="factor of the normalised intensities")
    offset: Span = Field((-0.1, 0.1), description="added to them")
    gamma: Span = Field((1.0, 1.0), description="exponent of them, where above 0")
    noise: float = Field(0.02, ge=0, le=10, description="largest standard deviation of noise added")
    blur_px: float = Field(
        1.0, ge=0, le=50, description="largest sigma of a blur, for half of the crops"
    )
    stain: float = Field(
        0.0,
        ge=0,
        le=1,
        description="H&E, of red, green and blue only: each stain is changed by up to this share, and "
        "shifted by a tenth of it",
    )

    @model_validator(mode="after")
    def _ordered(self) -> AugmentSettings:
        for name in ("scale", "gain", "gamma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"augment.{name} must be two rising positive numbers")
        if not 0.1 <= self.scale[0] <= self.scale[1] <= 10:
            raise ValueError("augment.scale must lie within 0.1 and 10")
        if self.offset[0] > self.offset[1]:
            raise ValueError("augment.offset must rise")
        return self


class NetworkSettings(_Section):
    """What is trained."""

    architecture: Architecture
    channels: tuple[Name, ...] = Field(("nuclei",), description="what each input channel shows")
    outputs: tuple[Name, ...] = Field(
        INSTANCES,
        description="[foreground, interior] or [foreground], for masks with a number per object; or two "
        "classes or more, for masks whose numbers are the places of their classes here, from 0",
    )
    normalisation: Annotated[Percentile | Fixed, Field(discriminator="kind")] = Percentile()

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes; None where objects are looked for."""
        return None if self.outputs in (INSTANCES, INSTANCES[:1]) else self.outputs

    @model_validator(mode="after")
    def _fit(self) -> NetworkSettings:
        named = set(self.outputs)
        if self.classes and (len(named) < max(2, len(self.outputs)) or named & set(INSTANCES)):
            raise ValueError(
                "network.outputs must be [foreground], [foreground, interior], or the names of two "
                "classes or more, each once"
            )
        return self


class LossSettings(_Section):
    """What is minimised."""

    name: str | None = Field(
        None,
        description="a loss of `segpipe.training.named_losses.LOSSES`; null: instance, or of classes "
        "cross_entropy",
    )
    parameters: dict[Name, bool | float] = Field(
        {}, description="of that loss, such as focal's {gamma: 2, alpha: 0.25}"
    )
    weight_map: bool | None = Field(
        None,
        description="whether background between close objects counts more, as in the U-Net paper; "
        "null: yes, where there are objects and the loss takes weights",
    )
    w0: float = Field(10.0, ge=0, le=1000, description="height of the weight map")
    sigma_px: float = Field(5.0, gt=0, le=50, description="its width")
    class_weights: str | dict[str, float] | None = Field(
        None,
        description="how much a pixel of each class counts, by its name (background and objects, where "
        "the outputs are no classes); balanced: each class as much as any other",
    )

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weigh(cls, value: object) -> object:
        if value is None or value == "balanced":
            return value
        if not isinstance(value, dict) or not all(
            type(one) in (int, float) and 0 <= one <= HEAVIEST for one in value.values()
        ):
            raise ValueError(f"expected balanced, or numbers from 0 to {HEAVIEST:.0f} by class")
        return value


class CourseSettings(_Section):
    """How long and how fast."""

    steps: int = Field(10_000, ge=1, description="updates of the weights")
    batch: int = Field(8, ge=1, description="crops in each")
    crop: int = Field(
        192,
        ge=16,
        description="pixels a side of what the network gives for a crop; more, where it must be",
    )
    learning_rate: float = Field(2e-3, gt=0, le=1, description="the highest; AdamW")
    weight_decay: float = Field(1e-4, ge=0, le=1)
    warmup: Share = Field(
        0.05, description="share of the steps in which the rate rises; then it falls as a cosine"
    )
    averaging: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="decay of the moving average of weights, which is what is validated"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    validate_every: int = Field(1_000, ge=1, description="steps between validations")


class CardSettings(_Section):
    """What the model's card will say beside what the training finds out."""

    licence: str = Field("not stated", max_length=4000)
    training_data: str = Field("not stated", max_length=4000)
    limits: str = Field("", max_length=4000)
    pixel_size_um: float | None = Field(None, gt=0)


class TrainSettings(_Section):
    """A training; frozen."""

    name: Name = Field(description="of the model")
    output: Path = Field(description="folder of checkpoints, model file and report")
    data: DataSettings
    start: str | None = Field(
        None,
        description="a model, by name or file, whose weights the training begins with instead of drawn "
        "ones; `network` may then be left out, or must be what that model is",
    )
    network: NetworkSettings
    augment: AugmentSettings = AugmentSettings()
    loss: LossSettings = LossSettings()
    course: CourseSettings = CourseSettings()
    card: CardSettings = CardSettings()
    seed: int = Field(0, ge=0, description="of everything that is drawn")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the network; auto: float16 on CUDA, float32 elsewhere"
    )
    threads: int | None = Field(None, ge=1, description="on CPU; null: as many as cores")

    @property
    def loss_name(self) -> str:
        """That of `loss`, or the default."""
        return self.loss.name or ("cross_entropy" if self.network.classes else "instance")

    @property
    def weighed(self) -> tuple[str, ...]:
        """What `loss.class_weights` may name, in the order of the numbers in masks."""
        return self.network.classes or ("background", "objects")

    @model_validator(mode="after")
    def _agree(self) -> TrainSettings:
        classes, weights = self.network.classes, self.loss.class_weights
        if classes and self.loss.weight_map:
            raise ValueError("loss.weight_map is between objects; network.outputs are classes")
        if isinstance(weights, dict) and set(weights) != set(self.weighed):
            raise ValueError(f"loss.class_weights must name {', '.join(self.weighed)}")
        if self.augment.stain > 0 and len(self.network.channels) != 3:
            raise ValueError(
                "augment.stain is of red, green and blue images; network.channels has "
                f"{len(self.network.channels)}"
            )
        return self


def network_of(card: ModelCard) -> NetworkSettings:
    """What a model is, as a training would be told."""
    return NetworkSettings(
        architecture=card.architecture,
        channels=card.channels,
        outputs=card.outputs,
        normalisation=card.normalisation,
    )


def load_train_settings(path: Path) -> TrainSettings:
    """The settings in a YAML file; paths in it are as seen from the working directory.

    Raises
    ------
    SettingsError
        When it is missing or not YAML, a key is unknown or missing, or a value does not fit.
    """
    loaded = read_yaml(path)
    if not isinstance(loaded, dict):
        raise SettingsError(f"{path} must hold keys, such as 'name:' and 'data:'")
    return parse_train_settings(loaded, str(path))


def parse_train_settings(tree: dict[str, Any], source: str) -> TrainSettings:
    """Settings from nested mappings; `source` names them in messages.

    Raises
    ------
    SettingsError
        As `load_train_settings`.
    ModelError
        When there is no such model to start from, or its file is damaged.
    """
    start = tree.get("start")
    if isinstance(start, str) and "network" not in tree:
        tree = tree | {"network": network_of(read_card(find_model(start))).model_dump()}
    try:
        return TrainSettings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(f"{source}: {first_problem(error, TrainSettings)}") from None
