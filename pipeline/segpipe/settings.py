"""Settings: YAML and KEY=VALUE become one frozen, checked tree, once.

Every key is described here and nowhere else; `segpipe.settings_docs` writes from these descriptions
what people and editors read.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from segpipe.backend import OPENVINO
from segpipe.errors import SettingsError

Share = Annotated[float, Field(ge=0, le=1)]
FromZero = Annotated[int, Field(ge=0)]
AUTO = "auto"
Feature = Literal["shape", "intensity", "neighbours"]
FEATURES: tuple[Feature, ...] = ("shape", "intensity", "neighbours")
ExportFormat = Literal["geojson", "geoparquet", "csv", "anndata", "tiff"]


def _as_names(value: Any) -> Any:
    """One channel or several, by name or number: a tuple of strings."""
    several = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(one, str | int) and not isinstance(one, bool) for one in several):
        raise ValueError("should be names or numbers of channels")
    return tuple(str(one) for one in several)


def _as_features(value: Any) -> Any:
    """One feature or several: each once, in the order of the table."""
    several = value if isinstance(value, list | tuple) else [value]
    known = [one for one in FEATURES if one in several]
    return (*known, *(one for one in several if one not in FEATURES))


def _as_paths(value: Any) -> Any:
    """One path or several: a list of them."""
    several = value if isinstance(value, list | tuple) else [value]
    for one in several:
        if isinstance(one, bool | int | float):  # YAML reads 007 as 7
            raise ValueError("should be a path; one that looks like a number is written as ./NAME")
    return [
        Path(one).expanduser() if isinstance(one, str) and one.startswith("~/") else one
        for one in several
    ]


def _as_word(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare `off` as false


def _as_path(value: Any) -> Any:
    return value if value is None or isinstance(value, list | tuple) else _as_paths(value)[0]


def _as_formats(value: Any) -> Any:
    """Formats as a list, or as words with commas between them: a tuple, in one order."""
    if value is None:
        return ()
    several = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(one, str) for one in several):
        raise ValueError("should be names of formats")
    words = {word.strip() for one in several for word in one.split(",")} - {""}
    known = get_args(ExportFormat)
    return tuple(sorted(words, key=lambda one: (known.index(one) if one in known else -1, one)))


def _as_numbers(value: Any) -> Any:
    """A word, or one number or several from 0: a tuple of integers."""
    if value is None or isinstance(value, str):
        return value
    several = value if isinstance(value, list | tuple) else [value]
    if not several or not all(type(one) is int and one >= 0 for one in several):
        raise ValueError("should be a word, or numbers from 0 such as [3, 10]")
    return tuple(several)


# What YAML may hold for these, for the schema: their validators make tuples and paths of it.
_Numbers = FromZero | Annotated[list[FromZero], Field(min_length=1)]
_NAMES = BeforeValidator(_as_names, json_schema_input_type=str | int | list[str | int])
_Z = BeforeValidator(_as_numbers, json_schema_input_type=Literal["each", "max"] | _Numbers | None)
_EACH = BeforeValidator(_as_numbers, json_schema_input_type=Literal["each"] | _Numbers | None)
_FORMATS = BeforeValidator(_as_formats, json_schema_input_type=list[ExportFormat] | str)
_PATHS = BeforeValidator(_as_paths, json_schema_input_type=Path | list[Path])
_PATH = BeforeValidator(_as_path, json_schema_input_type=Path)


# pydantic's own `copy` is deprecated, and nothing here calls it
warnings.filterwarnings("ignore", 'Field name "copy" in "TileSettings" shadows')


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class TileSettings(_Section):
    """How the image is cut and stored."""

    chunk: int = Field(512, ge=16, description="inner Zarr chunk in pixels; divides core")
    core: int = Field(1024, ge=16, description="pixels of a tile that are kept; divides region")
    region: int | None = Field(
        None,
        ge=16,
        description="pixels of a shard and task; null: 2048, on GPU and above 2 Gpx 4096",
    )
    channel: Annotated[tuple[str, ...], _NAMES] | None = Field(
        None, description="channels for the model, by name or number from 0; null: all of them"
    )
    pixel_size_um: float | None = Field(
        None,
        gt=0,
        lt=1e6,
        description="size of a pixel in um where the file does not say or is wrong",
    )
    scale: float | None = Field(
        None,
        gt=0,
        description="the image is made this many times as wide for the model; null: by diameter, "
        "else by the pixel sizes of image and model, else 1; changes within 5 % are not made",
    )
    diameter: float | None = Field(
        None,
        gt=0,
        description="typical diameter of the objects in pixels of the image: it is scaled so that "
        "they are as large as those that the model was trained on",
    )
    copy: Literal["auto", "always", "never"] = Field(  # type: ignore[assignment]
        "auto",
        description="whether OUT gets the image at full resolution; auto: unless the copy would be "
        "large and it is a compressed slide or an OME-Zarr of suitable chunks, which is then read where "
        "it is",
    )
    tissue: Annotated[Literal["auto", "off"], BeforeValidator(_as_word)] = Field(
        "auto",
        description="auto: with a model of red, green and blue, tiles of bare glass are left out; off: "
        "none is",
    )
    mask: Annotated[Path, _PATH] | None = Field(
        None,
        description="GeoJSON with polygons as QuPath writes them, or an image that is stretched over "
        "it: objects are looked for inside, or where it is not 0; a folder holds one per image, by name",
    )
    z: Annotated[Literal["each", "max"] | tuple[int, ...] | None, _Z] = Field(
        None,
        description="z planes: each, max (projection) or numbers from 0; null: a stack is refused",
    )
    t: Annotated[Literal["each"] | tuple[int, ...] | None, _EACH] = Field(
        None, description="time points: each, or numbers from 0; null: a series is refused"
    )
    scene: Annotated[Literal["each"] | tuple[int, ...] | None, _EACH] = Field(
        None, description="scenes of a file: each, or numbers from 0; null: several are refused"
    )
    pages: Literal["z", "t", "channel"] | None = Field(
        None, description="what pages are where the file does not say; null: they are refused"
    )


class InferSettings(_Section):
    """How the network is run. These decide the probabilities to the last bit."""

    model: str = Field(AUTO, description="name or path of a model file; auto: by the channels")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="where it runs")
    batch: int | None = Field(None, ge=1, description="windows at once; null: 1 on CPU, 8 on GPU")
    backend: Literal["auto", "eager", "openvino"] = Field(
        "auto", description="what runs the network; auto: openvino on CPU, eager (torch) on GPU"
    )
    precision: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="arithmetic of the network; float16 needs a GPU"
    )
    memory_format: Literal["channels_last", "contiguous"] = Field(
        "channels_last", description="layout of the activations; for eager"
    )
    threads: int = Field(1, ge=1, description="threads of the network in each process")
    normalise: tuple[float, float] | None = Field(
        None, description="[low, high] of the image that become 0 and 1; null: the model's rule"
    )
    tta: bool = Field(
        False, description="test-time augmentation: the mean over 8 views, at 8 times the cost"
    )
    skip_empty: bool = Field(
        True, description="leave out tiles in which the model, by its card, sees nothing"
    )


class StitchSettings(_Section):
    """How probabilities become instances. null: what the model's card says."""

    region: int | None = Field(
        None, ge=1, description="pixels of a shard of labels; null: as tile.region"
    )
    foreground: Share | None = Field(
        None, gt=0, description="a pixel of an object has at least this"
    )
    interior: tuple[Share, ...] | None = Field(
        None, description="falling thresholds of the interior whose components are seeds"
    )
    min_area: int | None = Field(None, ge=1, description="pixels; smaller objects are dropped")
    max_area: int | None = Field(
        None, ge=1, description="pixels; larger finished objects are dropped; null: none"
    )
    min_probability: Share = Field(
        0.0, description="finished objects with a lower mean foreground are dropped"
    )
    max_hole: int = Field(
        0, ge=0, description="pixels; holes of the foreground up to this size are filled first"
    )
    growth_levels: tuple[Share, ...] | None = Field(
        None, description="falling levels of the interior at which seeds grow; the last is 0"
    )
    growth_steps: int | None = Field(
        None, ge=1, le=512, description="pixels grown at most at each level"
    )

    @property
    def filters(self) -> bool:
        """Whether finished objects may be dropped."""
        return self.max_area is not None or self.min_probability > 0


