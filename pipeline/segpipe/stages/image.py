"""One input on its way through the four stages: where its files lie, what decides them, its passes.

A stage is `stage(image, engine, progress) -> Manifest`: rerunnable alone, resumable, idempotent. It is
made of passes over regions; each pass has completion records (records.py) and one kind of task.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

from segpipe.components import Decode, to_byte
from segpipe.errors import InputError, SettingsError
from segpipe.geometry import Lattice, TileGrid
from segpipe.models.modelfile import ModelCard, is_model_name
from segpipe.records import fingerprint, json_text
from segpipe.resampling import Resolution
from segpipe.settings import AUTO, Settings, StitchSettings, overrides
from segpipe.slide import Plane
from segpipe.stages.exported import remove_exports
from segpipe.stages.mask import Mask, mask_fingerprint
from segpipe.store import LABEL_GROUP, Grid, disk_usage

log = logging.getLogger(__name__)

STAGES = ("tile", "infer", "stitch", "measure")
VERSION = {"tile": 4, "infer": 6, "stitch": 2, "measure": 6}
"""Raised when a stage's result changes with the same settings: finished results are then redone."""


LARGEST_COARSE = 4096
"""Pixels of the longer side of the finest level of an image that is not copied."""
NEEDS: Mapping[str, tuple[str, ...]] = {
    "tile": (),
    "infer": ("tile",),
    "stitch": ("infer",),
    "measure": ("tile", "infer", "stitch"),
}
"""Stages whose arrays a stage reads."""


WORK = ".segpipe/{name}.work"
ARRAYS: Mapping[str, str] = {
    "tile": "{name}.ome.zarr/{finest}",
    "infer": f"{WORK}/probabilities.zarr",
    "stitch": f"{{name}}.ome.zarr/{LABEL_GROUP}/0",
}
"""In OUT: the array that a stage writes and others read."""


PARQUET_END = b"PAR1"
PNG_END = b"IEND\xaeB`\x82"


class Progress(Protocol):
    """Told what is done."""

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


