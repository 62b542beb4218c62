"""Exports: each reads back as the labels and the table say, in programs that are not ours."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import uuid
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
import zarr
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fields import labels_of, nuclei, run, table_of
from segpipe.cli import main
from segpipe.errors import SettingsError
from segpipe.export.geojson import GeojsonWriter, coordinates_text, measurements_text
from segpipe.export.geoparquet import well_known_binary
from segpipe.geometry import Box
from segpipe.outlines import trace_region
from segpipe.polygons import polygons_of
from segpipe.records import read_json
from segpipe.settings import load_settings
from segpipe.stages.exported import SUFFIXES

ALL = "export.formats=geojson,geoparquet,csv,anndata,tiff"
SETTINGS = ("tile.pixel_size_um=0.5",)
OUTLINED = ("geojson", "geoparquet")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return nuclei(tmp_path_factory.mktemp("in") / "a.tif", (240, 300), seed=3)


@pytest.fixture(scope="module")
def out(image, tmp_path_factory):
    """A finished OUT with all exports, of many small regions."""
    folder = tmp_path_factory.mktemp("out")
    assert run(image, folder, ALL, *SETTINGS).exit_code == 0
    return folder


def exported(out: Path, format_: str, name: str = "a") -> Path:
    return out / f"{name}{SUFFIXES[format_]}"


def geojson_of(out: Path) -> dict:
    return json.loads(gzip.decompress(exported(out, "geojson").read_bytes()))


def shapes_of(out: Path, format_: str) -> dict[int, shapely.Geometry]:
    """Outline of each object, by id, as shapely reads it; corners of pixels at whole numbers."""
    if format_ == "geojson":
        features = geojson_of(out)["features"]
        shapes = shapely.from_geojson([json.dumps(one["geometry"]) for one in features])
        return dict(zip([int(one["properties"]["name"]) for one in features], shapes, strict=True))
    table = pq.read_table(exported(out, "geoparquet"))
    shapes = shapely.from_wkb(table["geometry"].to_pylist())
    moved = shapely.transform(shapes, lambda points: points + 0.5)
    return dict(zip(table["id"].to_pylist(), moved, strict=True))


def filled(shapes: dict[int, shapely.Geometry], shape: tuple[int, int]) -> np.ndarray:
    """The labels of all pixels whose centres are in a shape."""
    labels = np.zeros(shape, np.uint32)
    for one, outline in shapes.items():
        x0, y0, x1, y1 = (int(value) for value in outline.bounds)
        x, y = np.meshgrid(np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5)
        labels[y0:y1, x0:x1][shapely.contains_xy(outline, x, y)] = one
    return labels


@pytest.mark.parametrize("format_", OUTLINED)
def test_outlines_filled_are_the_labels(out, format_):
    shapes = shapes_of(out, format_)
    labels = labels_of(out, "a")
    assert len(shapes) == labels.max() > 30
    assert all(shapely.is_valid(one) for one in shapes.values())
    np.testing.assert_array_equal(filled(shapes, labels.shape), labels)


def test_polygon_table_and_label_agree_on_every_object_of_a_sample_at_every_level(out):
    table = table_of(out, "a")
    shapes = {format_: shapes_of(out, format_) for format_ in OUTLINED}
    with tifffile.TiffFile(exported(out, "tiff")) as file:
        levels = [level.asarray() for level in file.series[0].levels]
    group = zarr.open_group(out / "a.ome.zarr" / "labels" / "instances", mode="r")
    pyramid = [group[str(level)][:] for level in range(len(levels))]
    for ours, theirs in zip(levels, pyramid, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    random = np.random.default_rng(0)
    for row in random.choice(table.num_rows, 30, replace=False):
        told = {name: table[name][row].as_py() for name in table.column_names}
        for outlines in shapes.values():
            outline = outlines[told["id"]]
            assert outline.area == told["area_px"]
            centre = np.array([outline.centroid.y, outline.centroid.x]) - 0.5
            np.testing.assert_allclose(centre, (told["centroid_y_px"], told["centroid_x_px"]))
            x0, y0, x1, y1 = outline.bounds
            assert [y0, x0, y1, x1] == [told[f"bbox_{one}_px"] for one in ("y0", "x0", "y1", "x1")]
        for level, labels in enumerate(pyramid):
            step = 2**level
            here = np.argwhere(labels == told["id"]) * step + 0.5  # nearest: centres of pixels kept
            inside = shapely.contains_xy(outline, here[:, 1], here[:, 0])
            assert inside.all() and (len(here) > 0 or told["area_px"] < step**2 * 4)


def test_geojson_is_what_qupath_reads(out):
    told, table = geojson_of(out), table_of(out, "a").to_pylist()
    assert told["type"] == "FeatureCollection" and len(told["features"]) == len(table)
    assert len({one["id"] for one in told["features"]}) == len(table)
    for feature, row in zip(told["features"], table, strict=True):
        assert list(feature) == ["type", "id", "geometry", "properties"]
        assert str(uuid.UUID(feature["id"])) == feature["id"]
        properties = feature["properties"]
        assert properties["objectType"] == "detection" and properties["name"] == str(row["id"])
        assert properties["classification"] == {"name": "Nucleus", "color": [0, 200, 120]}
        assert all(type(value) in (int, float) for value in properties["measurements"].values())
        assert properties["measurements"] == {
            name: float(value) for name, value in row.items() if value is not None
        }
        for ring in feature["geometry"]["coordinates"]:
            assert ring[0] == ring[-1] and len(ring) >= 5
            assert all(type(value) is int for point in ring for value in point)


def test_every_export_is_the_same_bytes_for_any_region(out, image, tmp_path):
    for region in (32, 96, 512):  # with labels of another region, all are made again
        run(image, tmp_path, ALL, *SETTINGS, f"stitch.region={region}")
        for format_ in SUFFIXES:
            ours, theirs = exported(tmp_path, format_), exported(out, format_)
            assert ours.read_bytes() == theirs.read_bytes(), (format_, region)


def test_geoparquet_is_the_table_with_a_column_of_geometry(out):
    table = pq.read_table(exported(out, "geoparquet"))
    ours = table_of(out, "a")
    assert table.drop_columns("geometry").equals(ours)
    geo = json.loads(table.schema.metadata[b"geo"])
    assert geo["version"] == "1.1.0" and geo["primary_column"] == "geometry"
    column = geo["columns"]["geometry"]
    assert column["encoding"] == "WKB" and column["crs"] is None
    shapes = shapely.from_wkb(table["geometry"].to_pylist())
    assert {one.geom_type for one in shapes} <= set(column["geometry_types"])
    x0, y0, x1, y1 = shapely.total_bounds(shapes)
    assert [x0 >= column["bbox"][0], y0 >= column["bbox"][1]] == [True, True]
    assert [x1 <= column["bbox"][2], y1 <= column["bbox"][3]] == [True, True]
    assert all(shapely.is_ccw(shapely.get_exterior_ring(one)) for one in shapes)


def test_csv_is_the_table(out):
    ours = table_of(out, "a")
    types = pa_csv.ConvertOptions(column_types=ours.schema)
    read = pa_csv.read_csv(exported(out, "csv"), convert_options=types)
    assert read.replace_schema_metadata(None).equals(ours.replace_schema_metadata(None))


def test_anndata_is_the_table(out):
    ours, read = table_of(out, "a"), anndata.read_h5ad(exported(out, "anndata"))
    assert read.n_obs == ours.num_rows
    assert set(read.obs.columns) | set(read.var_names) == set(ours.column_names)
    assert list(read.obs_names) == [str(one) for one in ours["id"].to_pylist()]
    for name in ours.column_names:
        values = read.obs[name].to_numpy() if name in read.obs else read[:, name].X.ravel()
        expected = ours[name].to_numpy()
        np.testing.assert_array_equal(values, expected, err_msg=name)
        assert name not in read.obs or values.dtype == expected.dtype
    x, y = ours["centroid_x_px"].to_numpy(), ours["centroid_y_px"].to_numpy()
    np.testing.assert_array_equal(read.obsm["spatial"], np.stack([x, y], 1))
    assert read.uns["segpipe"]["image"] == "a"
    assert "area_px" in read.var_names and "touches_border" in read.obs


def test_tiff_is_a_pyramid_with_pixel_sizes(out):
    with tifffile.TiffFile(exported(out, "tiff")) as file:
        assert file.is_ome and file.is_bigtiff
        series = file.series[0]
        assert series.is_pyramidal and len(series.levels) > 3
        assert all(one.dtype == np.uint32 and one.keyframe.is_tiled for one in series.levels)
        described = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]["Pixels"]
        assert described["PhysicalSizeX"] == described["PhysicalSizeY"] == 0.5
        assert described["PhysicalSizeXUnit"] == "µm"


# --- at other scales, and with several parts ------------------------------------------------------


def test_coordinates_at_another_scale():
    labels = np.array([[1, 1], [1, 1], [0, 0]], np.uint32)
    polygons = polygons_of(trace_region(np.pad(labels, 1), Box(0, 0, 3, 2)))
    text, ends = coordinates_text(polygons, 1.25)
    assert text.tobytes() == b"[[[0,0],[2.5,0],[2.5,2.5],[0,2.5],[0,0]]]" and ends[-1] == len(text)
    data, _ = well_known_binary(polygons, 1.25)
    shape = shapely.from_wkb(data.tobytes())
    assert shape.bounds == (-0.5, -0.5, 2.0, 2.0)
    # the centre of working pixel w is (w + 0.5) * scale - 0.5
    assert (shape.centroid.y, shape.centroid.x) == ((0.5 + 0.5) * 1.25 - 0.5,) * 2


def test_outlines_at_another_scale_end_with_the_image():
    """The last pixel of the labels may cover more than is left of the image."""
    labels = np.ones((2, 2), np.uint32)
    polygons = polygons_of(trace_region(np.pad(labels, 1), Box(0, 0, 2, 2)))
    text, _ = coordinates_text(polygons, 2.0, (3, 4))
    assert text.tobytes() == b"[[[0,0],[4,0],[4,3],[0,3],[0,0]]]"
    data, _ = well_known_binary(polygons, 2.0, (3, 4))
    assert shapely.from_wkb(data.tobytes()).bounds == (-0.5, -0.5, 3.5, 2.5)


@given(
    st.lists(st.lists(st.sampled_from([0, 1, 2]), min_size=6, max_size=6), min_size=1, max_size=6),
    st.sampled_from([1.0, 2.0, 0.3337, 1.9, 1000.0]),
)
def test_both_texts_hold_the_same_polygons(rows, scale):
    labels = np.array(rows, np.uint32)
    polygons = polygons_of(trace_region(np.pad(labels, 1), Box(0, 0, *labels.shape)))
    text, ends = coordinates_text(polygons, scale)
    data, places = well_known_binary(polygons, scale)
    for k in range(len(polygons)):
        coordinates = json.loads(text[ends[k] : ends[k + 1]].tobytes())
        several = polygons.parts[k + 1] - polygons.parts[k] > 1
        kind = "MultiPolygon" if several else "Polygon"
        one = shapely.from_geojson(json.dumps({"type": kind, "coordinates": coordinates}))
        other = shapely.from_wkb(data[places[k] : places[k + 1]].tobytes())
        assert shapely.is_valid(other) and other.geom_type == one.geom_type == kind
        assert np.isclose(other.area, (labels == polygons.ids[k]).sum() * scale**2)
        np.testing.assert_allclose(
            shapely.get_coordinates(one) - 0.5, shapely.get_coordinates(other), atol=6e-5
        )


def test_classes_have_their_names(tmp_path):
    polygons = polygons_of(trace_region(np.pad(np.array([[1, 2]], np.uint32), 1), Box(0, 0, 1, 2)))
    told = {"classes": '0 background, 1 tumour, other, 2 say "b"'}
    with GeojsonWriter(tmp_path / "a.geojson.gz", told, "Nucleus") as writer:
        writer.write(polygons, pa.table({"id": [1, 2]}))
    found = json.loads(gzip.decompress((tmp_path / "a.geojson.gz").read_bytes()))["features"]
    names = [one["properties"]["classification"]["name"] for one in found]
    assert names == ["tumour, other", 'say "b"']


def test_measurements_are_numbers_and_what_is_not_known_is_left_out():
    table = pa.table(
        {
            "a": [1.5, None, float("nan")],
            'say "b"': [True, False, None],
            "c": pa.array([7, 8, 2**40], pa.int64()),
            "word": ["x", "y", "z"],
            "tiny": [1e-300, float("inf"), -0.25],
        }
    )
    found = [json.loads(f"{{{one}}}") for one in measurements_text(table).to_pylist()]
    assert found == [
        {"a": 1.5, 'say "b"': 1, "c": 7, "tiny": 1e-300},
        {'say "b"': 0, "c": 8},
        {"c": 2**40, "tiny": -0.25},
    ]


# --- when they are made ---------------------------------------------------------------------------


def stamps(out: Path) -> dict[str, int]:
    """When results were written; what is written after each run is left out."""
    files = [one for one in out.iterdir() if one.is_file()]
    told = ("run.json", "report.html")
    return {one.name: one.stat().st_mtime_ns for one in files if one.name not in told}


def test_other_settings_redo_that_and_no_more(image, tmp_path):
    run(image, tmp_path, "export.formats=csv")
    first = stamps(tmp_path)
    assert "a.csv" in first and "a.geojson.gz" not in first
    assert run(image, tmp_path, "export.formats=csv").images[0].status == "skipped"
    assert run(image, tmp_path, "export.formats=[csv, geojson]").images[0].status == "done"
    second = stamps(tmp_path)
    assert {name for name in first if first[name] != second[name]} == set()
    run(image, tmp_path, "export.formats=[csv, geojson]", "export.simplify_px=1.0")
    third = stamps(tmp_path)
    assert {name for name in second if second[name] != third[name]} == {"a.geojson.gz"}
    (tmp_path / "a.csv").unlink()
    run(image, tmp_path, "export.formats=[csv]")
    assert (tmp_path / "a.csv").exists() and stamps(tmp_path)["a.geojson.gz"] == third[
        "a.geojson.gz"
    ]
    assert not list((tmp_path / ".segpipe").rglob("*export*"))

    # With other labels all of them go; what is not asked for is not made again.
    run(image, tmp_path, "export.formats=[csv]", "stitch.min_area=60")
    assert not (tmp_path / "a.geojson.gz").exists()
    assert len(pa_csv.read_csv(tmp_path / "a.csv")) == table_of(tmp_path, "a").num_rows


def test_simplified_outlines_are_valid_and_smaller(out, image, tmp_path):
    run(image, tmp_path, "export.formats=geojson", "export.simplify_px=1.0")
    simple, exact = shapes_of(tmp_path, "geojson"), shapes_of(out, "geojson")
    assert simple.keys() == exact.keys()
    for one, shape in simple.items():
        apart = shape.boundary.hausdorff_distance(exact[one].boundary)
        assert shape.is_valid and apart <= 1 + 1e-9
    counts = [
        sum(len(shapely.get_coordinates(s)) for s in found.values()) for found in (simple, exact)
    ]
    assert counts[0] < counts[1] / 2


def invoke(*arguments: object):
    return CliRunner().invoke(main, [str(one) for one in arguments])


def test_export_of_a_finished_out_is_what_predict_makes(out, image, tmp_path):
    run(image, tmp_path, *SETTINGS)
    image_less = tmp_path / ".segpipe"
    assert invoke("clean", tmp_path).exit_code == 0 and not image_less.exists()
    done = invoke(
        "export", tmp_path, "--format", "geojson,csv,tiff", "--format", "geoparquet,anndata"
    )
    assert done.exit_code == 0, done.output
    for format_ in SUFFIXES:
        assert exported(tmp_path, format_).read_bytes() == exported(out, format_).read_bytes()
    first = stamps(tmp_path)
    assert invoke("export", tmp_path, "a", "--format", "csv").exit_code == 0
    assert stamps(tmp_path) == first
    # The run that follows asks for none of them, and leaves them.
    assert run(image, tmp_path, *SETTINGS).images[0].status == "skipped"
    assert set(read_json(tmp_path / "manifests" / "a.measure.json")["facts"]["exports"]) == set(
        SUFFIXES
    )


def test_wrong_usage_of_export_is_one_line(out, tmp_path):
    for arguments, message in (
        (("export", out, "--format", "shp"), "export.formats: input should be 'geojson'"),
        (("export", out, "b", "--format", "csv"), "holds no image 'b'; it holds a"),
        (("export", tmp_path, "--format", "csv"), "holds no results of segpipe"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2 and message in done.output and len(done.output.splitlines()) == 1


def test_an_unfinished_image_is_named_and_the_others_are_exported(image, tmp_path):
    folder = tmp_path / "in"
    nuclei(folder / "b.tif", (90, 90))
    (folder / "c.tif").write_bytes(image.read_bytes()[:3000])
    run(folder, tmp_path / "out")
    done = invoke("export", tmp_path / "out", "--format", "csv,geojson")
    assert done.exit_code == 1
    assert (tmp_path / "out" / "b.csv").exists() and not (tmp_path / "out" / "c.csv").exists()


def test_labels_that_others_changed_are_told(image, tmp_path):
    run(image, tmp_path)
    labels = zarr.open_array(tmp_path / "a.ome.zarr" / "labels" / "instances" / "0", mode="r+")
    whole = labels[:]
    labels[:] = np.where(whole == 3, 0, whole)
    done = invoke("export", tmp_path, "--format", "geojson")
    assert done.exit_code == 1 and not (tmp_path / "a.geojson.gz").exists()
    assert not list(tmp_path.glob(".*.partial"))


def test_no_objects_are_no_rows_and_no_error(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((70, 80), 9, np.uint16))
    out = tmp_path / "out"
    assert run(tmp_path / "a.tif", out, ALL).exit_code == 0
    assert geojson_of(out)["features"] == []
    assert pq.read_table(exported(out, "geoparquet")).num_rows == 0
    assert anndata.read_h5ad(exported(out, "anndata")).n_obs == 0
    assert not tifffile.imread(exported(out, "tiff")).any()


def test_a_lacking_package_is_named_before_anything_is_done(image, tmp_path):
    program = f"""
import sys
sys.modules["h5py"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "h5py" else find(name, *more)
from segpipe.cli import main
main(["predict", {str(image)!r}, "-o", {str(tmp_path / "out")!r}, "--export", "csv,anndata"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "pip install 'segpipe[anndata]'" in done.stderr
    assert not list((tmp_path / "out").glob("*.zarr"))


def test_formats_as_words_or_lists():
    for text in ("csv,geojson", "[geojson, csv]", "'geojson, csv,'"):
        settings = load_settings(None, [f"export.formats={text}"])
        assert settings.export.formats == ("geojson", "csv")
    assert load_settings(None, ["export.formats=null"]).export.formats == ()
    with pytest.raises(SettingsError, match=r"export\.formats"):
        load_settings(None, ["export.formats=shp"])