class MeasureSettings(_Section):
    """What is measured and drawn."""

    preview: bool = Field(True, description="write a preview picture")
    features: Annotated[tuple[Feature, ...], BeforeValidator(_as_features)] = Field(
        FEATURES, description="columns of the table besides place, area and probability"
    )


class ExportSettings(_Section):
    """Files for other programs, beside the table. Changed, only they are made again."""

    formats: Annotated[tuple[ExportFormat, ...], _FORMATS] = Field(
        (), description="geojson (QuPath), geoparquet, csv, anndata (scanpy), tiff (labels)"
    )
    simplify_px: float = Field(
        0.0, ge=0, le=1e6, description="how far outlines may be off, for fewer corners; 0: exact"
    )
    classification: str = Field(
        "Nucleus", min_length=1, description="class that QuPath shows the objects as"
    )


class EngineSettings(_Section):
    """Who does the work. Nothing here changes a result."""

    kind: Literal["auto", "serial", "local"] = Field(
        "auto",
        description="serial: in this process; local: processes on this machine; auto: by size",
    )
    workers: int | None = Field(None, ge=1, description="processes; null: by cores and memory")
    attempts: int = Field(3, ge=1, description="tries of a region before it is given up")


class Settings(_Section):
    """All settings; frozen."""

    tile: TileSettings = TileSettings()
    infer: InferSettings = InferSettings()
    stitch: StitchSettings = StitchSettings()
    measure: MeasureSettings = MeasureSettings()
    export: ExportSettings = ExportSettings()
    engine: EngineSettings = EngineSettings()

    @model_validator(mode="after")
    def _sizes_divide(self) -> Settings:
        tile, stitch = self.tile, self.stitch
        if self.infer.backend == OPENVINO and self.infer.device not in (AUTO, "cpu"):
            raise ValueError("infer.backend openvino is for the CPU; set infer.device=cpu")
        if self.infer.normalise is not None:
            low, high = self.infer.normalise
            if not -1e30 < low < high < 1e30:
                raise ValueError(f"infer.normalise [{low}, {high}] must be finite and rise")
        if tile.scale is not None and tile.diameter is not None:
            raise ValueError("tile.scale and tile.diameter both say the scale: give one of them")
        if tile.core % tile.chunk:
            raise ValueError(f"tile.core {tile.core} is not a multiple of tile.chunk {tile.chunk}")
        if tile.region is not None and tile.region % tile.core:
            raise ValueError(
                f"tile.region {tile.region} is not a multiple of tile.core {tile.core}"
            )
        if stitch.region is not None and stitch.region % tile.chunk:
            raise ValueError(
                f"stitch.region {stitch.region} is not a multiple of tile.chunk {tile.chunk}"
            )
        return self


