"""A training as one page: curves, figures, and validation images with their outlines. Offline."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from segpipe.export.comparison import PREDICTED, TRUTH, compare_outlines
from segpipe.export.drawing import Picture, contrast
from segpipe.models.card import ModelCard
from segpipe.records import write_text
from segpipe.training.batches import Prepared
from segpipe.training.history import History
from segpipe.training.settings import TrainSettings
from segpipe.training.validation import Judge

PANELS = 8
PANEL_PX = 512
_WIDTH, _HEIGHT, _EDGE = 520, 220, 44


def write_report(
    path: Path,
    settings: TrainSettings,
    history: History,
    card: ModelCard,
    judge: Judge,
    validation: Sequence[Prepared],
    maps: Sequence[NDArray[np.uint8]],
) -> None:
    """Write the page.

    Parameters
    ----------
    maps
        (K, Y, X) of each validation image.
    """
    curves = {"loss": history.losses}
    for name in judge.curves:
        curves[name] = {step: row[name] for step, row in history.validations.items()}
    figures = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in card.figures.items()
    )
    told = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    decode = yaml.safe_dump(card.decode.model_dump(mode="json"), sort_keys=False)
    write_text(
        path,
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Training of {html.escape(card.name)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em }}
th {{ text-align: left; font-weight: 500; padding-right: 2em; vertical-align: top }}
figure {{ display: inline-block; margin: 0 1em 1em 0; vertical-align: top }}
figcaption {{ font-size: 13px; overflow-wrap: anywhere; max-width: {PANEL_PX}px }}
pre {{ background: #f4f4f4; padding: 1em; overflow: auto }}
</style>
<h1>Training of {html.escape(card.name)}</h1>
<table>{figures}</table>
<h2>Curves</h2>
{"".join(curve_svg(name, points) for name, points in curves.items())}
<h2>Validation images, the worst, the median and the best</h2>
<p>Outlines: white where truth and prediction agree, <span style="color:rgb{TRUTH}">blue</span> of the
truth alone, <span style="color:rgb{PREDICTED}">orange</span> of the prediction alone.</p>
{"".join(_panels(card, judge, validation, maps))}
<h2>Thresholds</h2><pre>{html.escape(decode)}</pre>
<h2>Settings</h2><pre>{html.escape(told)}</pre>
</html>
""",
    )


def curve_svg(name: str, points: Mapping[int, float]) -> str:
    """A curve over steps as an SVG figure with its range on the axes."""
    if not points:
        return ""
    steps, values = list(points), list(points.values())
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    reach = max(steps) or 1
    places = " ".join(
        f"{_EDGE + (_WIDTH - 2 * _EDGE) * step / reach:.1f},"
        f"{_HEIGHT - _EDGE - (_HEIGHT - 2 * _EDGE) * (value - low) / span:.1f}"
        for step, value in points.items()
    )
    return f"""<figure><svg width="{_WIDTH}" height="{_HEIGHT}" role="img"
aria-label="{html.escape(name)} over steps">
<polyline points="{places}" fill="none" stroke="#0072b2" stroke-width="2"/>
<path d="M{_EDGE} {_EDGE}V{_HEIGHT - _EDGE}H{_WIDTH - _EDGE}" fill="none" stroke="#888"/>
<g font-size="12" fill="#444"><text x="2" y="{_EDGE}">{high:.3f}</text>
<text x="2" y="{_HEIGHT - _EDGE}">{low:.3f}</text>
<text x="{_WIDTH - _EDGE}" y="{_HEIGHT - _EDGE + 16}" text-anchor="end">step {reach}</text></g>
</svg><figcaption>{html.escape(name)}</figcaption></figure>
"""


def _panels(
    card: ModelCard,
    judge: Judge,
    validation: Sequence[Prepared],
    maps: Sequence[NDArray[np.uint8]],
) -> list[str]:
    """Figures of the images at evenly spaced ranks of the judge's score."""
    scores = [
        judge.score(one.sample.labels, judge.labels(found, card))
        for one, found in zip(validation, maps, strict=True)
    ]
    order = sorted(range(len(maps)), key=scores.__getitem__)
    ranks = np.unique(np.linspace(0, len(order) - 1, PANELS).round().astype(int))
    figures = []
    for number in (order[rank] for rank in ranks):
        one = validation[number]
        picture = compare_outlines(
            _display(one), one.sample.labels, judge.labels(maps[number], card)
        )
        figures.append(
            f'<figure><img alt="" src="data:image/png;base64,{_png(picture)}" '
            f'width="{min(PANEL_PX, picture.shape[1])}"><figcaption>{html.escape(one.sample.name)}: '
            f"{judge.of_image} {scores[number]:.3f}</figcaption></figure>"
        )
    return figures


def _display(one: Prepared) -> Picture:
    rgb = len(one.sample.pixels) == 3
    return contrast(one.sample.pixels, one.ranges, rgb, gamma=1.0 if rgb else 0.6)


def _png(picture: Picture) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
