"""Images and label masks in memory, checked, and the split into training and validation."""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segpipe.errors import InputError, SegpipeError, SettingsError
from segpipe.geometry import Box
from segpipe.labels import LabelFile, LabelImage
from segpipe.slide import IMAGE_SUFFIXES, open_slide, select_channels
from segpipe.training.settings import DataSettings

Array = NDArray[Any]
_LISTED = 3


@dataclass(frozen=True, eq=False)
class Sample:
    """An image with its truth.

    name
        The image's stem.
    pixels
        (C, Y, X), as the file holds them.
    labels
        (Y, X) uint32: a number for each object, 0 is background; or each pixel's class, by its place
        among the network's outputs.
    group, stratum
        See `DataSettings`; an image without a group is one of its own.
    """

    name: str
    pixels: Array
    labels: NDArray[np.uint32]
    group: str
    stratum: str = ""


@dataclass(frozen=True)
class Split:
    """Samples for training and for validation, each in the order of their names."""

    training: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    digest: str = field(default="")
    """Of the names on either side: which split a figure belongs to."""


def load_samples(
    data: DataSettings, channels: int, classes: Sequence[str] | None = None
) -> list[Sample]:
    """Every image of the folder with its mask, in the order of names.

    Parameters
    ----------
    classes
        What the numbers of a mask stand for, from 0; None: each object has one of its own.

    Raises
    ------
    InputError
        When images lack masks or the reverse, sizes differ, a mask is no label image or one of other
        classes, a file cannot be read, or no mask holds an object. Up to three are named, with
        the number of the others.
    SettingsError
        When a folder or the index is missing, or the index lacks a column.
    """
    rows = _read_index(data)
    images, masks = _files_of(data.images), _files_of(data.masks)
    if rows is not None:
        images = {stem: path for stem, path in images.items() if stem in rows}
        masks = {stem: path for stem, path in masks.items() if stem in rows}
        _refuse("no image for", sorted(set(rows) - set(images)), f"of {data.index}")
    _refuse("no mask for", sorted(set(images) - set(masks)), f"in {data.masks}")
    if rows is None:
        _refuse("no image for the mask of", sorted(set(masks) - set(images)), f"in {data.images}")
    if not images:
        raise InputError(f"no images in {data.images}")
    samples, problems = [], []
    for stem in sorted(images):
        row = {} if rows is None else rows[stem]
        try:
            pixels = _read_pixels(images[stem], data.channel, channels)
            labels = read_labels(masks[stem], (pixels.shape[1], pixels.shape[2]))
            if classes is None:
                _check_instances(masks[stem], labels)
            else:
                _check_classes(masks[stem], labels, classes)
        except SegpipeError as error:
            problems.append(str(error))
            continue
        group = row.get(data.group or "", "") or f"={stem}"
        samples.append(Sample(stem, pixels, labels, group, row.get(data.stratum or "", "")))
    if problems:
        raise InputError(_listed(problems, "; "))
    if not any(sample.labels.any() for sample in samples):
        raise InputError(f"no mask in {data.masks} holds an object")
    return samples


def split_samples(samples: Sequence[Sample], share: float, seed: int) -> Split:
    """Whole groups for validation, from each stratum until its share is reached.

    In an order that is a function of names and seed, until the share is reached.

    Raises
    ------
    InputError
        When a side would be empty: one image only, or all of one group.
    """
    strata: defaultdict[str, defaultdict[str, list[Sample]]] = defaultdict(
        lambda: defaultdict(list)
    )
    stratum_of: dict[str, str] = {}
    for sample in samples:
        # a group that spans strata goes whole, with the stratum of its first image
        stratum = stratum_of.setdefault(sample.group, sample.stratum)
        strata[stratum][sample.group].append(sample)
    chosen: set[str] = set()
    for groups in strata.values():
        wanted = share * sum(len(members) for members in groups.values())
        count = 0
        for group in sorted(groups, key=lambda group: _draw(seed, group)):
            size = len(groups[group])
            if count + size / 2 > wanted:  # nearer to the share without it
                continue
            chosen.update(sample.name for sample in groups[group])
            count += size
    training = tuple(sample for sample in samples if sample.name not in chosen)
    validation = tuple(sample for sample in samples if sample.name in chosen)
    names = {sample.group for sample in samples}
    if not validation and len(names) > 1:
        first = min(names, key=lambda group: _draw(seed, group))
        training = tuple(sample for sample in samples if sample.group != first)
        validation = tuple(sample for sample in samples if sample.group == first)
    if not training or not validation:
        raise InputError(
            f"{len(samples)} image{'s' * (len(samples) > 1)} of one field of view: nothing is left "
            "for validation; give images of two at least, or cut one image into two"
        )
    if not any(sample.labels.any() for sample in training):
        raise InputError("no mask of the training images holds an object")
    if not any(sample.labels.any() for sample in validation):
        raise InputError("no mask of the validation images holds an object; use another seed")
    told = "\n".join(
        [
            "training",
            *(one.name for one in training),
            "validation",
            *(one.name for one in validation),
        ]
    )
    return Split(training, validation, hashlib.sha256(told.encode()).hexdigest()[:16])


