"""Everything that can be known before the first second of work: headers, model, plan, sizes."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segpipe import __version__
from segpipe.backend import choose_backend
from segpipe.choosing import AUTO_MODELS, Choice, choose_model
from segpipe.errors import InputError, SegpipeError, SettingsError
from segpipe.geometry import Lattice, TileGrid, ceil_to
from segpipe.inputs import Input, choice_of
from segpipe.models.modelfile import find_model, model_geometry, model_hash, read_card
from segpipe.records import read_json, write_json
from segpipe.resampling import Resolution
from segpipe.settings import AUTO, Settings
from segpipe.slide import (
    THE_PLANE,
    OpenFile,
    Slide,
    input_fingerprint,
    open_file,
    remote_url,
    select_channels,
)
from segpipe.slide import Choice as PlaneChoice
from segpipe.slide.source import printable
from segpipe.stages.emptiness import skips_glass
from segpipe.stages.exported import check_formats
from segpipe.stages.image import (
    STAGES,
    Image,
    Layout,
    Model,
    NumericPlan,
    decode_of,
    settings_digest,
)
from segpipe.stages.mask import find_mask
from segpipe.stages.resolution import resolution_of

log = logging.getLogger(__name__)
NAMED = 3
"""Images of which a line tells the names."""
LARGE_COPY_BYTES, MANY_TIMES = 4_000_000_000, 5
"""An image is read where it is when its pixels are more bytes than this, and so many times the file."""
LARGE_ZARR_BYTES = 1_000_000_000
"""An OME-Zarr of more bytes of pixels than this is read where it is, when its chunks suit: a copy would
be what is there already. Of less it is cheap, and OUT then holds all that viewers want."""
SUITABLE_CHUNK = 128, 2048
"""Pixels a side: of smaller chunks there are too many, larger ones are decoded for too many regions."""
REGION_ON_CPU, REGION_ON_GPU = 2048, 4096
"""Pixels a side of a region, where the settings do not say it."""
LARGE_PLANE = 2**31
"""Pixels from which regions are those of a GPU on a CPU too: a shard is a file, and file systems of
clusters count them. At 10 gigapixels regions of 2048 make 6,500 files that stay, of 4096 1,800."""


@dataclass(frozen=True)
class Prepared:
    """Images that can be worked on, and inputs that cannot."""

    images: list[Image]
    failed: list[tuple[Input, SegpipeError]]

    def tiles(self, image: Image) -> int:
        """Windows that go through the network."""
        return len(image.tiles)

    def disk_bytes(self, image: Image) -> int:
        """Bytes on disk while it runs, were nothing compressed."""
        height, width = image.layout.plane
        size = {"uint8": 1, "uint16": 2}.get(image.layout.dtype, 4)
        per_pixel = (
            size * image.layout.shape[0] * 4 / 3 / 4**image.finest  # the image and its pyramid
            + len(image.model.card.outputs)  # probabilities
            + 1  # runs of seeds, in records
            + 4 * 4 / 3  # labels and their pyramid
        )
        return int(height * width * per_pixel)

    def file_count(self, image: Image, writers: int = 1) -> int:
        """Files while it runs: shards, metadata, and the records of so many processes."""
        files = self.final_file_count(image)
        files += 1 + len(Lattice(image.layout.plane, image.grid.shard))  # probabilities
        return files + 4 * (1 + writers) + 3 * writers  # records of stages, and arrays in them

    def final_file_count(self, image: Image) -> int:
        """Files that stay after `segpipe clean`."""
        files = 14  # groups, manifests, tables of seeds, lock, table and picture
        files += len(image.settings.export.formats)
        for grid, finest in ((image.grid, image.finest), (image.label_grid, 0)):
            levels = [grid.level(number) for number in range(finest, len(grid.levels))]
            files += sum(1 + len(Lattice(level.shape, level.shard)) for level in levels)
        return files


def writable_folder(out: Path) -> Path:
    """OUT by its real path; made if need be.

    Raises
    ------
    SettingsError
        When it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".segpipe-probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise SettingsError(f"cannot write into {out}: {error.strerror}") from error
    return out.resolve()


