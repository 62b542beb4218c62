"""A training from its YAML to a model file; stopped at any time, the same command goes on."""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import torch

from segpipe.errors import InputError, SettingsError
from segpipe.models.card import Decode, ModelCard, parse_card
from segpipe.models.modelfile import find_model, load_model, model_geometry
from segpipe.models.network import Network, build_network, build_twin
from segpipe.prepare import writable_folder
from segpipe.records import locked
from segpipe.segmenter import choose_device
from segpipe.training.course import CHECKPOINT, Course, Trained, input_size
from segpipe.training.dataset import Split, load_samples, split_samples
from segpipe.training.named_losses import WEIGHING, build_loss
from segpipe.training.settings import HEAVIEST, NetworkSettings, TrainSettings, network_of
from segpipe.training.trainer import Trainer
from segpipe.training.weights import Weighing, balanced_class_weights

log = logging.getLogger(__name__)


def train(settings: TrainSettings, *, restart: bool = False) -> Trained:
    """Train as the settings say, from the start or from where it was stopped.

    On CPU the same settings, images and versions give the same weights, with a stop in between or
    without.

    Raises
    ------
    SettingsError, ModelError
        When a setting does not fit, or `output` holds a training of other settings.
    InputError
        When images or masks cannot be used, a class occurs in none, or the loss is not a number.
    Stopped
        After SIGINT or SIGTERM; the same call goes on.
    """
    _check_loss(settings)
    out = writable_folder(settings.output)
    with locked(out / "training", settings.name):
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        card = first_card(settings)
        geometry = model_geometry(card)
        _check_crops(card, settings)
        samples = load_samples(settings.data, len(card.channels), settings.network.classes)
        split = split_samples(samples, settings.data.validation, settings.seed)
        log.info(
            "%d images for training, %d for validation (split %s)",
            *(len(split.training), len(split.validation), split.digest),
        )
        trainer = Trainer(_first_network(settings, card), settings, choose_device(settings.device))
        course = Course(settings, card, geometry, split, trainer, weighing_of(settings, split))
        if restart:
            (out / CHECKPOINT).unlink(missing_ok=True)
        course.resume()
        course.run()
        return course.finish()


def _first_network(settings: TrainSettings, card: ModelCard) -> Network:
    """The network before its first step.

    Raises
    ------
    ModelError
        When there is no such model to start from.
    SettingsError
        When it is another network.
    """
    if settings.start is None:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            return build_network(*card.network_arguments)
    network, before = load_model(find_model(settings.start))
    there, asked = network_of(before), settings.network
    for key in NetworkSettings.model_fields:
        if getattr(there, key) != getattr(asked, key):
            raise SettingsError(
                f"start: {settings.start} has another network.{key} than is asked for: "
                f"{_plain(there)[key]} and not {_plain(asked)[key]}; leave network out"
            )
    return network


def _plain(network: NetworkSettings) -> dict[str, Any]:
    return network.model_dump(mode="json")


def first_card(settings: TrainSettings) -> ModelCard:
    """The card before anything is measured.

    Raises
    ------
    ModelError
        When network, channels and outputs do not fit together.
    """
    network, told = settings.network, settings.card
    interior = Decode().interior if "interior" in network.outputs else ()
    return parse_card(
        {
            "name": settings.name,
            "architecture": network.architecture.model_dump(),
            "channels": network.channels,
            "outputs": network.outputs,
            "normalisation": network.normalisation.model_dump(),
            "pixel_size_um": told.pixel_size_um,
            "decode": {"interior": interior},
            "licence": told.licence,
            "training_data": told.training_data,
            "limits": told.limits,
        },
        "settings",
    )


def weighing_of(settings: TrainSettings, split: Split) -> Weighing:
    """What decides the weights of pixels: from the settings, and what the training masks hold.

    Raises
    ------
    InputError
        When a class occurs in no mask, or is so rare that its balanced weight would be absurd.
    """
    loss, names = settings.loss, settings.weighed
    pixels = np.zeros(len(names), np.int64)
    for sample in split.training:
        numbers = sample.labels if settings.network.classes else sample.labels > 0
        pixels += np.bincount(numbers.ravel(), minlength=len(names))
    if settings.network.classes:
        missing = [name for name, count in zip(names, pixels, strict=True) if not count]
        if missing:
            raise InputError(
                f"no mask of the training images holds {' or '.join(missing)}; give images with it, "
                "another seed, or leave it out of network.outputs"
            )
    weights = None
    if isinstance(loss.class_weights, dict):
        weights = tuple(loss.class_weights[name] for name in names)
    elif loss.class_weights is not None:
        weights = balanced_class_weights(pixels.tolist())
    if weights is not None and max(weights) > HEAVIEST:
        rarest = int(np.argmax(weights))
        raise InputError(
            f"{names[rarest]} makes up {pixels[rarest] / pixels.sum():.1g} of the training masks; its "
            f"balanced weight would be {weights[rarest]:.0f}, expected at most {HEAVIEST:.0f}: give "
            "numbers for loss.class_weights"
        )
    mapped = loss.weight_map is not False and not settings.network.classes
    return Weighing(weights, loss.w0 if mapped else 0.0, loss.sigma_px)


def _check_loss(settings: TrainSettings) -> None:
    """Refuse a loss that does not take what the settings give it."""
    build_loss(settings.loss_name, settings.loss.parameters)
    if settings.network.classes and settings.loss_name == "instance":
        raise SettingsError(
            "loss.name instance is of foreground and interior; for classes take cross_entropy, "
            "soft_dice, focal, iou, ms_ssim, unetplusplus or unet3plus"
        )
    for key in ("class_weights", "weight_map"):
        if getattr(settings.loss, key) and settings.loss_name not in WEIGHING:
            raise SettingsError(
                f"loss.{key} weighs pixels, which {settings.loss_name} does not; leave it out, or take "
                f"{', '.join(WEIGHING)}"
            )


def _check_crops(card: ModelCard, settings: TrainSettings) -> None:
    """Refuse crops so few and small that batch norm has one value of a channel."""
    course = settings.course
    with torch.device("meta"):
        network = build_twin(*card.network_arguments).train()
        size = input_size(network, course.crop)
        try:
            network.forward_training(torch.zeros(course.batch, len(card.channels), size, size))
        except ValueError as error:
            raise SettingsError(
                f"course.batch {course.batch} and course.crop {course.crop}: in the middle of "
                f"{card.architecture.name} that is one value of a channel, of which batch norm can tell "
                "nothing; make batch 2 or more, or the crop larger"
            ) from error
