"""A training under way: its steps, validations and checkpoints, and what it leaves at the end.

output/checkpoint.pt        network, averaged weights, optimiser, step, history, best so far
output/history.csv          step, loss, learning rate, validation figures
output/<name>.safetensors   the best averaged weights, with the card
output/report.html          curves and validation overlays
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from segpipe import __version__
from segpipe.errors import InputError, SettingsError, Stopped
from segpipe.models.card import ModelCard
from segpipe.models.context import next_admissible
from segpipe.models.foreign import DAMAGED
from segpipe.models.geometry import ModelGeometry
from segpipe.models.modelfile import SUFFIX, find_model, model_hash, write_model
from segpipe.models.network import Network
from segpipe.records import write_text
from segpipe.stopping import stop_on_signals
from segpipe.training.batches import BatchMaker, Prepared, batches
from segpipe.training.dataset import Split
from segpipe.training.history import History
from segpipe.training.judging_classes import Classes
from segpipe.training.judging_objects import Objects
from segpipe.training.report import write_report
from segpipe.training.settings import TrainSettings
from segpipe.training.trainer import Trainer
from segpipe.training.validation import Judge, Windows, predict_maps, rounded
from segpipe.training.weights import Weighing
from segpipe.whole_file import replacing

log = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.pt"
HISTORY = "history.csv"
BETWEEN_CHECKPOINTS_S = 60.0


@dataclass(frozen=True)
class Trained:
    """The outcome of a training; figures are those of the card before they are rounded."""

    model: Path
    report: Path
    card: ModelCard
    figures: dict[str, float]


class Course:
    """A training under way."""

    def __init__(
        self,
        settings: TrainSettings,
        card: ModelCard,
        geometry: ModelGeometry,
        split: Split,
        trainer: Trainer,
        weighing: Weighing,
    ) -> None:
        self.settings, self.card, self.geometry, self.split = settings, card, geometry, split
        self.trainer = trainer
        self.judge: Judge = Classes() if card.classes else Objects()
        self.out = settings.output
        self.digest = _digest(settings, split, trainer)
        self.step = 0
        self.history = History()
        self.recent: list[float] = []
        self.best: dict[str, Any] | None = None
        self.training = [Prepared.of(sample, card, weighing) for sample in split.training]
        self.validation = [Prepared.of(sample, card, Weighing()) for sample in split.validation]

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
        # A file and not its name, which torch would write into it.
        with replacing(self.out / CHECKPOINT) as partial, partial.open("wb") as file:
            torch.save(state, file)
        self._write_history()

    def _write_history(self) -> None:
        write_text(self.out / HISTORY, self.history.to_csv(self.settings.course))

    def run(self) -> None:
        """The steps that are left.

        Raises
        ------
        Stopped
            After SIGINT or SIGTERM, with a checkpoint written.
        """
        course = self.settings.course
        size = input_size(self.trainer.network, course.crop)
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
        figures = self.judge.figures(self._maps(), self.validation, self.card)
        self.history.losses[self.step] = float(np.mean(self.recent))
        self.recent.clear()
        self.history.validations[self.step] = figures
        followed = ", ".join(f"{name} {figures[name]:.3f}" for name in self.judge.curves)
        loss = self.history.losses[self.step]
        log.info("step %d: loss %.4f; validation: %s", self.step, loss, followed)
        if self.history.best(self.judge.selected_by) == self.step:
            averaged = self.trainer.averaged.state_dict()
            self.best = {key: value.detach().cpu().clone() for key, value in averaged.items()}

    def _maps(self) -> list[np.ndarray[Any, Any]]:
        windows = Windows(self.trainer.averaged, self.trainer.device, self.card)
        return predict_maps(windows, self.geometry, self.validation)

    def finish(self) -> Trained:
        """Tune the thresholds of the best weights, and write model file and report."""
        best = self.history.best(self.judge.selected_by)
        if self.best is None or best is None:
            raise InputError("nothing was validated")
        self._write_history()  # a kill between checkpoint and history leaves an older one
        self.trainer.averaged.load_state_dict(self.best)
        maps = self._maps()
        tuned = self.judge.tuned(maps, self.validation, self.card)
        found = self.judge.figures(maps, self.validation, tuned)
        course = self.settings.course
        size = input_size(self.trainer.network, course.crop) - 2 * self.trainer.network.margin
        figures: dict[str, float | str] = {
            "measured on": f"{len(self.validation)} validation images with "
            f"{self.judge.extent(self.validation)}, on which weights and thresholds were chosen; pooled "
            "over images unless said otherwise",
            **rounded(found),
            "split": self.split.digest,
            "trained for": f"{best} steps of {course.batch} crops of {size} px",
        }
        if self.settings.start is not None:
            start = find_model(self.settings.start)
            figures["trained from"] = f"{start.stem}, {model_hash(start)}"
        diameter = None if self.card.classes else _diameter(self.training)
        card = tuned.model_copy(update={"figures": figures, "object_diameter_px": diameter})
        model = self.out / f"{self.settings.name}{SUFFIX}"
        write_model(model, self.trainer.averaged, card)
        report = self.out / "report.html"
        write_report(report, self.settings, self.history, card, self.judge, self.validation, maps)
        log.info("wrote %s and %s", model, report)
        return Trained(model, report, card, found)


def input_size(network: Network, crop: int) -> int:
    """Pixels a side of the network's input for which it gives `crop` pixels or more."""
    return next_admissible(network, crop + 2 * network.margin)


def _diameter(training: Sequence[Prepared]) -> float:
    """Median equivalent diameter of the objects, in pixels."""
    areas = []
    for one in training:
        ids, pixels = np.unique(one.sample.labels, return_counts=True)
        areas.append(pixels[ids > 0])
    return round(float(np.median(2 * np.sqrt(np.concatenate(areas) / np.pi))), 1)


def _digest(settings: TrainSettings, split: Split, trainer: Trainer) -> str:
    """Of everything that the weights depend on: settings, pixels, labels, device, threads, torch.

    Where files lie is not among it.
    """
    tree = settings.model_dump(mode="json", exclude={"output", "card"})
    tree["data"] = {key: tree["data"][key] for key in ("channel", "validation")}
    if tree["start"] is not None:
        tree["start"] = model_hash(find_model(tree["start"]))
    made_by = [torch.__version__, trainer.device.type, str(trainer.precision)]
    threads = torch.get_num_threads() if trainer.device.type == "cpu" else 0
    told = json.dumps([__version__, tree, split.digest, made_by, threads], sort_keys=True)
    digest = hashlib.sha256(told.encode())
    for sample in (*split.training, *split.validation):
        digest.update(sample.pixels.tobytes())
        digest.update(sample.labels.tobytes())
    return digest.hexdigest()[:16]