def prepare(found: Sequence[Input], out: Path, settings: Settings) -> Prepared:
    """Open every header, choose the model, and write the plan down.

    Raises
    ------
    SettingsError, ModelError
        When settings or model are wrong for all inputs: nothing is started.
    """
    check_formats(settings.export.formats)
    model_of = _Models(out)
    plans = _Plans(out, settings)
    images: list[Image] = []
    failed: list[tuple[Input, SegpipeError]] = []
    automatic = settings.infer.model == AUTO
    if not automatic:
        plans.check(model_of(settings.infer.model))
    with contextlib.closing(_Files(choice_of(settings.tile))) as files:
        for one in found:
            try:
                with files.open(one, for_pixels=automatic) as slide:
                    choice = choose_model(slide, settings) if automatic else None
                    model = model_of(choice.model if choice else settings.infer.model)
                    layout = _layout(slide, settings, model, choice, files.fingerprint)
            except InputError as error:
                named = error if one.plane == THE_PLANE else InputError(f"{one.name}: {error}")
                failed.append((one, named))
                continue
            try:
                images.append(plans.image(one, out, model, layout, choice))
            except InputError as error:
                failed.append((one, error))
    plans.write()
    _tell_choices(images)
    return Prepared(images, failed)


def _tell_choices(images: Sequence[Image]) -> None:
    """A line for each model that was chosen and each reason; run.json tells it image by image."""
    groups: dict[tuple[str, str], list[str]] = {}
    for image in images:
        if image.chosen is not None:
            groups.setdefault((image.model.card.name, image.chosen), []).append(image.name)
    for (model, why), names in sorted(groups.items()):
        some = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
        log.info(
            "model auto: %s for %d of %d images (%s): %s", model, len(names), len(images), why, some
        )


def begin(out: Path, settings: Settings) -> None:
    """Check settings and models, and write what processes over one OUT share: the plan, for one.

    Raises
    ------
    SettingsError, ModelError
        As `prepare`.
    """
    check_formats(settings.export.formats)
    plans, model_of = _Plans(out, settings), _Models(out)
    for name in AUTO_MODELS if settings.infer.model == AUTO else (settings.infer.model,):
        plans.check(model_of(name))
    plans.write()


class _Files:
    """The file opened last: the planes of a file follow each other, and its headers are read once."""

    def __init__(self, choice: PlaneChoice) -> None:
        self._choice = choice
        self._file: OpenFile | None = None
        self._fingerprint = self.fingerprint = ""

    def open(self, one: Input, *, for_pixels: bool) -> Slide:
        """The plane of a file; `fingerprint` is then the file's.

        Parameters
        ----------
        for_pixels
            Whether pixels of colour images will be read, and not only what is known of them.
        """
        if one.seen is not None and not (for_pixels and one.seen.slide.rgb):
            self.fingerprint = one.seen.fingerprint
            return one.seen.slide
        if self._file is None or self._file.path != one.source:
            self.close()
            fingerprint = input_fingerprint(one.source)
            self._file, self._fingerprint = open_file(one.source), fingerprint
        self.fingerprint = self._fingerprint
        try:
            return self._file.slide(one.plane)
        except InputError:
            if one.plane == THE_PLANE:  # what was said about planes does not fit: say why
                self._file.choose(self._choice)
            raise

    def close(self) -> None:
        """Close it."""
        if self._file is not None:
            self._file.close()
        self._file = None


def stage_digests(settings: Settings) -> dict[str, str]:
    """`settings_digest` of each stage.

    Raises
    ------
    ModelError
        When there is no such model.
    """
    models = model_hashes(settings)
    return {stage: settings_digest(stage, settings, models) for stage in STAGES}


def model_hashes(settings: Settings) -> list[str]:
    """Hash of the model, or of each of those among which `auto` chooses."""
    names = AUTO_MODELS if settings.infer.model == AUTO else (settings.infer.model,)
    return [model_hash(find_model(name)) for name in names]


def load_model(name: str) -> Model:
    """A model by name or path: its card, and how far its network looks.

    Raises
    ------
    ModelError
        When there is none, or its file cannot be used.
    """
    path = find_model(name)
    card = read_card(path)
    found = model_geometry(card)
    return Model(path, model_hash(path), card, found.context, found.halo, found.stride, found.exact)


class _Models:
    """Models by name. How far they look is kept in OUT: to find out takes torch, and many processes
    over one OUT need it that have no other use for torch."""

    def __init__(self, out: Path) -> None:
        self.path = out / "manifests" / "models.json"
        self.loaded: dict[str, Model] = {}

    def __call__(self, name: str) -> Model:
        if name not in self.loaded:
            self.loaded[name] = self._known(name) or self._measured(name)
        return self.loaded[name]

    def _known(self, name: str) -> Model | None:
        path = find_model(name)
        told = self._read().get(model_hash(path))
        return None if told is None else Model(path, model_hash(path), read_card(path), **told)

    def _measured(self, name: str) -> Model:
        model = load_model(name)
        fields = ("context", "halo", "stride", "exact")
        told = {field: getattr(model, field) for field in fields}
        models = self._read() | {model.hash: told}
        write_json(self.path, {"segpipe": __version__, "models": models})
        return model

    def _read(self) -> dict[str, Any]:
        content = read_json(self.path)
        if not isinstance(content, dict) or content.get("segpipe") != __version__:
            return {}
        return dict(content["models"])


