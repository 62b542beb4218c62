"""Where synthetic nuclei lie and how they look, compiled; `segpipe.synthetic` is the way in.

Every number comes from a hash of (seed, stream, coordinates), none from a generator that must be
advanced: any box can be painted alone. Two boxes agree to the byte, on every machine, because all
arithmetic is integer, or one of + - * / and square root, which IEEE 754 rounds alike everywhere.
There is no sin and no exp, and what is summed is summed in the order of the lattice.

    lattice cell --hash---> a group of 1 to 3 nuclei that touch, the first somewhere in its cell
    groups       --thin---> a nucleus too near to one of another group of higher rank is left out
                            (Matern's second hard-core process: one look around, so it is local)
    nucleus      --gauge--> t(y, x): 0 at the centre, 1 on the outline
                            labels: t <= 1, the smallest t takes the pixel
                            light:  a soft edge about t = 1, chromatin inside, haze outside

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014); the landscape is value noise.
Longer than a module should be: numba's cache of a compiled function does not notice a change in
another module, so the functions that call each other stay together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np

SLOTS = 3
"""Nuclei of a group at most, and ids per lattice cell."""

NUCLEUS = np.dtype(
    [(name, np.float64) for name in ("y", "x", "along_y", "along_x", "long", "short")]
    + [(name, np.float64) for name in ("light", "edge", "dome", "grain")]
    + [("id", np.int64), ("key", np.uint64), ("waves", np.float64, (6,))]
)
"""Centre, direction of the long axis, half axes; counts, half width of the soft edge, how much the
rim is darker, contrast of the chromatin; id in the field, hash, cosine and sine of three waves."""

TISSUE = 1  # streams of the hash
_CELL, _CROWD, _LAYER, _FLOW_Y, _FLOW_X, _FIBRE, _SHOT = 2, 3, 4, 5, 6, 7, 8

_HAZE = 9.0  # pixels that light from out of focus reaches beyond an outline
_BULGE = 1.27  # an outline stays within this factor of its ellipse
_ELONGATION = 1.35  # largest long half axis over mean radius
_SOFTEST = 3.6  # largest half width of a soft edge over blur
_GAP = 2.0  # pixels between groups, on the line of their centres
_CONTACT = 1.01  # largest distance of two touching nuclei over the sum of their radii

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A, _MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S8, _S11, _S27, _S30, _S31, _S48 = (np.uint64(n) for n in (8, 11, 27, 30, 31, 48))
_BYTES, _LANES = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0001000100010001)


class Recipe(NamedTuple):
    """What the compiled functions need to know of a field; the names are those of `NucleiField`."""

    seed: int
    rows: int
    columns: int
    spacing: int
    smallest: float
    largest: float
    density: float
    grouped: float  # share of groups of more than one
    structure: float
    bare: float  # level of the landscape up to which there is no tissue
    brightness: float
    background: float
    blur: float
    gain: float  # variance per count
    read_noise: float  # counts


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function) -> _Function:
    # No fastmath: contraction and reordering would let two boxes differ in the last bit.
    return cast(_Function, numba.njit(nogil=True, cache=True)(function))


@_compiled
def _mix(key: Any) -> Any:
    key = (key ^ (key >> _S30)) * _MIX_A
    key = (key ^ (key >> _S27)) * _MIX_B
    return key ^ (key >> _S31)


@_compiled
def _next(key: Any, index: int) -> Any:
    return _mix(key + np.uint64(index) * _GOLDEN)


@_compiled
def _hash(seed: int, stream: int, y: int, x: int) -> Any:
    return _next(_next(_next(np.uint64(seed), stream), y), x)


@_compiled
def _fraction(key: Any) -> float:
    return np.int64(key >> _S11) * 1.1102230246251565e-16  # 2 ** -53


@_compiled
def _number(key: Any, index: int) -> float:
    """The number of `key` at `index`, uniform in [0, 1)."""
    return _fraction(_next(key, index))


@_compiled
def _direction(key: Any, index: int) -> tuple[float, float]:
    """A unit vector from two numbers of `key`; the diagonals are a little favoured."""
    return _unit(_number(key, index) - 0.5, _number(key, index + 1) - 0.5)


@_compiled
def _unit(y: float, x: float) -> tuple[float, float]:
    length = np.sqrt(y * y + x * x)
    if length < 1e-9:
        return 1.0, 0.0
    return y / length, x / length


@_compiled
def _value_noise(key: Any, y: float, x: float) -> float:
    """Smooth noise in [0, 1) with one knot per unit."""
    row, column = int(np.floor(y)), int(np.floor(x))
    v, u = y - row, x - column
    v, u = v * v * (3.0 - 2.0 * v), u * u * (3.0 - 2.0 * u)
    above, below = _next(key, row), _next(key, row + 1)
    left, right = _number(above, column), _number(above, column + 1)
    top = left + (right - left) * u
    left, right = _number(below, column), _number(below, column + 1)
    return top + (left + (right - left) * u - top) * v


@_compiled
def landscape(seed: int, stream: int, y: float, x: float) -> float:
    """Four octaves of value noise in [0, 1), the coarsest with one knot per unit."""
    total, weight = 0.0, 8.0
    for octave in range(4):
        total += weight * _value_noise(_hash(seed, stream, octave, 0), y, x)
        weight *= 0.5
        # Turned by the 3-4-5 triangle, so that the knots of the octaves do not line up.
        y, x = 2.0 * (0.8 * y - 0.6 * x), 2.0 * (0.6 * y + 0.8 * x)
    return total / 15.0


@_compiled
def _crowd(recipe: Recipe, y: float, x: float) -> float:
    """How crowded it is here, in [0, 1]: patches, and thin layers along a contour."""
    y, x = 2.5 * y / recipe.structure, 2.5 * x / recipe.structure
    patch = 0.4 + 3.5 * (landscape(recipe.seed, _CROWD, y, x) - 0.5)
    layer = 1.0 - 20.0 * abs(landscape(recipe.seed, _LAYER, 0.5 * y, 0.5 * x) - 0.5)
    return min(max(patch, layer, 0.0), 1.0)


@_compiled
def _gauge(nucleus: Any, dy: float, dx: float) -> float:
    """0 at the centre, 1 on the outline, in proportion between: an ellipse with waves around it.

    The waves are cosines and sines of 2, 3 and 4 times the angle, which follow from the first.
    """
    along = (dy * nucleus.along_y + dx * nucleus.along_x) / nucleus.long
    across = (dy * nucleus.along_x - dx * nucleus.along_y) / nucleus.short
    radius = np.sqrt(along * along + across * across)
    if radius == 0.0:
        return 0.0
    cosine, sine = along / radius, across / radius
    c, s = cosine, sine
    outline = 1.0
    for wave in range(3):
        c, s = c * cosine - s * sine, s * cosine + c * sine
        outline += nucleus.waves[2 * wave] * c + nucleus.waves[2 * wave + 1] * s
    return float(radius / outline)


@_compiled
def _grow(recipe: Recipe, crowd: float, nucleus: Any) -> None:
    """Give the nucleus, whose centre and key are set, its size, outline and looks."""
    key = nucleus.key
    # Crowded nuclei are small; the mean of two numbers is more often in the middle.
    size = 0.5 * (_number(key, 0) + _number(key, 1)) + 0.9 * (0.5 - crowd)
    radius = recipe.smallest + (recipe.largest - recipe.smallest) * min(max(size, 0.0), 1.0)
    # DNA: most alike, some twice as much; 3 in 200 divide, 6 in 100 are out of focus.
    light = 0.55 + 0.5 * _number(key, 12) + 0.6 * _number(key, 13) * _number(key, 14)
    edge = 2.0 * recipe.blur
    if _number(key, 15) < 0.06:
        light, edge = 0.5 * light, _SOFTEST * recipe.blur
    if _number(key, 2) < 0.015:
        light, radius = 2.6 * light, recipe.smallest
    stretch = 1.0 + (_ELONGATION - 1.0) * _number(key, 3)
    nucleus.long, nucleus.short = radius * stretch, radius / stretch
    # Neighbours lie more or less alike, as along a fibre or around a gland.
    y, x = 2.0 * nucleus.y / recipe.structure, 2.0 * nucleus.x / recipe.structure
    flow_y = _value_noise(_hash(recipe.seed, _FLOW_Y, 0, 0), y, x) - 0.5
    flow_x = _value_noise(_hash(recipe.seed, _FLOW_X, 0, 0), y, x) - 0.5
    turn_y, turn_x = _direction(key, 4)
    nucleus.along_y, nucleus.along_x = _unit(4.0 * flow_y + turn_y, 4.0 * flow_x + turn_x)
    for wave in range(6):
        height = 0.09 / (1.0 + 0.9 * (wave // 2))
        nucleus.waves[wave] = height * (2.0 * _number(key, 6 + wave) - 1.0)
    nucleus.light, nucleus.edge = recipe.brightness * light, edge
    nucleus.dome = 0.1 + 0.35 * _number(key, 16)
    nucleus.grain = 0.25 + 0.5 * _number(key, 17)


@_compiled
def _group(recipe: Recipe, row: int, column: int, group: Any) -> int:
    """Write the nuclei of a lattice cell into the first records of `group`; how many, 0 to 3."""
    key = _hash(recipe.seed, _CELL, row, column)
    y, x = (row + _number(key, 0)) * recipe.spacing, (column + _number(key, 1)) * recipe.spacing
    if y > recipe.rows - 1 or x > recipe.columns - 1:
        return 0
    tissue = landscape(recipe.seed, TISSUE, y / recipe.structure, x / recipe.structure)
    if tissue <= recipe.bare:
        return 0
    crowd = _crowd(recipe, y, x)
    if _number(key, 2) >= recipe.density * (0.15 + 1.35 * crowd):
        return 0
    wanted = 1
    if _number(key, 3) < recipe.grouped:
        wanted = 3 if _number(key, 4) < 0.3 else 2
    first_id = 1 + (row * ((recipe.columns - 1) // recipe.spacing + 1) + column) * SLOTS
    to_y, to_x = _direction(key, 5)
    placed = 0
    for member in range(wanted):
        nucleus = group[placed]
        nucleus.id, nucleus.key = first_id + placed, _next(key, 100 + member)
        nucleus.y, nucleus.x = y, x
        _grow(recipe, crowd, nucleus)
        if member == 2:  # on the other side of the first, so that the second is not met
            side = _number(key, 7) - 0.5
            to_y, to_x = _unit(-to_y - side * to_x, -to_x + side * to_y)
        if member > 0:
            contact = 1.0 / _gauge(group[0], to_y, to_x) + 1.0 / _gauge(nucleus, -to_y, -to_x)
            contact *= _CONTACT - 0.13 * _number(key, 7 + member)
            nucleus.y, nucleus.x = y + contact * to_y, x + contact * to_x
            if (
                not 0.0 <= nucleus.y <= recipe.rows - 1
                or not 0.0 <= nucleus.x <= recipe.columns - 1
            ):
                continue
        placed += 1
    return placed


@_compiled
def _too_near(a: Any, b: Any) -> bool:
    dy, dx = b.y - a.y, b.x - a.x
    distance = np.sqrt(dy * dy + dx * dx)
    if distance == 0.0:
        return True
    if distance > (a.long + b.long) * _BULGE + _GAP:
        return False
    sum_of_radii = distance / _gauge(a, dy, dx) + distance / _gauge(b, -dy, -dx)
    return bool(distance < sum_of_radii + _GAP)


@_compiled
def showing(recipe: Recipe, y0: int, x0: int, y1: int, x1: int) -> Any:
    """The nuclei that can show in the box: (n,) NUCLEUS, in the order of the lattice."""
    spacing = recipe.spacing
    reach = recipe.largest * _ELONGATION * _BULGE
    beyond = max(_HAZE, _SOFTEST * recipe.blur)
    apart = 2.0 * _CONTACT * reach  # from the first of a group to another of it
    near = int((2.0 * (apart + reach) + _GAP) / spacing) + 1  # cells between groups that may meet
    margin = int((apart + reach + beyond) / spacing) + 1 + near
    row0, column0 = max(y0 // spacing - margin, 0), max(x0 // spacing - margin, 0)
    rows = min(y1 // spacing + margin, (recipe.rows - 1) // spacing) + 1 - row0
    columns = min(x1 // spacing + margin, (recipe.columns - 1) // spacing) + 1 - column0
    table = np.empty(rows * columns * SLOTS, NUCLEUS)
    ranks = np.empty(rows * columns, np.uint64)
    start = np.zeros(rows * columns + 1, np.int64)
    for cell in range(rows * columns):
        row, column = row0 + cell // columns, column0 + cell % columns
        ranks[cell] = _hash(recipe.seed, _CELL, row, column)
        start[cell + 1] = start[cell] + _group(recipe, row, column, table[start[cell] :])
    kept = np.zeros(start[-1], np.bool_)
    for cell in range(rows * columns):
        row, column = cell // columns, cell % columns
        for index in range(start[cell], start[cell + 1]):
            a = table[index]
            side = a.long * _BULGE + beyond
            kept[index] = y0 - side < a.y < y1 + side and x0 - side < a.x < x1 + side
            if not kept[index]:
                continue
            for other_row in range(max(row - near, 0), min(row + near + 1, rows)):
                for other_column in range(max(column - near, 0), min(column + near + 1, columns)):
                    other = other_row * columns + other_column
                    if ranks[other] > ranks[cell]:
                        for rival in range(start[other], start[other + 1]):
                            if _too_near(a, table[rival]):
                                kept[index] = False
    return table[: start[-1]][kept]


@_compiled
def _span(centre: float, side: float, origin: int, size: int) -> Any:
    """Indices of an axis of `size` pixels from `origin` that lie within `side` of `centre`."""
    first, last = int(np.floor(centre - side)) - origin, int(np.floor(centre + side)) - origin
    return range(max(first, 0), min(last + 1, size))


@_compiled
def paint_labels(table: Any, y0: int, x0: int, labels: Any) -> None:
    """Give each pixel of `labels` (in place) to the nucleus whose gauge is smallest and <= 1."""
    height, width = labels.shape
    nearest = np.full((height, width), np.inf)
    for nucleus in table:
        side = nucleus.long * _BULGE
        for y in _span(nucleus.y, side, y0, height):
            for x in _span(nucleus.x, side, x0, width):
                gauge = _gauge(nucleus, y0 + y - nucleus.y, x0 + x - nucleus.x)
                if gauge <= 1.0 and gauge < nearest[y, x]:
                    nearest[y, x] = gauge
                    labels[y, x] = nucleus.id


@_compiled
def _chromatin(nucleus: Any, dy: float, dx: float) -> float:
    """Texture inside a nucleus, about 1: coarse and fine grains, in the nucleus's own axes."""
    along = dy * nucleus.along_y + dx * nucleus.along_x
    across = dy * nucleus.along_x - dx * nucleus.along_y
    coarse = _value_noise(nucleus.key, along * 0.16, across * 0.16)
    fine = _value_noise(nucleus.key, along * 0.36 + 1000.0, across * 0.36)
    return float(1.0 + nucleus.grain * (0.9 * (coarse - 0.5) + 0.8 * (fine - 0.5)))