@dataclass(frozen=True)
class Manifest:
    """What a stage did: written last, and all that the next stage needs to be told.

    token
        Differs when the stage's output does: its fingerprint, and what failed.
    """

    stage: str
    fingerprint: str
    token: str
    failed: tuple[Mapping[str, Any], ...]
    facts: Mapping[str, Any]
    before: str | None = None
    """Token of the stage before."""
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """`done` or `failed`."""
        return "failed" if self.failed else "done"

    def write(self, path: Path) -> None:
        """Write it as JSON, where there is none. When it is lost or torn, the stage is done again as
        far as its records are, and nobody takes half of one for a manifest."""
        text = json_text({"status": self.status} | vars(self)).encode("utf-8", "surrogateescape")
        try:
            path.write_bytes(text)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text)

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """The manifest at `path`, None when there is none."""
        try:
            stat = path.stat()
            return _read(path, (stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except OSError:
            return None


@lru_cache(maxsize=64)
def _read(path: Path, _state: tuple[int, int, int]) -> Manifest | None:
    """The manifest in a file; it is asked for again and again while an image is worked on."""
    content = path.read_bytes()
    try:
        told = json.loads(content.decode("utf-8", "surrogateescape"))
        return Manifest(
            told["stage"],
            told["fingerprint"],
            told["token"],
            tuple(told["failed"]),
            told["facts"],
            told["before"],
            told["seconds"],
        )
    except (ValueError, KeyError, TypeError):
        return None


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


def manifest_path(out: Path, name: str, stage: str) -> Path:
    """Where a stage's manifest of an image is written, last of all."""
    return out / f"manifests/{name}.{stage}.json"


def thumbnail_path(out: Path, name: str) -> Path:
    """Where the small copy of an image's picture is."""
    return out / "manifests" / f"{name}.jpg"


def array_path(out: Path, name: str, stage: str, finest: int = 0) -> Path | None:
    """The array that a stage writes and others read; `finest` is the first level of the image."""
    inside = ARRAYS.get(stage)
    return None if inside is None else out / inside.format(name=name, finest=finest)


def work_folder(out: Path, name: str) -> Path:
    """Work arrays and records of an image; the suffix keeps `a` apart from the images in `a/`."""
    return out / WORK.format(name=name)


def stage_fingerprint(image: Image, stage: str, before: Manifest | None) -> str:
    """Hash of all that decides what a stage writes, failures before it included."""
    return _joined(image.fingerprint(stage), None if before is None else before.token)


@lru_cache(maxsize=1024)
def _joined(own: str, before: str | None) -> str:
    return fingerprint(own, before)


def manifests_before(image: Image, stage: str) -> dict[str, Manifest]:
    """The manifests of the stages before this one, when all that this one reads is there.

    Raises
    ------
    InputError
        When an earlier stage was not run, or with other settings, or its arrays are not whole.
    """
    current = current_manifests(image)
    for earlier in NEEDS[stage]:
        if not is_whole(image, earlier, current.get(earlier)):
            raise InputError(
                f"{image.name}: {stage} needs the result of {earlier} with the same settings; "
                f"run `segpipe stage {earlier}` first"
            )
    return current


def is_whole(image: Image, stage: str, manifest: Manifest | None) -> bool:
    """Whether the stage's array is as its manifest left it: no shard is missing or torn.

    A shard that is absent reads as background, so it must be missed before it is read.
    """
    return manifest is not None and has_array(manifest, image.array(stage))


def has_array(manifest: Manifest, array: Path | None) -> bool:
    """Whether an array is as the manifest of its stage left it."""
    return array is None or manifest.facts.get("disk") == list(disk_usage(array) or ())


def has_results(out: Path, name: str, *, preview: bool) -> bool:
    """Whether the files are there that measure writes, and end as they should: nobody waits for them
    to be on disk, and a power failure may leave less of them than of the manifest that tells of them."""
    ends = {"parquet": PARQUET_END} | ({"png": PNG_END} if preview else {})
    return all(_ends_with(out / f"{name}.{suffix}", end) for suffix, end in ends.items())


def _ends_with(path: Path, end: bytes) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-len(end), os.SEEK_END)
            return file.read() == end
    except OSError:
        return False


def current_manifests(image: Image) -> dict[str, Manifest]:
    """The manifests, by stage, that were made from this input with these settings; in order, up to
    the first that was not."""
    current: dict[str, Manifest] = {}
    before: Manifest | None = None
    for stage in STAGES:
        manifest = Manifest.read(image.manifest_path(stage))
        if manifest is None or manifest.fingerprint != stage_fingerprint(image, stage, before):
            break
        current[stage] = before = manifest
    return current


def manifest_chain(out: Path, name: str) -> dict[str, Manifest]:
    """The manifests of an image, by stage, each made from the result of the one before; whatever the
    input and the settings are now."""
    found: dict[str, Manifest] = {}
    token = None
    for stage in STAGES:
        manifest = Manifest.read(manifest_path(out, name, stage))
        if manifest is None or manifest.before != token:
            break
        found[stage], token = manifest, manifest.token
    return found


def forget(out: Path, name: str, stages: Sequence[str], *, records: bool = True) -> None:
    """Remove what says that these stages of an image are done; their arrays are then made anew.

    Exports go too: nothing would make those anew that are no longer asked for.
    """
    for stage in stages:
        path = manifest_path(out, name, stage)
        if stage == "measure" and (told := Manifest.read(path)) is not None:
            remove_exports(out, name, told.facts)
        path.unlink(missing_ok=True)
        if records:
            remove(work_folder(out, name) / "records" / stage)


def remove(path: Path) -> None:
    """Remove a folder of ours, if it is there."""
    shutil.rmtree(path, ignore_errors=True)
