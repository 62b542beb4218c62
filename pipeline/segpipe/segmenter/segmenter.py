"""A model file to a Segmenter; see the package for what the bytes depend on."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segpipe.backend import OPENVINO, choose_backend
from segpipe.errors import ModelError, SettingsError
from segpipe.models.card import ModelCard, nearest
from segpipe.models.geometry import ModelGeometry
from segpipe.models.modelfile import load_model, model_geometry, read_card
from segpipe.segmenter.devices import choose_device, device_type
from segpipe.segmenter.forward import MEMORY_FORMATS, PRECISIONS, Forward, OutOfMemory
from segpipe.segmenter.views import EightViews

logger = logging.getLogger(__name__)


class Segmenter:
    """Callable: windows -> probabilities. One per process and device; made by `load_segmenter`.

    Attributes
    ----------
    context, halo, stride
        Pixels; see `segpipe.models.context` and `segpipe.models.network`.
    margin
        Pixels by which the output is smaller on each side: the network's margin, or the halo where
        only cores are wanted.
    channels
        C, of the windows.
    outputs
        Names of the K outputs.
    exact
        Whether tiling cannot be seen in the result.
    card, device
        The model's card; where it runs.
    batch, batch_used
        Windows in a call of the network: as asked for, and what the memory has allowed so far.
        Where they differ the bytes are no longer those of the plan: record it.
    """

    def __init__(
        self,
        card: ModelCard,
        geometry: ModelGeometry,
        forward: Forward,
        device: str,
        *,
        batch: int,
        margin: int,
    ) -> None:
        self.context: int = geometry.context
        self.halo: int = geometry.halo
        self.stride: int = geometry.stride
        self.margin: int = margin
        self.exact: bool = geometry.exact
        self.channels: int = len(card.channels)
        self.outputs: tuple[str, ...] = card.outputs
        self.card = card
        self.device = device
        self.batch = self.batch_used = batch
        self._geometry = geometry
        self._forward = forward

    @property
    def made_by(self) -> str:
        """What the bytes depend on besides image, model and settings: library, device, batch used."""
        return f"{self._forward.made_by}, batch {self.batch_used}"

    def __call__(self, windows: NDArray[np.float32], /) -> NDArray[np.float32]:
        """Probabilities of what lies `margin` inside: (N, K, H - 2 margin, W - 2 margin) in [0, 1].

        The sigmoid of each output, or the softmax over them where the card's outputs are classes.

        Parameters
        ----------
        windows
            (N, C, H, W) float32, normalised; any N of at least 1; larger than the margins.

        Raises
        ------
        ModelError
            When the windows' channels or shape are not ones that the network takes.
        SettingsError
            When a single window is too large for the GPU's memory.
        """
        self._check(windows)
        outputs: list[NDArray[np.float32]] = []
        done = 0
        while done < len(windows):
            group = windows[done : done + self.batch_used]
            try:
                outputs.append(self._probabilities(group))
            except OutOfMemory as error:
                self._halve_batch(group.shape[-2:], error)
                continue
            done += len(group)
        return np.concatenate(outputs)

    def _check(self, windows: NDArray[np.float32]) -> None:
        if windows.ndim != 4 or len(windows) < 1 or min(windows.shape[2:]) <= 2 * self.margin:
            raise ValueError(
                f"windows of shape {windows.shape}; expected (N, C, H, W), larger than the margins "
                f"of {self.margin}"
            )
        if windows.shape[1] != self.channels:
            raise ModelError(
                f"the image has {windows.shape[1]} channels, model {self.card.name} takes "
                f"{self.channels} ({', '.join(self.card.channels)}); choose with --channel"
            )
        for size in windows.shape[2:]:
            if not self._geometry.admissible(size):
                raise ModelError(
                    f"model {self.card.name} takes no window of {size} pixels; "
                    f"the next size up is {self._geometry.next_admissible(size)}"
                )

    def _probabilities(self, group: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities of at most `batch_used` windows, computed as exactly `batch_used`."""
        filled = np.zeros((self.batch_used, *group.shape[1:]), np.float32)
        filled[: len(group)] = group
        return self._forward(filled)[: len(group)]

    def _halve_batch(self, shape: tuple[int, ...], error: OutOfMemory) -> None:
        if self.batch_used == 1:
            raise SettingsError(
                f"one window of {shape[0]} x {shape[1]} pixels does not fit the memory of "
                f"{self.device}; set tile.core to a smaller multiple of {self.stride}, "
                "or use --device cpu"
            ) from error
        self.batch_used //= 2
        logger.warning(
            "%s ran out of memory; going on with batches of %d instead of %d windows",
            self.device,
            self.batch_used,
            self.batch,
        )


def load_segmenter(
    model: Path,
    device: str = "auto",
    *,
    threads: int = 1,
    batch: int = 1,
    memory_format: str = "channels_last",
    precision: str = "float32",
    backend: str = "auto",
    core_only: bool = False,
    tta: bool = False,
) -> Segmenter:
    """The segmenter of a model file.

    Parameters
    ----------
    model
        See `segpipe.models.modelfile.find_model`.
    device
        "auto" (CUDA, else MPS, else CPU), "cpu", "cuda", "cuda:1", "mps".
    threads
        Of the network on CPU; part of the numeric plan, not taken from the environment.
    batch
        Windows in each call of the network.
    memory_format
        "channels_last" or "contiguous", for the eager backend.
    precision
        "float32", or "float16" or "bfloat16" where that is enough. float16 needs a GPU.
    backend
        See `segpipe.backend`.
    core_only
        Whether the outputs of a window's halo are not wanted, so that they need not be computed:
        the segmenter's margin is then its halo, and else the network's margin.
    tta
        Whether probabilities are the mean over eight views of each window: see
        `segpipe.segmenter.views`.

    Raises
    ------
    ModelError
        When the file is not a usable model, or the backend cannot run its network.
    SettingsError
        When the device is not there, or a setting is not one of those above.
    """
    kind = device_type(device)
    for name, value in (("threads", threads), ("batch", batch)):
        if value < 1:
            raise SettingsError(f"{name} is {value}; expected at least 1")
    _check_setting("memory_format", memory_format, MEMORY_FORMATS)
    _check_setting("precision", precision, PRECISIONS)
    if precision == "float16" and kind == "cpu":
        raise SettingsError("precision float16 needs a GPU; use float32 or bfloat16 on CPU")
    chosen = choose_backend(backend, on_gpu=kind != "cpu")
    card = read_card(model)
    geometry = model_geometry(card)
    margin = geometry.halo if core_only else geometry.margin
    forward: Forward
    if chosen == OPENVINO:
        from segpipe.segmenter.openvino import load_openvino

        place = kind
        forward = load_openvino(
            model,
            halo=margin,
            batch=batch,
            classes=card.classes,
            threads=threads,
            precision=precision,
        )
    else:
        from segpipe.segmenter.eager import Eager

        network, _ = load_model(model)
        chosen_device = choose_device(device)
        place = str(chosen_device)
        forward = Eager(
            network,
            chosen_device,
            halo=margin,
            classes=card.classes,
            threads=threads,
            memory_format=memory_format,
            precision=precision,
        )
    if tta:
        forward = EightViews(forward)
    return Segmenter(card, geometry, forward, place, batch=batch, margin=margin)


def _check_setting(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise SettingsError(
            f"{name} is {value!r}{nearest(value, known)}; expected one of {', '.join(known)}"
        )