def overrides(settings: Settings) -> dict[str, Any]:
    """The settings that differ from the defaults, by their dotted names: what `-s` would say."""
    chosen, usual = settings.model_dump(mode="json"), Settings().model_dump(mode="json")
    return {
        f"{section}.{key}": value
        for section, keys in chosen.items()
        for key, value in keys.items()
        if value != usual[section][key]
    }


class Project(Settings):
    """A project's YAML: what to work on at the top, beside the sections of the settings; frozen."""

    input: Annotated[tuple[Path, ...], _PATHS] | None = Field(
        None, description="an image or a folder that is searched for them, or a list of these"
    )
    output: Annotated[Path, _PATH] | None = Field(
        None, description="folder of the results; made if need be"
    )
    model: str | None = Field(None, description="the same as infer.model: give one of them")
    batch: int = Field(
        1, ge=1, description="images of one job of the workflow, which loads the model once"
    )

    @property
    def settings(self) -> Settings:
        """The sections: all that decides results."""
        return Settings(**{name: getattr(self, name) for name in Settings.model_fields})


PROJECT_KEYS: tuple[str, ...] = tuple(
    name for name in Project.model_fields if name not in Settings.model_fields
)


def read_yaml(path: Path) -> Any:
    """Content of a YAML file, by safe_load.

    Raises
    ------
    SettingsError
        When it is missing or not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def load_settings(
    config: Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Settings:
    """The settings of a project; arguments and errors as in `load_project`."""
    return load_project(config, overrides, options).settings


def load_project(
    config: Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Project:
    """Project from a YAML file, `section.key=value` strings and options, the later over the earlier.

    Options are values by dotted name; None leaves the setting as it is.

    Raises
    ------
    SettingsError
        A file that is missing or not YAML, an unknown key (the nearest known one is named), a value
        of the wrong type or out of range, sizes that do not divide, two models.
    """
    tree: dict[str, Any] = {}
    if config is not None:
        loaded = read_yaml(config)
        if loaded is not None:
            tree = one_model(_sections(loaded, str(config)), str(config))
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator or not (key.count(".") == 1 or key.strip() in PROJECT_KEYS):
            raise SettingsError(
                f"'{text}' is not SECTION.KEY=VALUE, for example stitch.region=2048"
            )
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"the value of '{text}' is not YAML") from error
        _put(tree, key.strip(), parsed)
    for dotted, value in (options or {}).items():
        if value is not None:
            _put(tree, dotted, value)
    return parse_project(tree)


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    section, _, key = ("infer.model" if dotted == "model" else dotted).rpartition(".")
    if section:
        tree.setdefault(section, {})[key] = value
    else:
        tree[key] = value


def one_model(tree: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The tree with the model as `infer.model` only.

    Raises
    ------
    SettingsError
        When `model` and `infer.model` name different ones.
    """
    told = dict(tree)
    model, infer = told.pop("model", None), told.get("infer") or {}
    inner = infer.get("model")
    if model is None or (model == AUTO and inner is not None):
        return told
    if inner not in (None, AUTO, model):
        raise SettingsError(f"{origin}: model {model} and infer.model {inner}: give one of them")
    return told | {"infer": {**infer, "model": model}}