@_compiled
def paint_light(table: Any, y0: int, x0: int, haze: Any, first: Any, second: Any) -> None:
    """Add the haze of all nuclei, and the light of the brightest two at each pixel, in place.

    The sum of two nuclei would hide that they touch, the larger of them would draw a hard line.
    """
    height, width = haze.shape
    for nucleus in table:
        side = nucleus.long * _BULGE + max(_HAZE, nucleus.edge)
        for y in _span(nucleus.y, side, y0, height):
            for x in _span(nucleus.x, side, x0, width):
                dy, dx = y0 + y - nucleus.y, x0 + x - nucleus.x
                distance = np.sqrt(dy * dy + dx * dx)
                if distance >= side:
                    continue
                gauge = _gauge(nucleus, dy, dx)
                outside = -nucleus.short  # pixels beyond the outline, as seen from the centre
                if gauge > 0.0:
                    outside = distance - distance / gauge
                if outside < _HAZE:
                    fading = 1.0 - max(outside, 0.0) / _HAZE
                    haze[y, x] += 0.06 * nucleus.light * fading * fading
                if outside < nucleus.edge:
                    soft = min((nucleus.edge - outside) / (2.0 * nucleus.edge), 1.0)
                    inside = min(gauge, 1.0)
                    light = nucleus.light * soft * soft * (3.0 - 2.0 * soft)
                    light *= 1.0 - nucleus.dome * inside * inside
                    light *= _chromatin(nucleus, dy, dx)
                    if light > first[y, x]:
                        first[y, x], second[y, x] = light, first[y, x]
                    elif light > second[y, x]:
                        second[y, x] = light


