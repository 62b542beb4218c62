"""Network, moving average of its weights, optimiser: one step, and a state that resumes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from segpipe.errors import InputError, SettingsError
from segpipe.models.network import Network
from segpipe.training.batch_targets import Targets
from segpipe.training.batches import Batch
from segpipe.training.named_losses import build_loss
from segpipe.training.settings import CourseSettings, TrainSettings

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer:
    """A training between two steps.

    Attributes
    ----------
    network
        What is being trained.
    averaged
        The same network with the moving average of its weights and of batch norm's statistics:
        what is validated and kept.
    """

    def __init__(self, network: Network, settings: TrainSettings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.averaged: Network = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.precision = _precision(settings.precision, device)
        self._loss = build_loss(settings.loss_name, settings.loss.parameters)
        self._optimiser = torch.optim.AdamW(
            _decayed(self.network, settings.course.weight_decay), lr=settings.course.learning_rate
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)

    def step(self, batch: Batch, number: int) -> float:
        """One update, the `number`-th from 0; the loss before it.

        Raises
        ------
        InputError
            When the loss or its gradient is not a number: names the batch. No weight has been changed
            then.
        """
        course = self.settings.course
        torch.manual_seed(self.settings.seed * 1_000_003 + number)  # dropout, the same when resumed
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate(course, number)
        images = batch.images.to(self.device, memory_format=torch.channels_last)
        targets = self._targets(batch)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
            output = self.network.forward_training(images)
        loss = self._loss(output, targets)
        value = float(loss.detach())
        _refuse_unless_finite(value, f"the loss of step {number}", batch)
        self._optimiser.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.unscale_(self._optimiser)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), course.clip)
        if (
            not self._scaler.is_enabled()
        ):  # the scaler leaves such a step out, and lowers its factor
            _refuse_unless_finite(float(norm), f"the gradient of step {number}", batch)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._average(number)
        return value

    def _targets(self, batch: Batch) -> Targets:
        whole = Targets(batch.maps, batch.weights, batch.classes)
        return whole.without_border(self.network.margin).to(self.device)

    @torch.no_grad()
    def _average(self, number: int) -> None:
        # a short memory at first, so that the initial weights are soon forgotten
        decay = min(self.settings.course.averaging, (1 + number) / (10 + number))
        new = self.network.state_dict()
        for key, value in self.averaged.state_dict().items():
            if value.is_floating_point():
                value.lerp_(new[key], 1 - decay)
            else:
                value.copy_(new[key])

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and plain values."""
        return {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.network.load_state_dict(state["network"])
        self.averaged.load_state_dict(state["averaged"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._scaler.load_state_dict(state["scaler"])


def learning_rate(course: CourseSettings, step: int) -> float:
    """Rises evenly during the warm-up, then falls as half a cosine to a thousandth.

    Loshchilov and Hutter 2017, SGDR, arXiv 1608.03983, equation 5, without restarts.
    """
    rising = max(1, round(course.warmup * course.steps))
    if step < rising:
        return course.learning_rate * (step + 1) / rising
    share = (step - rising) / max(1, course.steps - rising)
    return course.learning_rate * max(1e-3, (1 + math.cos(math.pi * share)) / 2)


def _refuse_unless_finite(value: float, what: str, batch: Batch) -> None:
    if not math.isfinite(value):
        raise InputError(
            f"{what} is {value}; its batch was {', '.join(batch.names)}: look at these images and "
            "masks, or lower course.learning_rate"
        )


def _decayed(network: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Kernels decay; biases and batch norm's parameters do not."""
    kernels: list[Tensor] = [p for p in network.parameters() if p.ndim > 1]
    others: list[Tensor] = [p for p in network.parameters() if p.ndim <= 1]
    return [{"params": kernels, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def _precision(name: str, device: torch.device) -> torch.dtype | None:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else None
    if name == "float16" and device.type == "cpu":
        raise SettingsError("precision float16 needs a GPU; use float32 or bfloat16 on CPU")
    return PRECISIONS[name]
