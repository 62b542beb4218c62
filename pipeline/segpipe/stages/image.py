"""One input on its way through the four stages, and what decides its result.

A stage is `stage(image, engine, progress) -> Manifest`: rerunnable alone, resumable, idempotent. It is
made of passes over regions; each pass has completion records (records.py) and one kind of task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from segpipe.components import Decode, to_byte
from segpipe.errors import SettingsError
from segpipe.geometry import Lattice, TileGrid
from segpipe.models.modelfile import ModelCard, is_model_name
from segpipe.records import fingerprint
from segpipe.resampling import Resolution
from segpipe.settings import AUTO, Settings, StitchSettings, overrides
from segpipe.slide import Plane
from segpipe.stages.mask import Mask, mask_fingerprint
from segpipe.stages.places import array_path, manifest_path, thumbnail_path, work_folder
from segpipe.store import LABEL_GROUP, Grid

STAGES = ("tile", "infer", "stitch", "measure")
VERSION = {"tile": 4, "infer": 6, "stitch": 2, "measure": 6}
"""Raised when a stage's result changes with the same settings: finished results are then redone."""
LARGEST_COARSE = 4096
"""Pixels of the longer side of the finest level of an image that is not copied."""


class Progress(Protocol):
    """Told what is done."""

    def start(self, image: str, stage: str) -> None: ...

    def advance(self, image: str, stage: str, pixels: int) -> None: ...


@dataclass(frozen=True)
class NumericPlan:
    """Everything besides image and model that the probability bytes depend on. Never from a timing."""

    core: int
    halo: int
    stride: int
    batch: int
    precision: str
    memory_format: str
    threads: int
    backend: str
    skip_empty: bool = False
    """Whether tiles in which the model's card says that it sees nothing become zeros unseen."""
    skip_glass: bool = False
    """Whether tiles of bare, bright ground become zeros unseen."""
    tta: bool = False
    """Whether probabilities are the mean over eight views of each window."""

    @property
    def calls(self) -> int:
        """How often the network sees each window."""
        return 8 if self.tta else 1


@dataclass(frozen=True)
class Model:
    """A model file as the stages need it."""

    path: Path
    hash: str
    card: ModelCard
    context: int
    halo: int
    stride: int
    exact: bool


@dataclass(frozen=True)
class Layout:
    """What opening the file told, and the sizes that follow from it.

    shape
        (C, Y, X) at the working resolution: what all stages work on.
    full_shape
        (Y, X) of the full resolution.
    pixel_size_um
        Of the full resolution.
    """

    shape: tuple[int, int, int]
    full_shape: tuple[int, int]
    resolution: Resolution
    dtype: str
    channels: tuple[int, ...]
    """Those that the model sees."""
    channel_names: tuple[str, ...]
    rgb: bool
    pixel_size_um: float | None
    source_fingerprint: str
    copied: bool = True
    """Whether OUT holds the image at the working resolution; else only coarse levels of it."""
    warnings: tuple[str, ...] = ()
    """What was wrong with the file and did no harm."""

    @property
    def plane(self) -> tuple[int, int]:
        """Height and width at the working resolution."""
        return self.shape[1], self.shape[2]