def read_labels(path: Path, shape: tuple[int, int]) -> NDArray[np.uint32]:
    """The numbers in the mask of an image of this shape: (Y, X) uint32.

    Raises
    ------
    InputError
        When it has several channels, another shape than the image, or is no label image: fractions,
        NaN or negative numbers.
    """
    with LabelImage(LabelFile(path.stem, path)) as mask:
        if mask.shape != shape:
            raise InputError(
                f"{path}: {mask.shape[0]} x {mask.shape[1]} pixels, its image has "
                f"{shape[0]} x {shape[1]}"
            )
        return mask.read(Box(0, 0, *shape))


def _check_instances(path: Path, labels: NDArray[np.uint32]) -> None:
    """Refuse a mask of one number for many pieces."""
    ids = np.unique(labels[labels > 0])
    if len(ids) == 1:
        _, pieces = ndimage.label(labels)
        if pieces > 1:
            raise InputError(
                f"{path}: a mask of one number, {ids[0]}, in {pieces} pieces; a label mask gives each "
                "object a number of its own (scipy.ndimage.label does, where objects do not touch)"
            )


def _check_classes(path: Path, labels: NDArray[np.uint32], classes: Sequence[str]) -> None:
    """Refuse a mask with a number that is no class."""
    if labels.max() >= len(classes):
        raise InputError(
            f"{path}: it holds the number {labels.max()}; expected one from 0 to {len(classes) - 1} for "
            f"each pixel, its class among {', '.join(classes)}"
        )


def _read_pixels(path: Path, wanted: tuple[str, ...] | None, channels: int) -> Array:
    with open_slide(path) as slide:
        chosen = select_channels(slide, wanted, channels)
        return slide.read(Box(0, 0, *slide.shape[1:]), chosen)


def _files_of(folder: Path) -> dict[str, Path]:
    """Stem -> image file of a folder."""
    if not folder.is_dir():
        raise SettingsError(f"{folder} is not a folder")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if path.stem in files:
                raise InputError(f"{folder}: {files[path.stem].name} and {path.name}: keep one")
            files[path.stem] = path
    return files


def _read_index(data: DataSettings) -> dict[str, Mapping[str, str]] | None:
    """Stem -> row of the index, of the rows that `where` lets through."""
    wanted = [*data.where, *filter(None, (data.group, data.stratum))]
    if data.index is None:
        if wanted:
            raise SettingsError(f"data.{'where' if data.where else 'group'} needs data.index")
        return None
    try:
        with data.index.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SettingsError(f"cannot read {data.index}: {error}") from error
    columns = rows[0].keys() if rows else ()
    for column in ["id", *wanted]:
        if column not in columns:
            raise SettingsError(
                f"{data.index} has no column {column!r}; it has {', '.join(columns) or 'no rows'}"
            )
    chosen: dict[str, Mapping[str, str]] = {
        row["id"]: row
        for row in rows
        if all(row[column] in values for column, values in data.where.items())
    }
    if not chosen:
        raise SettingsError(f"data.where lets no row of {data.index} through")
    return chosen


def _draw(seed: int, group: str) -> str:
    return hashlib.sha256(f"{seed} {group}".encode()).hexdigest()


def _refuse(what: str, stems: Sequence[str], where: str) -> None:
    if stems:
        raise InputError(f"{what} {_listed(stems, ', ')} {where}")


def _listed(items: Sequence[str], separator: str) -> str:
    more = len(items) - _LISTED
    return separator.join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")
