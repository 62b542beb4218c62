"""Everything that can be known before the first second of work: headers, model, plan, sizes."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segpipe.choosing import AUTO_MODELS, choose_model
from segpipe.errors import InputError, SegpipeError, SettingsError
from segpipe.geometry import Lattice
from segpipe.image_layout import layout_of
from segpipe.inputs import Input, choice_of
from segpipe.models.modelfile import find_model, model_geometry, model_hash, read_card
from segpipe.numeric_plan import Plans
from segpipe.settings import AUTO, Settings
from segpipe.slide import THE_PLANE, OpenFile, Slide, input_fingerprint, open_file
from segpipe.slide import Choice as PlaneChoice
from segpipe.stages.exported import check_formats
from segpipe.stages.image import Image, Model

log = logging.getLogger(__name__)
NAMED = 3
"""Images of which a line tells the names."""


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
    model_of = functools.cache(load_model)
    plans = Plans(out, settings)
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
                    layout = layout_of(slide, settings, model, choice, files.fingerprint)
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
    """Check settings and models, and write down the plan, which processes over one OUT share.

    Raises
    ------
    SettingsError, ModelError
        As `prepare`.
    """
    check_formats(settings.export.formats)
    plans = Plans(out, settings)
    for name in AUTO_MODELS if settings.infer.model == AUTO else (settings.infer.model,):
        plans.check(load_model(name))
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