@dataclass(frozen=True)
class Image:
    """One input and everything that decides its result. Small: it travels with every task."""

    name: str
    source: Path
    plane: Plane
    out: Path
    settings: Settings
    model: Model
    plan: NumericPlan
    region: int
    layout: Layout
    digests: Mapping[str, str] = field(default_factory=dict)
    """`settings_digest` of each stage, for its manifest."""
    chosen: str | None = None
    """Why the model was chosen, where that was left to segpipe."""
    mask: Mask | None = None
    """Where objects are looked for; None: everywhere."""

    @property
    def scale(self) -> float:
        """Full-resolution pixels a working pixel: full = (working + 1/2) scale - 1/2."""
        return self.layout.resolution.scale

    @cached_property
    def zarr(self) -> Path:
        """The OME-Zarr: the image, later its labels."""
        return self.out / f"{self.name}.ome.zarr"

    @cached_property
    def work(self) -> Path:
        """Work arrays and records; removed by `clean`."""
        return work_folder(self.out, self.name)

    @cached_property
    def probabilities(self) -> Path:
        """(K, Y, X) uint8."""
        return self.work / "probabilities.zarr"

    @cached_property
    def labels(self) -> Path:
        """(Y, X) uint32, the finest level."""
        return self.zarr / LABEL_GROUP / "0"

    @property
    def table(self) -> Path:
        """The InstanceTable."""
        return self.out / f"{self.name}.parquet"

    @property
    def preview(self) -> Path:
        """The picture."""
        return self.out / f"{self.name}.png"

    @property
    def thumbnail(self) -> Path:
        """A small copy of the picture, for the report."""
        return thumbnail_path(self.out, self.name)

    def array(self, stage: str) -> Path | None:
        """The array that a stage writes and others read."""
        return array_path(self.out, self.name, stage, self.finest)

    @cached_property
    def finest(self) -> int:
        """The finest level of the pyramid that OUT holds of the image; 0 where it is copied."""
        sizes = [max(shape) for shape in self.grid.levels]
        last = len(sizes) - 1
        small = [level for level in range(1, last) if sizes[level] <= LARGEST_COARSE]
        return 0 if self.layout.copied else min(small, default=last)

    @cached_property
    def tiles(self) -> TileGrid:
        """The tiles of inference."""
        return TileGrid(self.layout.plane, self.plan.core, self.plan.halo, self.plan.stride)

    @cached_property
    def grid(self) -> Grid:
        """Storage of image and probabilities."""
        return Grid.fitting(self.layout.plane, self.region, self.settings.tile.chunk)

    @cached_property
    def label_grid(self) -> Grid:
        """Storage of labels and of the seeds before them."""
        region = self.settings.stitch.region or self.region
        return Grid.fitting(self.layout.plane, region, self.settings.tile.chunk)

    @cached_property
    def decode(self) -> Decode:
        """Thresholds as bytes: from the settings, else from the model's card."""
        return decode_of(self.settings, self.model.card)

    @cached_property
    def label_lattice(self) -> Lattice:
        """The regions of stitch and measure."""
        return Lattice(self.layout.plane, self.label_grid.shard)

    def manifest_path(self, stage: str) -> Path:
        """Where the stage's manifest is written, last of all."""
        return manifest_path(self.out, self.name, stage)

    def fingerprint(self, stage: str) -> str:
        """Hash of what decides this stage's result besides the result of the stage before."""
        return self._fingerprints[stage]

    @cached_property
    def _fingerprints(self) -> Mapping[str, str]:
        tile, infer, measure = self.settings.tile, self.settings.infer, self.settings.measure
        stitch = self.settings.stitch
        own: dict[str, list[Any]] = {
            "tile": [
                self.layout.source_fingerprint,
                [tile.chunk, tile.core, self.region],
                list(self.layout.channels),
                self.layout.pixel_size_um,
                vars(self.layout.resolution),
                self.layout.copied,
                self.model.card.normalisation.model_dump(),
                infer.normalise,
                [self.plan.stride, self.plan.halo],
                *self.plane.stated().items(),
            ],
            "infer": [self.model.hash, vars(self.plan), self.mask and self.mask.fingerprint],
            "stitch": [
                vars(self.decode),
                [stitch.max_hole, stitch.max_area, stitch.min_probability],
                self.label_grid.shard,
                self.model.card.outputs,
            ],
            "measure": [measure.model_dump()],
        }
        return {stage: fingerprint(stage, VERSION[stage], own[stage]) for stage in STAGES}


