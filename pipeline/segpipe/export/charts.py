"""Small charts as SVG: no script, no style that a content policy would stop. All text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 460, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 38


def histogram_svg(edges: Sequence[float], counts: Sequence[int], title: str, axis: str) -> str:
    """Bars over bins, which stand side by side whatever their width.

    Parameters
    ----------
    edges
        One more than `counts`, rising.
    axis
        What they measure, with its unit.
    """
    if not counts:
        return ""
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    step, most = wide / len(counts), max(counts) or 1
    bars = "".join(
        f'<rect x="{_LEFT + place * step + 0.5:.1f}" y="{_TOP + high * (1 - count / most):.1f}" '
        f'width="{max(step - 1, 0.5):.1f}" height="{high * count / most:.1f}">'
        f"<title>{edges[place]:.3g} to {edges[place + 1]:.3g}: {count:,}</title></rect>"
        for place, count in enumerate(counts)
    )
    every = max(1, -(-len(edges) // 8))
    marks = "".join(
        f'<text x="{_LEFT + place * step:.1f}" y="{_HEIGHT - _BOTTOM + 15}" '
        f'text-anchor="middle">{edges[place]:.3g}</text>'
        for place in range(0, len(edges), every)
    )
    return _chart(title, f'<g class="bars">{bars}</g>{marks}', axis, f"{most:,}")


def lines_svg(first: float, others: Sequence[float], title: str, axis: str) -> str:
    """One value against its peers: a mark among bars, all from zero.

    Parameters
    ----------
    first
        Drawn strong, at the left.
    """
    if not others:
        return ""
    values = [first, *others]
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    step, most = wide / len(values), max(values) or 1.0
    bars = "".join(
        f'<rect class="{"seam" if place == 0 else "other"}" x="{_LEFT + place * step + 1.5:.1f}" '
        f'y="{_TOP + high * (1 - value / most):.1f}" width="{step - 3:.1f}" '
        f'height="{high * value / most:.1f}"><title>{value:.2%}</title></rect>'
        for place, value in enumerate(values)
    )
    mean = _TOP + high * (1 - sum(others) / len(others) / most)
    line = f'<path class="mean" d="M{_LEFT} {mean:.1f}H{_WIDTH - _RIGHT}"/>'
    marks = (
        f'<text x="{_LEFT + step / 2:.1f}" y="{_HEIGHT - _BOTTOM + 15}" '
        'text-anchor="middle">seam</text>'
    )
    return _chart(title, f"{bars}{line}{marks}", axis, f"{most:.2%}")


def _chart(title: str, inside: str, axis: str, most: str) -> str:
    low = _HEIGHT - _BOTTOM
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>{inside}'
        f'<path class="axis" d="M{_LEFT} {_TOP}V{low}H{_WIDTH - _RIGHT}"/>'
        f'<text x="{_LEFT - 5}" y="{_TOP + 9}" text-anchor="end">{escape(most)}</text>'
        f'<text x="{_LEFT - 5}" y="{low}" text-anchor="end">0</text>'
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" '
        f'text-anchor="middle">{escape(axis)}</text></svg>'
    )
