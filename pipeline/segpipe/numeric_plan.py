"""The numeric plan: from settings, model and image; what is left open is decided once per OUT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from segpipe.backend import choose_backend
from segpipe.choosing import AUTO_MODELS, Choice
from segpipe.errors import SettingsError
from segpipe.geometry import TileGrid, ceil_to
from segpipe.inputs import Input
from segpipe.models.modelfile import find_model, model_hash
from segpipe.records import read_json, write_json
from segpipe.segmenter import device_type
from segpipe.settings import AUTO, Settings
from segpipe.stages.emptiness import skips_glass
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

REGION_ON_CPU, REGION_ON_GPU = 2048, 4096
"""Pixels a side of a region, where the settings do not say it."""
LARGE_PLANE = 2**31
"""Pixels from which regions are those of a GPU on a CPU too: a shard is a file, and file systems of
clusters count them. At 10 gigapixels regions of 2048 make 6,500 files that stay, of 4096 1,800."""


class Plans:
    """Numeric plans of the images of one OUT."""

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


def _on_gpu(settings: Settings) -> bool:
    """Whether the network is to run on a GPU, be it that of another machine."""
    if settings.infer.device != "auto":
        return settings.infer.device != "cpu"
    return device_type("auto") != "cpu"
