"""Progress of a run: a bar with rate and time left on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType

from tqdm import tqdm

WEIGHT = {"tile": 2, "infer": 40, "stitch": 3, "measure": 1}
"""Rough shares of the work, so that the bar moves evenly; nothing else depends on them."""


class ProgressBar:
    """One bar over all images and stages; silent where stderr is not a terminal.

    Parameters
    ----------
    pixels
        Pixels of each stage that the run will pass.
    """

    def __init__(self, pixels: dict[str, int]) -> None:
        self._lock = threading.Lock()
        self._passed = 0
        self._weights = {stage: WEIGHT[stage] for stage in pixels}
        heaviest = max(pixels, key=lambda stage: WEIGHT[stage], default="infer")
        self._total = sum(WEIGHT[stage] * count for stage, count in pixels.items())
        # The unit is a pixel of the heaviest stage: the rate that people compare.
        self._unit = self._total / max(1, pixels.get(heaviest, 1))
        self._bar = tqdm(
            total=self._total / self._unit / 1e6,
            unit="Mpx",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.05,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} Mpx, {rate_noinv_fmt}, "
            "{remaining} left",
        )

    def start(self, image: str, stage: str) -> None:
        """Name what is at work."""
        with self._lock:
            self._bar.set_description_str(f"{image[-30:]} {stage} ")

    def advance(self, image: str, stage: str, pixels: int) -> None:
        """Count pixels that a stage has passed."""
        with self._lock:
            self._bar.update(pixels * self._weights.get(stage, 0) / self._unit / 1e6)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()


class BarHandler(logging.Handler):
    """Writes log lines above the bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_stderr() -> None:
    """Show INFO and above of segpipe, above the bar."""
    logger = logging.getLogger("segpipe")
    if not logger.handlers:
        handler = BarHandler()
        if sys.stderr.isatty():
            handler.setFormatter(logging.Formatter("%(message)s"))
        else:
            handler.setFormatter(
                logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
            )
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
