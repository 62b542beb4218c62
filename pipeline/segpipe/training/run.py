"""A training from its YAML to a model file; stopped at any time, the same command goes on.

output/checkpoint.pt        network, averaged weights, optimiser, step, history, best so far
output/history.csv          step, loss, learning rate, validation figures
output/<name>.safetensors   the best averaged weights, with the card
output/report.html          curves and validation overlays
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from segpipe import __version__
from segpipe.errors import InputError, SettingsError, Stopped
from segpipe.evaluate import Scores
from segpipe.models.card import Decode, ModelCard, nearest, parse_card
from segpipe.models.context import ModelGeometry, next_admissible
from segpipe.models.foreign import DAMAGED
from segpipe.models.modelfile import SUFFIX, model_geometry, write_model
from segpipe.models.network import build_network
from segpipe.prepare import writable_folder
from segpipe.records import locked, write_text
from segpipe.segmenter import choose_device
from segpipe.stopping import stop_on_signals
from segpipe.training.batches import BatchMaker, Prepared, batches
from segpipe.training.dataset import Split, load_samples, split_samples
from segpipe.training.losses import LOSSES
from segpipe.training.report import write_report
from segpipe.training.settings import TrainSettings
from segpipe.training.trainer import Trainer, learning_rate
from segpipe.training.validation import (
    Windows,
    predict_maps,
    rounded,
    score,
    summary,
    tune_decode,
)

log = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.pt"
SELECTED_BY = "mean AP, IoU .50 to .90"
"""The figure by which the best weights are chosen."""
BETWEEN_CHECKPOINTS_S = 60.0


@dataclass
class History:
    """What has been seen so far.

    losses
        Mean loss of the steps since the row before, by step.
    validations
        Figures of the averaged weights, by step.
    """

    losses: dict[int, float] = field(default_factory=dict)
    validations: dict[int, dict[str, float]] = field(default_factory=dict)

    def best(self) -> int | None:
        """The step of the best validation; the first of equals."""
        if not self.validations:
            return None
        return max(self.validations, key=lambda step: self.validations[step][SELECTED_BY])


@dataclass(frozen=True)
class Trained:
    """The outcome of a training."""

    model: Path
    report: Path
    card: ModelCard
    scores: Scores


def train(settings: TrainSettings, *, restart: bool = False) -> Trained:
    """Train as the settings say, from the start or from where it was stopped.

    On CPU the same settings, images and versions give the same weights, with a stop in between or
    without.

    Raises
    ------
    SettingsError, ModelError
        When a setting does not fit, or `output` holds a training of other settings.
    InputError
        When images or masks cannot be used, or the loss is not a number.
    Stopped
        After SIGINT or SIGTERM; the same call goes on.
    """
    if settings.loss.name not in LOSSES:
        raise SettingsError(
            f"loss.name is {settings.loss.name!r}{nearest(settings.loss.name, LOSSES)}; "
            f"expected one of {', '.join(LOSSES)}"
        )
    out = writable_folder(settings.output)
    with locked(out / "training", settings.name):
        torch.set_num_threads(settings.threads or os.cpu_count() or 1)
        card = first_card(settings)
        geometry = model_geometry(card)
        samples = load_samples(settings.data, len(card.channels))
        split = split_samples(samples, settings.data.validation, settings.seed)
        log.info(
            "%d images for training, %d for validation (split %s)",
            *(len(split.training), len(split.validation), split.digest),
        )
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            network = build_network(*card.network_arguments)
        course = Course(
            settings, card, geometry, split, Trainer(network, settings, _device(settings))
        )
        if restart:
            (out / CHECKPOINT).unlink(missing_ok=True)
        course.resume()
        course.run()
        return course.finish()


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


class Course:
    """A training under way."""

    def __init__(
        self,
        settings: TrainSettings,
        card: ModelCard,
        geometry: ModelGeometry,
        split: Split,
        trainer: Trainer,
    ) -> None:
        self.settings, self.card, self.geometry, self.split = settings, card, geometry, split
        self.trainer = trainer
        self.out = settings.output
        self.digest = _digest(settings, split, trainer)
        self.step = 0
        self.history = History()
        self.recent: list[float] = []
        self.best: dict[str, Any] | None = None
        weight = settings.loss.weight_map
        self.training = [Prepared.of(sample, card, weight) for sample in split.training]
        self.validation = [Prepared.of(sample, card, 0.0) for sample in split.validation]

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises
        ------
        SettingsError
            When it is damaged, or of another training.
        """
        path = self.out / CHECKPOINT
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            is_ours = state["digest"] == self.digest
            if is_ours:
                self.trainer.load(state["trainer"])
                self.step, self.recent, self.best = state["step"], state["recent"], state["best"]
                self.history = History(state["losses"], state["validations"])
        except (OSError, *DAMAGED) as error:
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            raise SettingsError(
                f"{path} is damaged ({reason}); begin anew with --restart"
            ) from error
        if not is_ours:
            raise SettingsError(
                f"{path} is of a training with other settings, images or versions of segpipe; give "
                "another output, or begin anew with --restart"
            )
        log.info("going on from step %d", self.step)

    def save(self) -> None:
        """Write the checkpoint; under its name there is always a whole one."""
        state = {
            "digest": self.digest,
            "trainer": self.trainer.state(),
            "step": self.step,
            "recent": self.recent,
            "best": self.best,
            "losses": self.history.losses,
            "validations": self.history.validations,
        }
        path = self.out / CHECKPOINT
        partial = path.with_name(f".{CHECKPOINT}.part")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        write_text(self.out / "history.csv", self._history_csv())

    def run(self) -> None:
        """The steps that are left.

        Raises
        ------
        Stopped
            After SIGINT or SIGTERM, with a checkpoint written.
        """
        course = self.settings.course
        size = next_admissible(self.trainer.network, course.crop)
        maker = BatchMaker(self.training, self.settings, size)
        threads = max(1, (self.settings.threads or os.cpu_count() or 1) // 2)
        saved = time.monotonic()
        with (
            stop_on_signals() as stop,
            tqdm(
                total=course.steps, initial=self.step, unit="step", dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
            ) as bar,
        ):  # fmt: skip
            for batch in batches(maker, self.step, course.steps, threads):
                self.recent.append(self.trainer.step(batch, self.step))
                self.step += 1
                bar.update()
                bar.set_postfix_str(f"loss {np.mean(self.recent[-100:]):.3f}", refresh=False)
                is_due = self.step % course.validate_every == 0 or self.step == course.steps
                if is_due:
                    self._validate()
                if is_due or stop.asked or time.monotonic() - saved > BETWEEN_CHECKPOINTS_S:
                    self.save()
                    saved = time.monotonic()
                if stop.asked:
                    raise Stopped(f"stopped at step {self.step} of {course.steps}")

    def _validate(self) -> None:
        scores = score(self._maps(), self.validation, self.card)
        figures = summary(scores)
        self.history.losses[self.step] = float(np.mean(self.recent))
        self.recent.clear()
        self.history.validations[self.step] = figures
        log.info(
            "step %d: loss %.4f, validation AP .50 %.3f, .90 %.3f, mean %.3f",
            *(self.step, self.history.losses[self.step]),
            *(figures["AP at IoU .50"], figures["AP at IoU .90"], figures[SELECTED_BY]),
        )
        if self.history.best() == self.step:
            averaged = self.trainer.averaged.state_dict()
            self.best = {key: value.detach().cpu().clone() for key, value in averaged.items()}

    def _maps(self) -> list[np.ndarray[Any, Any]]:
        windows = Windows(self.trainer.averaged, self.trainer.device, self.card.outputs)
        return predict_maps(windows, self.geometry, self.validation)

    def finish(self) -> Trained:
        """Tune the thresholds of the best weights, and write model file and report."""
        best = self.history.best()
        if self.best is None or best is None:
            raise InputError("nothing was validated")
        self.trainer.averaged.load_state_dict(self.best)
        maps = self._maps()
        tuned, scores = tune_decode(maps, self.validation, self.card)
        figures: dict[str, float | str] = {
            "measured on": f"{len(self.validation)} validation images with "
            f"{sum(len(np.unique(s.sample.labels)) - 1 for s in self.validation)} objects, on which "
            "weights and thresholds were chosen; pooled over images unless said otherwise",
            **rounded(summary(scores)),
            "split": self.split.digest,
            "trained for": f"{best} steps of {self.settings.course.batch} crops of "
            f"{self.settings.course.crop} px",
        }
        card = tuned.model_copy(
            update={"figures": figures, "object_diameter_px": _diameter(self.training)}
        )
        model = self.out / f"{self.settings.name}{SUFFIX}"
        write_model(model, self.trainer.averaged, card)
        report = self.out / "report.html"
        write_report(report, self.settings, self.history, card, scores, self.validation, maps)
        log.info("wrote %s and %s", model, report)
        return Trained(model, report, card, scores)

    def _history_csv(self) -> str:
        text = io.StringIO()
        names = list(next(iter(self.history.validations.values()), {}))
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", "loss", "learning rate", *names])
        for step, loss in self.history.losses.items():
            figures = self.history.validations.get(step, {})
            rate = learning_rate(self.settings.course, step - 1)
            writer.writerow([step, loss, rate, *(figures.get(name, "") for name in names)])
        return text.getvalue()


def _diameter(training: Sequence[Prepared]) -> float:
    """Median equivalent diameter of the objects, in pixels."""
    areas = [np.bincount(one.sample.labels.ravel())[1:] for one in training]
    sizes = np.concatenate(areas)
    return round(float(np.median(2 * np.sqrt(sizes[sizes > 0] / np.pi))), 1)


def _device(settings: TrainSettings) -> torch.device:
    return choose_device(settings.device)


def _digest(settings: TrainSettings, split: Split, trainer: Trainer) -> str:
    """Of everything that the weights depend on: settings, pixels, labels, device, threads, torch.

    Where files lie is not among it.
    """
    tree = settings.model_dump(mode="json", exclude={"output", "card"})
    tree["data"] = {key: tree["data"][key] for key in ("channel", "validation")}
    made_by = [torch.__version__, trainer.device.type, str(trainer.precision)]
    threads = torch.get_num_threads() if trainer.device.type == "cpu" else 0
    told = json.dumps([__version__, tree, split.digest, made_by, threads], sort_keys=True)
    digest = hashlib.sha256(told.encode())
    for sample in (*split.training, *split.validation):
        digest.update(sample.pixels.tobytes())
        digest.update(sample.labels.tobytes())
    return digest.hexdigest()[:16]
