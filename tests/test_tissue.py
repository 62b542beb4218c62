"""Bare glass and what lies outside a user's mask are left out, and nobody misses an object."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from fields import SIZES, labels_of, nuclei, run
from segpipe.errors import SettingsError
from segpipe.export.report import Slide
from segpipe.geometry import TileGrid
from segpipe.mask_polygons import parse_geojson
from segpipe.models.modelfile import load_model, write_model
from segpipe.occupancy import GLASS, cell_extremes, glass_tiles, tile_density
from segpipe.plan import plan_job
from segpipe.plan_text import plan_text
from segpipe.settings import load_settings


def section(shape=(320, 448), seed=0):
    """H&E as it lies on glass: (Y, X, 3) uint8, unevenly lit; tissue with nuclei at the left."""
    rng = np.random.default_rng(seed)
    glass = np.array([236.0, 234.0, 238.0]) - 4 * np.linspace(0, 1, shape[1])[None, :, None]
    pixels = np.broadcast_to(glass, (*shape, 3)).copy()
    pixels[:, :150] *= [0.93, 0.75, 0.86]
    y, x = np.indices(shape)
    for _ in range(40):
        centre = rng.uniform((8, 8), (shape[0] - 8, 140))
        pixels[np.hypot(y - centre[0], x - centre[1]) < rng.uniform(3, 6)] = [95, 60, 130]
    return np.clip(pixels + rng.normal(0, 1.5, pixels.shape), 0, 255).astype(np.uint8)


def density_of(pixels, core=64, halo=16):
    channels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    grid = TileGrid(channels.shape[1:], core, halo, 16)
    return tile_density(cell_extremes(channels, core), core, grid), grid


def test_glass_is_left_out_and_every_tile_near_tissue_is_not():
    pixels = section()
    density, grid = density_of(pixels)
    glass = glass_tiles(density)
    assert glass.sum() >= 10
    for tile in grid:
        inside = pixels[tile.read.slices].astype(float)
        if (inside[..., 1] < 190).any():
            assert not glass[tile.index]


@pytest.mark.parametrize("radius", [2.5, 4, 12])
@pytest.mark.parametrize("place", [(160, 300), (129, 257), (200, 380)])
def test_a_single_nucleus_on_glass_keeps_its_tile(radius, place):
    pixels = section()
    y, x = np.indices(pixels.shape[:2])
    pixels[np.hypot(y - place[0], x - place[1]) < radius] = [150, 120, 180]  # a pale one
    density, grid = density_of(pixels)
    tile = next(tile for tile in grid if tile.core.y0 <= place[0] < tile.core.y1
                and tile.core.x0 <= place[1] < tile.core.x1)  # fmt: skip
    assert not glass_tiles(density)[tile.index]


def test_what_is_even_but_dark_is_not_glass_and_what_is_not_a_number_is_seen():
    pixels = section()
    pixels[:, 300:] = [140, 90, 160]
    density, _ = density_of(pixels)
    assert np.isinf(density[:, -1]).all()
    floats = section().astype(np.float32)
    floats[10, 400] = np.nan
    density, _ = density_of(floats)
    assert np.isnan(density[0, -1]) and not glass_tiles(density)[0, -1]
    assert glass_tiles(density)[-1, -1]
    assert not glass_tiles(density_of(np.zeros((128, 128, 3), np.uint8))[0]).any()
    assert 0.02 < GLASS < 0.1


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / "slide.tif"
    tifffile.imwrite(path, section(), tile=(64, 64), photometric="rgb")
    return path


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory):
    """Foreground is what is dark in green: weights set by hand, and objects wherever it is."""
    import torch

    from segpipe.models.card import parse_card
    from segpipe.models.network import build_network

    parameters = {"width": 2, "depth": 1, "padding": "same", "norm": "none"}
    card = parse_card(
        {
            "name": "dark",
            "architecture": {"name": "unet", "parameters": parameters},
            "channels": ["red", "green", "blue"],
            "outputs": ["foreground"],
            "normalisation": {"kind": "fixed", "low": 0, "high": 255},
            "licence": "CC0-1.0",
            "training_data": "none",
        },
        "fields",
    )
    network = build_network(*card.network_arguments)
    state = {key: torch.zeros_like(value) for key, value in network.state_dict().items()}
    for block in ("encoder.0.0", "encoder.0.1", "decoder.0.0", "decoder.0.1"):
        weight = state[f"{block}.conv.weight"]
        weight[0, 1 if weight.shape[1] == 3 else 0, 1, 1] = 1
    state["head.weight"][0, 0] = -30.0
    state["head.bias"][:] = 15.0
    network.load_state_dict(state)
    path = tmp_path_factory.mktemp("model") / "dark.safetensors"
    write_model(path, network, card)
    return path


def facts(out, name="slide"):
    return json.loads((out / "manifests" / f"{name}.infer.json").read_text())["facts"]


def test_labels_are_the_same_and_what_was_spared_is_told(slide, colour_model, tmp_path, caplog):
    caplog.set_level("INFO", logger="segpipe")
    model = f"infer.model={colour_model}"
    run(slide, tmp_path / "with", model)
    run(slide, tmp_path / "without", model, "tile.tissue=off")
    labels = labels_of(tmp_path / "with", "slide")
    assert labels.max() > 15
    np.testing.assert_array_equal(labels, labels_of(tmp_path / "without", "slide"))
    found = facts(tmp_path / "with")
    assert found["tiles_skipped"] == found["tiles_skipped_because"]["glass"] >= 10
    assert found["plan"]["skip_glass"] is True and found["seconds_saved"] > 0
    assert facts(tmp_path / "without")["tiles_skipped"] == 0
    share = 100 * found["tiles_skipped"] / found["tiles"]
    assert f"{share:.1f} % of {found['tiles']} tiles are bare glass: skipped, some" in caplog.text
    run(slide, tmp_path / "with", model, "tile.tissue=off")  # switched off: inferred anew
    assert facts(tmp_path / "with")["tiles_skipped"] == 0


# --- a user's mask --------------------------------------------------------------------------------


def plainly(rings_of_polygons, rows, columns):
    """Every point by itself: crossings of a ray to the left, one by one."""
    result = np.zeros((len(rows), len(columns)), bool)
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            for rings in rings_of_polygons:
                crossings = 0
                for ring in rings:
                    for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True):
                        if (y0 <= y < y1) or (y1 <= y < y0):
                            (ya, xa), (yb, xb) = sorted([(y0, x0), (y1, x1)])
                            crossings += xa + (y - ya) * ((xb - xa) / (yb - ya)) <= x
                result[i, j] |= bool(crossings % 2)
    return result


POINT = st.tuples(*[st.floats(-5, 25).map(lambda value: round(value * 4) / 4)] * 2)
POLYGONS = st.lists(st.lists(st.lists(POINT, min_size=3, max_size=7), min_size=1, max_size=2),
                    min_size=1, max_size=3)  # fmt: skip


@settings(max_examples=60)
@given(POLYGONS, st.integers(1, 9), st.sampled_from([1.0, 0.5, 2.3]))
def test_polygons_fill_as_ray_casting_does_in_boxes_of_any_size(polygons, step, scale):
    document = {"type": "MultiPolygon", "coordinates": polygons}
    rows = (np.arange(20) + 0.5) * scale - 0.5
    columns = (np.arange(17) + 0.5) * scale - 0.5
    expected = plainly(polygons, rows, columns)
    try:
        parsed = parse_geojson(json.dumps(document))
    except ValueError as error:
        assert "no polygon with an area" in str(error) and not expected.any()
        return
    np.testing.assert_array_equal(parsed.inside(rows, columns), expected)
    for y in range(0, 20, step):
        for x in range(0, 17, step):
            part = parsed.inside(rows[y : y + step], columns[x : x + step])
            np.testing.assert_array_equal(part, expected[y : y + step, x : x + step])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting"),
        ('{"type": "Point", "coordinates": [1, 2]}', "no polygon"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [NaN, 0]]]}', "not finite"),
        ('{"type": "Polygon", "coordinates": [[0, 1, 2]]}', "not GeoJSON"),
        ('{"kind": "Polygon"}', "not GeoJSON"),
        ("[" * 100_000, "nested|Expecting"),
    ],
)
def test_what_is_no_geojson_is_said(text, says):
    with pytest.raises(ValueError, match=says):
        parse_geojson(text)


def feature(points):
    ring = [[float(x), float(y)] for y, x in points]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": geometry}]}


TRIANGLE = [(20, 30), (280, 60), (150, 290)]


@pytest.mark.parametrize("kind", ["geojson", "png"])
@pytest.mark.parametrize("region", [128, 512])
def test_no_object_is_outside_the_mask_and_inside_nothing_changes(tmp_path, kind, region):
    nuclei(tmp_path / "in" / "field.tif", (300, 320))
    mask = tmp_path / f"mask.{kind}"
    if kind == "geojson":
        mask.write_text(json.dumps(feature(TRIANGLE)))
    else:  # a twentieth of the size
        picture = Image.new("L", (16, 15))
        ImageDraw.Draw(picture).polygon([(x / 20, y / 20) for y, x in TRIANGLE], fill=255)
        picture.save(mask)
    size = f"tile.region={region}"
    run(tmp_path / "in", tmp_path / "all", size)
    run(tmp_path / "in", tmp_path / "some", size, f"tile.mask={mask}")
    if kind == "geojson":
        inside = parse_geojson(mask.read_text()).inside(
            np.arange(300.0) + 0.5, np.arange(320.0) + 0.5
        )
    else:
        inside = np.asarray(Image.open(mask)).repeat(20, 0).repeat(20, 1)[:300, :320] > 0
    everything, found = (labels_of(tmp_path / out, "field") for out in ("all", "some"))
    assert not found[~inside].any() and found.max() > 20
    whole = [one for one in range(1, everything.max() + 1) if inside[everything == one].all()]
    assert len(whole) > 15
    for one in whole:
        (same,) = np.unique(found[everything == one])
        assert same and np.array_equal(found == same, everything == one)
    told = facts(tmp_path / "some", "field")
    cores = inside[:256, :320].reshape(4, 64, 5, 64).any(axis=(1, 3)).sum()
    cores += inside[256:].reshape(44, 5, 64).any(axis=(0, 2)).sum()
    assert told["tiles_skipped_because"]["masked"] == 25 - cores > 2
    entries = [
        json.loads((tmp_path / out / "run.json").read_text())["images"]["field"]
        for out in ("all", "some")
    ]
    assert [one["looked_at_px"] for one in entries] == [None, inside.sum()]
    slide = Slide("field", entries[1])
    area_mm2 = inside.sum() * 0.5**2 / 1e6
    assert slide.density == (pytest.approx(found.max() / area_mm2), "/mm\u00b2")
    assert slide.covered == pytest.approx((found > 0).sum() / inside.sum())
    text = (tmp_path / "some" / "report.html").read_text()
    assert f"{inside.mean():.1%} of the image: inside tile.mask" in text
    assert "of the area inside the mask" in text
    assert "inside the mask" not in (tmp_path / "all" / "report.html").read_text()


def test_the_area_inside_a_mask_is_told_in_pixels_of_the_file_whatever_was_worked_on(tmp_path):
    nuclei(tmp_path / "in" / "field.tif", (300, 320))
    (tmp_path / "mask.geojson").write_text(json.dumps(feature(TRIANGLE)))
    setting = f"tile.mask={tmp_path / 'mask.geojson'}"
    areas = []
    for scale in (1, 0.6):
        out = tmp_path / str(scale)
        run(tmp_path / "in", out, setting, f"tile.scale={scale}", "tile.region=64")
        areas.append(json.loads((out / "run.json").read_text())["images"]["field"]["looked_at_px"])
    assert areas[1] == pytest.approx(areas[0], rel=0.01) and areas[1] != areas[0]


def test_a_mask_with_nothing_inside_has_no_density(tmp_path):
    nuclei(tmp_path / "in" / "field.tif", (100, 120))
    Image.new("L", (12, 10)).save(tmp_path / "mask.png")
    assert (
        run(tmp_path / "in", tmp_path / "out", f"tile.mask={tmp_path / 'mask.png'}").exit_code == 0
    )
    entry = json.loads((tmp_path / "out" / "run.json").read_text())["images"]["field"]
    assert entry["looked_at_px"] == 0 and Slide("field", entry).density is None


def test_a_mask_that_changed_is_another_result_and_one_that_lacks_is_an_error(tmp_path):
    nuclei(tmp_path / "in" / "field.tif", (130, 130))
    masks = tmp_path / "masks"
    masks.mkdir()
    setting = f"tile.mask={masks}"
    bad = run(tmp_path / "in", tmp_path / "out", setting)
    assert "field: no mask for it" in bad.failed[0].error
    (masks / "field.geojson").write_text(
        json.dumps(feature([(0, 0), (0, 70), (130, 70), (130, 0)]))
    )
    run(tmp_path / "in", tmp_path / "out", setting)
    first = labels_of(tmp_path / "out", "field")
    assert first.any() and not first[:, 70:].any()
    (masks / "field.geojson").write_text(
        json.dumps(feature([(0, 0), (0, 30), (130, 30), (130, 0)]))
    )
    run(tmp_path / "in", tmp_path / "out", setting)
    assert not labels_of(tmp_path / "out", "field")[:, 30:].any()
    (masks / "field.geojson").write_text("{}")
    bad = run(tmp_path / "in", tmp_path / "out", setting)
    assert "tile.mask field.geojson: is not GeoJSON" in bad.failed[0].error
    with pytest.raises(SettingsError, match=r"none\.geojson: cannot be opened"):
        run(tmp_path / "in", tmp_path / "out", f"tile.mask={tmp_path / 'none.geojson'}")


def test_in_memory_as_from_a_file(slide, colour_model, tmp_path):
    import segpipe

    chosen = load_settings(None, [*SIZES, f"infer.model={colour_model}", "tile.scale=0.6"])
    pixels = np.moveaxis(tifffile.imread(slide), -1, 0)
    run(slide, tmp_path, f"infer.model={colour_model}", "tile.scale=0.6")
    labels = segpipe.segment(pixels, str(colour_model), chosen)
    assert labels.max() > 10
    np.testing.assert_array_equal(labels, labels_of(tmp_path, "slide"))


def test_only_a_model_of_colours_leaves_out_glass():
    _, card = load_model(__import__("fields").threshold_model())
    from segpipe.stages.emptiness import skips_glass

    assert not skips_glass(load_settings(None, []), card)


def test_the_plan_tells_what_will_be_left_out(colour_model, tmp_path):
    pixels = section()
    small = pixels.reshape(80, 4, 112, 4, 3).mean((1, 3)).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "slide.ome.tif", bigtiff=True) as file:
        file.write(pixels, tile=(64, 64), photometric="rgb", subifds=1, metadata={"axes": "YXS"})
        file.write(small, tile=(64, 64), photometric="rgb", subfiletype=1)

    def planned(*more):
        chosen = load_settings(None, [*SIZES, f"infer.model={colour_model}", *more])
        found = plan_job([tmp_path / "slide.ome.tif"], None, chosen, sampled=False)
        return found.images[0].skipped, "\n".join(plan_text(found))

    run(tmp_path / "slide.ome.tif", tmp_path / "out", f"infer.model={colour_model}")
    found = facts(tmp_path / "out")
    share, text = planned()
    assert share == pytest.approx(found["tiles_skipped"] / found["tiles"], abs=0.06)
    assert f"left out      about {100 * share:.0f} % of the tiles" in text
    (tmp_path / "left.geojson").write_text(
        json.dumps(feature([(0, 0), (0, 60), (320, 60), (320, 0)]))
    )
    assert planned(f"tile.mask={tmp_path / 'left.geojson'}", "tile.tissue=off")[0] == 30 / 35
    share, text = planned("tile.tissue=off")
    assert share is None and "left out" not in text