def _sections(loaded: Any, origin: str) -> dict[str, Any]:
    if not isinstance(loaded, Mapping):
        raise SettingsError(f"{origin} must hold sections with keys, such as 'tile:'")
    tree: dict[str, Any] = {}
    for name, section in loaded.items():
        if name in PROJECT_KEYS:
            tree[name] = section
        elif section is None or isinstance(section, Mapping):
            tree[str(name)] = dict(section or {})
        elif name in Settings.model_fields:
            raise SettingsError(f"{origin}: '{name}' must hold keys, got {section!r}")
        else:
            tree[str(name)] = {}  # unknown: named by parse_project
    return tree


def parse_settings(tree: Mapping[str, Any]) -> Settings:
    """Settings from nested mappings; errors as in `load_project`."""
    return parse_project(tree).settings


def parse_project(tree: Mapping[str, Any]) -> Project:
    """Project from project keys and nested mappings; errors as in `load_project`."""
    for dotted in _keys(tree):
        if dotted not in KNOWN_KEYS:
            among = KNOWN_KEYS if "." in dotted else (*Settings.model_fields, *PROJECT_KEYS)
            near = difflib.get_close_matches(dotted, among, 1, 0.5) or _same_key(dotted)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(KNOWN_KEYS)}"
            raise SettingsError(f"unknown setting '{dotted}'{hint}")
    try:
        return Project.model_validate(one_model(tree, "settings"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:2])
        message = first["msg"].removeprefix("Value error, ")
        if not where:
            raise SettingsError(message) from None
        got = "" if isinstance(first["input"], Mapping) else f", got {first['input']!r}"
        raise SettingsError(f"{where}: {message[:1].lower()}{message[1:]}{got}") from None


def _keys(tree: Mapping[str, Any]) -> Iterator[str]:
    for section, keys in tree.items():
        if section in PROJECT_KEYS:
            continue
        if section not in Settings.model_fields:
            yield str(section)
        for key in keys:
            yield f"{section}.{key}"


def _same_key(dotted: str) -> list[str]:
    """A known key of another section with the same last part."""
    return [known for known in KNOWN_KEYS if known.split(".")[1] == dotted.rpartition(".")[2]]


def _all_keys() -> Iterator[str]:
    for section, field in Settings.model_fields.items():
        model = field.annotation
        assert isinstance(model, type) and issubclass(model, _Section)  # noqa: S101 for mypy
        yield from (f"{section}.{key}" for key in model.model_fields)


KNOWN_KEYS: tuple[str, ...] = tuple(_all_keys())