def settings_of(stage: str, settings: Settings, models: Sequence[str]) -> dict[str, Any]:
    """The settings of which a stage's result may depend on more than on those of the stages before.

    Known before any image is opened, and wider than `Image.fingerprint`: whole sections.

    Parameters
    ----------
    models
        Hashes of the model, or of those among which `auto` chooses.
    """
    of_image = {"normalise": settings.infer.normalise, "models": list(models)}
    chosen: Mapping[str, Any] = {
        "tile": settings.tile.model_dump(mode="json")
        | of_image
        | {"mask": mask_fingerprint(settings.tile.mask)},
        "infer": settings.infer.model_dump(mode="json", exclude={"model", "device"}),
        "stitch": settings.stitch.model_dump(mode="json"),
        "measure": settings.measure.model_dump(mode="json")
        | {"export": settings.export.model_dump(mode="json")},
    }
    return {"version": VERSION[stage], **chosen[stage]}


def settings_digest(stage: str, settings: Settings, models: Sequence[str]) -> str:
    """Hash of `settings_of` this stage and those before.

    Where it is the same, and the input is, so is the stage's fingerprint.
    """
    passed = STAGES[: STAGES.index(stage) + 1]
    return fingerprint({one: settings_of(one, settings, models) for one in passed})


def decode_of(settings: Settings, card: ModelCard) -> Decode:
    """Thresholds as bytes: from the settings, else from the model's card.

    Raises
    ------
    SettingsError
        When tiles are skipped that may hold something at this threshold of the foreground, or the
        model's outputs are classes and a setting is of objects.
    """
    if card.classes:
        _refuse_instance_settings(settings, card)

    def chosen(key: str) -> Any:
        value = getattr(settings.stitch, key)
        return getattr(card.decode, key) if value is None else value

    empty = card.empty
    if settings.infer.skip_empty and empty and chosen("foreground") < empty.foreground:
        raise SettingsError(
            f"stitch.foreground {chosen('foreground')} is below {empty.foreground}, for which it was "
            f"measured what model {card.name} sees nothing in; set infer.skip_empty=false"
        )
    return Decode(
        max(1, to_byte(chosen("foreground"))),
        tuple(to_byte(level) for level in chosen("interior")),
        chosen("min_area"),
        tuple(to_byte(level) for level in chosen("growth_levels")),
        chosen("growth_steps"),
    )


def _refuse_instance_settings(settings: Settings, card: ModelCard) -> None:
    """Refuse what a user asks of objects where a model gives classes.

    Raises
    ------
    SettingsError
        When a key of `stitch` is set that only objects have.
    """
    defaults = StitchSettings()
    asked = [
        key for key, value in settings.stitch if key != "region" and value != getattr(defaults, key)
    ]
    if asked:
        raise SettingsError(
            f"stitch.{asked[0]} is of objects; model {card.name} gives each pixel a class, one of "
            f"{', '.join(card.outputs)}; leave it out"
        )


def intensity_range(low: float, high: float, top: float) -> tuple[float, float]:
    """What becomes 0 and 1: where both percentiles coincide (almost all of the image is
    background) the maximum is the high one, so that a few objects are not lost."""
    return low, high if high > low else top


def image_facts(image: Image) -> dict[str, Any]:
    """What run.json and the report tell of an image that could be opened."""
    return {
        "shape": [image.layout.shape[0], *image.layout.full_shape],
        "working_shape": list(image.layout.shape),
        "scale": image.scale,
        "copied": image.layout.copied,
        "dtype": image.layout.dtype,
        "channels": [image.layout.channel_names[number] for number in image.layout.channels],
        "pixel_size_um": image.layout.pixel_size_um,
        "model": image.model.card.name,
        "model_hash": image.model.hash,
        "model_chosen": image.chosen,
        "exact": image.model.exact,
        "classes": list(image.model.card.outputs) if image.model.card.classes else [],
        "plan": vars(image.plan) | {"context": image.model.context},
        "region": image.region,
        "overrides": overrides(image.settings) | _whole_paths(image),
    }


def _whole_paths(image: Image) -> dict[str, str]:
    """Settings that are paths, so that they hold in any folder; the mask is that of this image."""
    paths = {} if image.mask is None else {"tile.mask": str(image.mask.path)}
    model = image.settings.infer.model
    if model != AUTO and not is_model_name(model):
        paths["infer.model"] = str(Path(model).absolute())
    return paths