def _on_gpu(settings: Settings) -> bool:
    """Whether the network is to run on a GPU, be it that of another machine."""
    if settings.infer.device != "auto":
        return settings.infer.device != "cpu"
    from segpipe.segmenter import device_type

    return device_type("auto") != "cpu"


def _layout(
    slide: Slide, settings: Settings, model: Model, choice: Choice | None, fingerprint: str
) -> Layout:
    wanted = choice.channels if choice and choice.channels else settings.tile.channel
    channels = select_channels(slide, wanted, len(model.card.channels))
    try:
        resolution = resolution_of(settings.tile, model.card, slide.pixel_size_um, slide.levels)
    except InputError as error:
        raise InputError(f"{printable(slide.path.name)}: {error}") from None
    return Layout(
        (slide.shape[0], *resolution.shape),
        (slide.shape[1], slide.shape[2]),
        resolution,
        slide.dtype.name,
        tuple(channels),
        tuple(slide.channel_names),
        slide.rgb,
        settings.tile.pixel_size_um or slide.pixel_size_um,
        fingerprint,
        copied=_is_copied(slide, settings, resolution),
        warnings=slide.warnings,
    )


def _is_copied(slide: Slide, settings: Settings, resolution: Resolution) -> bool:
    """Whether OUT is to hold the image at the working resolution.

    By `auto`, it is not where a copy would be large and many times the file, or of an OME-Zarr of
    suitable chunks, and reading the file is as good: a level of a pyramid as it is, on this machine's
    own file system.
    """
    if settings.tile.copy != "auto":
        return settings.tile.copy == "always"
    if resolution.resampled or len(slide.levels) < 2 or remote_url(slide.path) is not None:
        return True
    pixels = math.prod(resolution.shape)
    size = slide.shape[0] * pixels * slide.dtype.itemsize
    if not slide.path.is_file():
        least, most = SUITABLE_CHUNK
        suits = slide.chunk is not None and all(least <= side <= most for side in slide.chunk)
        return not suits or size < LARGE_ZARR_BYTES
    stored = slide.path.stat().st_size
    return size < LARGE_COPY_BYTES or size < MANY_TIMES * stored


class _Plans:
    """The numeric plan: from settings, model and image; what is left open is decided once per OUT."""

    def __init__(self, out: Path, settings: Settings) -> None:
        self.path = out / "manifests" / "plan.json"
        self.settings = settings
        self.digests = stage_digests(settings)
        written = read_json(self.path)
        self.open: dict[str, Any] = dict(written) if isinstance(written, dict) else {}
        self.new = not {"batch", "region", "backend"} <= self.open.keys()
        if self.new:
            on_gpu = _on_gpu(settings)
            region = REGION_ON_GPU if on_gpu else REGION_ON_CPU
            sizes = {"batch": 8 if on_gpu else 1, "region": region}
            self.open = sizes | {"backend": choose_backend(AUTO, on_gpu=on_gpu)} | self.open

    def check(self, model: Model) -> None:
        """Say what is wrong with the settings for this model, before anything is started."""
        settings = self.settings
        if settings.infer.precision == "float16" and not _on_gpu(settings):
            raise SettingsError("infer.precision float16 needs a GPU; use float32, or bfloat16")
        TileGrid((1, 1), settings.tile.core, model.halo, model.stride)
        decode_of(settings, model.card)

    def write(self) -> None:
        """Keep the decisions beside the results."""
        if self.new:
            write_json(self.path, self.open)

    def image(
        self, one: Input, out: Path, model: Model, layout: Layout, choice: Choice | None
    ) -> Image:
        """The image with its numeric plan."""
        tile, infer = self.settings.tile, self.settings.infer
        plan = NumericPlan(
            core=tile.core,
            halo=model.halo,
            stride=model.stride,
            batch=infer.batch or self.open["batch"],
            precision=infer.precision,
            memory_format=infer.memory_format,
            threads=infer.threads,
            backend=self.open["backend"] if infer.backend == AUTO else infer.backend,
            skip_empty=infer.skip_empty and model.card.empty is not None,
            skip_glass=skips_glass(self.settings, model.card),
            tta=infer.tta,
        )
        self.check(model)
        usual: int = self.open["region"]
        if math.prod(layout.plane) > LARGE_PLANE:
            usual = max(usual, REGION_ON_GPU)
        region = tile.region or ceil_to(usual, tile.core)
        return Image(
            one.name,
            one.source,
            one.plane,
            out,
            self.settings,
            model,
            plan,
            region,
            layout,
            self.digests,
            choice.why if choice else None,
            None if tile.mask is None else find_mask(tile.mask, one.name),
        )
