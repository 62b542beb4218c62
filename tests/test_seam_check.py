"""Seams that are planted show; where there are none, none are seen."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.measure import label

import segpipe.stages.measure as measure_stage
from fields import CORE, nuclei, run
from segpipe.geometry import Box, Lattice
from segpipe.properties import merge_rows, sum_region
from segpipe.seam_check import NO_SEAMS, NONE_SEEN, SUSPICIOUS, TOO_LITTLE, check_seams
from segpipe.seam_sums import (
    KINDS,
    LEAST_SHIFTS,
    MARGIN,
    PIECE,
    SHIFTS,
    ObjectDistances,
    SeamLattice,
    add_sums,
    line_sums,
    seam_lattices,
)
from segpipe.synthetic import NucleiField

CELL = 256


def compact(labels):
    """The same objects under ids 1..n."""
    present = np.zeros(int(labels.max()) + 1, np.uint32)
    present[labels.ravel()] = 1
    present[0] = 0
    return (np.cumsum(present, dtype=np.uint32) * present)[labels]


def pieces_of(labels):
    """Every 4-connected piece of an object under an id of its own."""
    return label(labels, background=0, connectivity=1).astype(np.uint32)


def summed(labels, lattices, region):
    """Sums over regions, as the stage makes them."""
    whole = Box(0, 0, *labels.shape)
    parts = []
    for one in Lattice(labels.shape, region):
        at = one.box.grow(MARGIN).intersect(whole)
        parts.append(line_sums(labels[at.slices], at, one.box, lattices))
    return add_sums(parts)


def check(labels, cell=(CELL, CELL), region=None, stride=16):
    lattices = seam_lattices(labels.shape, {"tiles": cell}, stride)
    objects = ObjectDistances(lattices)
    box = Box(0, 0, *labels.shape)
    rows = merge_rows(sum_region(labels, np.zeros(labels.shape, np.uint8), box))
    for part in np.array_split(rows, 3):
        area = part["area"].astype(float)
        objects.add(part["sum_y"] / area, part["sum_x"] / area, area)
    region = region or tuple(2 * side for side in cell)
    return check_seams(lattices, summed(labels, lattices, region), objects)


@pytest.fixture(scope="module")
def field():
    """Truth of a field: what tiling that is exact would give."""
    made = NucleiField((2000, 1900), seed=5, spacing=20, touching=0.6, empty=0.2)
    return compact(made.labels(made.box))


def seams_of(labels):
    for axis, view in enumerate((labels, labels.T)):
        for line in range(CELL, labels.shape[axis], CELL):
            yield view, line


def erased(labels, share, rng):
    """One pixel of each line is lost, of a share of the objects."""
    cut = labels.copy()
    chosen = rng.random(int(labels.max()) + 1) < share
    for view, line in seams_of(cut):
        view[line][chosen[view[line]]] = 0
    return pieces_of(cut)


def by_tile(labels, share, rng):
    """Each tile numbers its own objects, and a share of them is not joined."""
    y, x = np.indices(labels.shape, sparse=True)
    tile = (y // CELL) * 10 + x // CELL
    chosen = (rng.random(int(labels.max()) + 1) < share)[labels] & (labels > 0)
    return compact(np.where(chosen, labels.astype(np.int64) * 100 + tile, labels))


def fused(labels, *_):
    """What touches across a seam becomes one."""
    ones, others = [], []
    for view, line in seams_of(labels):
        touch = (view[line - 1] > 0) & (view[line] > 0)
        ones.append(view[line - 1][touch])
        others.append(view[line][touch])
    one, other = np.concatenate(ones), np.concatenate(others)
    count = int(labels.max()) + 1
    graph = coo_array((np.ones(len(one)), (one, other)), shape=(count, count))
    _, joined = connected_components(graph, directed=False)
    return compact(np.where(labels > 0, joined[labels] + 1, 0))


def lost(labels, share, rng):
    """A share of the objects on seams is dropped."""
    gone = np.zeros(int(labels.max()) + 1, bool)
    for view, line in seams_of(labels):
        gone[view[line][view[line - 1] == view[line]]] = True
    gone &= rng.random(len(gone)) < share
    gone[0] = False
    return compact(np.where(gone[labels], 0, labels))


@pytest.mark.parametrize(
    ("plant", "share"),
    [(erased, 1), (erased, 0.1), (by_tile, 1), (by_tile, 0.05), (fused, 1), (lost, 1), (lost, 0.5)],
)
def test_planted_seams_show(field, plant, share):
    found = check(plant(field, share, np.random.default_rng(1)))
    assert found.verdict == SUSPICIOUS and found.p < 1e-3, found.to_json()
    assert "seams of tiles" in found.loudest()


def test_what_the_whole_gives_shows_none(field):
    found = check(field)
    assert found.verdict == NONE_SEEN, found.to_json()
    (tiles,) = found.lattices
    assert tiles.least_cut is not None and tiles.least_cut < 0.1
    assert len(tiles.elsewhere_share) == SHIFTS // 2  # half a cell


def test_ids_do_not_matter(field):
    shuffled = np.random.default_rng(3).permutation(int(field.max())).astype(np.uint32) + 1
    renamed = np.r_[np.uint32(0), shuffled][field]
    lattices = seam_lattices(field.shape, {"tiles": (CELL, CELL)}, 16)
    np.testing.assert_array_equal(
        summed(renamed, lattices, (512, 512)), summed(field, lattices, (512, 512))
    )


def test_alarms_are_rare_where_the_lattice_is_laid_anywhere(field):
    """Of 60 lattices over fields and random shapes none alarms, and small p are as rare as said."""
    rng = np.random.default_rng(11)
    smooth = ndimage.gaussian_filter(rng.standard_normal((1300, 1300)), 5)
    blobs = ndimage.label(smooth > 0.6 * smooth.std())[0].astype(np.uint32)
    every, verdicts = [], []
    for number in range(60):
        source = (field, blobs)[number % 2]
        height, width = rng.integers(500, 900, 2)
        y, x = (rng.integers(0, n - m) for n, m in zip(source.shape, (height, width), strict=True))
        cell = int(rng.choice([128, 256, 320]))
        found = check(compact(source[y : y + height, x : x + width]), (cell, cell))
        verdicts.append(found.verdict)
        every += [one.p for tiles in found.lattices for one in tiles.figures if one.z]
    assert SUSPICIOUS not in verdicts
    assert verdicts.count(NONE_SEEN) > 30
    p = np.array(every)
    assert len(p) > 250
    assert (p < 0.05).mean() < 0.1 and (p < 0.01).mean() < 0.03
    assert (p < 0.3).mean() > 0.1  # nor is everything called chance


# --- sums -----------------------------------------------------------------------------------------


def plain_sums(labels, lattice):
    """Word by word: for each seam and piece the pixels that count on each of its lines."""
    told = {kind: [] for kind in KINDS}
    for axis in (0, 1):
        view = labels if axis == 0 else labels.T
        height, width = view.shape
        cell, step = lattice.cell[axis], lattice.step[axis]
        for seam in range(cell, height, cell):
            lines = [
                seam + shift * step
                for shift in range(SHIFTS + 1)
                if shift * step <= cell // 2 and seam + shift * step + 1 < height
            ]
            if len(lines) <= LEAST_SHIFTS:
                continue
            for left in range(0, width, PIECE):
                for kind, offset in zip(KINDS, (-1, 0, 1, 0), strict=True):
                    counts = []
                    for line in lines:
                        count = 0
                        for x in range(left, min(left + PIECE, width)):
                            a, b = view[line + offset - 1, x], view[line + offset, x]
                            touching = a != 0 and b != 0
                            count += a != b and touching == (kind == "contacts")
                        counts.append(count)
                    told[kind].append(counts)
    return told


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**32 - 1), st.tuples(st.integers(20, 70), st.integers(20, 70)))
def test_sums_are_those_of_plain_loops(seed, shape):
    rng = np.random.default_rng(seed)
    labels = compact(ndimage.zoom(rng.integers(0, 4, (12, 12)), (6, 6), order=0))
    labels = labels[: shape[0], : shape[1]]
    lattice = SeamLattice("tiles", labels.shape, (16, 20), (2, 1))
    expected = plain_sums(labels, lattice)
    sums = summed(labels, [lattice], labels.shape)[0]
    for place, kind in enumerate(KINDS):
        pieces = [np.array(counts, float) for counts in expected[kind]]
        assert sums[place]["seam"] == sum(one[0] for one in pieces)
        assert sums[place]["pieces"] == len(pieces)
        moments = [(one.mean(), one.var(), ((one - one.mean()) ** 3).mean()) for one in pieces]
        totals = np.sum(moments, axis=0) if pieces else np.zeros(3)
        for name, total in zip(("expected", "variance", "third"), totals, strict=True):
            np.testing.assert_allclose(sums[place][name], total, atol=1e-9)
        for shift in range(SHIFTS + 1):
            there = sum(one[shift] for one in pieces if len(one) > shift)
            assert sums[place]["counts"][shift] == there


def test_regions_of_whole_cells_and_pieces_give_the_same_sums(field):
    part = field[:1300, :1100]
    lattices = seam_lattices(part.shape, {"tiles": (CELL, CELL)}, 16)
    whole = summed(part, lattices, part.shape)
    for region in ((256, 256), (512, 768), (1024, 256)):
        found = summed(part, lattices, region)
        for name in whole.dtype.names:
            np.testing.assert_allclose(found[name], whole[name], rtol=1e-12)


def test_objects_are_counted_by_the_distance_from_the_nearest_inner_seam():
    lattice = SeamLattice("tiles", (300, 100), (100, 100), (1, 1))
    objects = ObjectDistances([lattice])
    y = np.array([98.0, 99.5, 100.0, 149.0, 150.0, 30.0, 299.0])
    objects.add(y, np.full(len(y), 50.0), np.full(len(y), 12.0))
    counts = objects.bins[0][0]["objects"]
    # the seam at 100 is half a pixel above the centre of row 100; 30 belongs to no seam, and 299 is
    # beside the border; 149.0 is the last before the middle, which goes to the next seam
    assert {int(d) - 50: int(counts[d]) for d in np.flatnonzero(counts)} == {
        -50: 1,
        -2: 1,
        0: 2,
        49: 1,
    }
    assert not objects.bins[0][1]["objects"].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (3, 3), (257, 5), (300, 258)])
def test_thin_and_small_images(shape):
    labels = np.ones(shape, np.uint32)
    found = check(labels)
    small = shape[0] <= CELL and shape[1] <= CELL
    assert found.verdict == (NO_SEAMS if small else TOO_LITTLE)
    json.dumps(found.to_json(), allow_nan=False)
    assert check(np.zeros(shape, np.uint32)).verdict in (NO_SEAMS, TOO_LITTLE)


# --- in the stage ---------------------------------------------------------------------------------


def test_predict_tells_it_and_warns_of_planted_seams(tmp_path, monkeypatch, caplog):
    image = nuclei(tmp_path / "field.tif", (700, 620))
    assert run(image, tmp_path / "out").exit_code == 0
    told = json.loads((tmp_path / "out" / "run.json").read_text())["images"]["field"]
    assert told["seam_check"]["verdict"] == NONE_SEEN, told["seam_check"]
    assert [one["name"] for one in told["seam_check"]["lattices"]] == ["tiles", "regions"]
    assert "seams show" not in caplog.text
    read_box = measure_stage.read_box

    def cut(path, box, *planes):
        pixels = read_box(path, box, *planes)
        if path.parent.name == "instances" and path.name == "0":
            pixels[np.arange(box.y0, box.y1) % CORE == 0] = 0
        return pixels

    monkeypatch.setattr(measure_stage, "read_box", cut)
    assert run(image, tmp_path / "out", "stitch.min_area=30").exit_code == 0
    told = json.loads((tmp_path / "out" / "run.json").read_text())["images"]["field"]
    assert told["seam_check"]["verdict"] == SUSPICIOUS
    assert "field: seams show in the result: edges" in caplog.text


def test_the_border_of_a_mask_is_no_seam(field):
    """A mask that ends on a line of tiles cuts objects along it; the tiling did not."""
    inside = np.zeros(field.shape, bool)
    inside[: 4 * CELL] = True
    masked = np.where(inside, field, 0).astype(np.uint32)
    lattices = seam_lattices(field.shape, {"tiles": (CELL, CELL)}, 16)
    box = Box(0, 0, *field.shape)
    nothing = ObjectDistances(lattices)
    for known, verdict in ((None, SUSPICIOUS), (inside, NONE_SEEN)):
        sums = add_sums([line_sums(masked, box, box, lattices, known)])
        assert check_seams(lattices, sums, nothing).verdict == verdict