@_compiled
def _glow(recipe: Recipe, y: float, x: float) -> float:
    """Light without nuclei: uneven everywhere, more and fibrous where there is tissue."""
    v, u = y / recipe.structure, x / recipe.structure
    tissue = landscape(recipe.seed, TISSUE, v, u) - recipe.bare
    uneven = _value_noise(_hash(recipe.seed, _FIBRE, 9, 0), v / 3.0, u / 3.0)
    fibre = landscape(recipe.seed, _FIBRE, y / 150.0, x / 150.0)
    within = min(max(0.5 + 25.0 * tissue, 0.0), 1.0)
    return recipe.background * (0.7 + 0.3 * uneven + within * (0.2 + 1.2 * fibre * fibre))


@_compiled
def expose(recipe: Recipe, y0: int, x0: int, light: Any, out: Any) -> None:
    """Count light and background with noise: `out` becomes whole numbers in 0..65535, in place."""
    haze, first, second = light
    height, width = out.shape
    knot_y, knot_x = y0 // 8, x0 // 8
    knots = np.empty(((y0 + height - 1) // 8 - knot_y + 2, (x0 + width - 1) // 8 - knot_x + 2))
    for row in range(knots.shape[0]):
        for column in range(knots.shape[1]):
            knots[row, column] = _glow(recipe, 8.0 * (knot_y + row), 8.0 * (knot_x + column))
    shot = _next(np.uint64(recipe.seed), _SHOT)
    variance = recipe.read_noise * recipe.read_noise
    for y in range(height):
        row, v = (y0 + y) // 8 - knot_y, ((y0 + y) % 8) * 0.125
        key = _next(shot, y0 + y)
        for x in range(width):
            column, u = (x0 + x) // 8 - knot_x, ((x0 + x) % 8) * 0.125
            left = knots[row, column] + (knots[row + 1, column] - knots[row, column]) * v
            column += 1
            right = knots[row, column] + (knots[row + 1, column] - knots[row, column]) * v
            signal = left + (right - left) * u + haze[y, x] + first[y, x] + 0.4 * second[y, x]
            # The sum of eight random bytes: normal to the eye, mean 1020, deviation 209.
            chance = _next(key, x0 + x)
            pairs = (chance & _BYTES) + ((chance >> _S8) & _BYTES)
            normal = (np.int64((pairs * _LANES) >> _S48) - 1020) * (1.0 / 209.0)
            value = signal + normal * np.sqrt(recipe.gain * signal + variance)
            out[y, x] = min(max(value + 0.5, 0.0), 65535.0)
