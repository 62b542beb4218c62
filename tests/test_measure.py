"""The stage measure: which columns there are, under which names, and what a change of them redoes."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from scipy.spatial import cKDTree
from skimage.measure import regionprops

from fields import labels_of, nuclei, run, table_of
from segpipe.columns import CHANNEL, COLUMNS
from segpipe.settings import load_settings


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Two channels of floats, of which the second has a hole in its data."""
    folder = tmp_path_factory.mktemp("in")
    pixels = tifffile.imread(nuclei(folder / "made.tif", (150, 260))).astype(np.float32)
    pixels = np.stack([pixels - 900.5, pixels * 1e-4])
    pixels[1, :40, :50] = np.nan
    metadata = {"axes": "CYX", "Channel": {"Name": ["DAPI", "a/b <c>"]}}
    tifffile.imwrite(folder / "two.ome.tif", pixels, metadata=metadata, photometric="minisblack")
    return folder / "two.ome.tif"


@pytest.fixture(scope="module")
def out(image, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert run(image, out, "tile.channel=DAPI").exit_code == 0
    return out


def test_the_columns_are_those_that_are_described_in_their_order(out):
    schema = pq.read_schema(out / "two.parquet")
    expected = []
    intensities = [one for one in COLUMNS if CHANNEL in one.name]
    for column in COLUMNS:
        if column is (intensities or [None])[0]:
            for channel in ("DAPI", "a/b <c>"):
                expected += [one.name.replace(CHANNEL, channel) for one in intensities]
        elif column not in intensities:
            expected.append(column.name)
    assert schema.names == expected
    assert all(field.metadata[b"description"] for field in schema)


def test_intensities_are_of_the_image_and_neighbours_of_the_table(image, out):
    table, labels = table_of(out, "two").to_pydict(), labels_of(out, "two")
    pixels = tifffile.imread(image)
    assert labels.max() > 10
    for place, one in enumerate(regionprops(labels)):
        for channel, name in enumerate(("DAPI", "a/b <c>")):
            values = pixels[channel][tuple(one.coords.T)].astype(float)
            values = values[np.isfinite(values)]
            found = [
                table[f"{key}_intensity_{name}"][place] for key in ("mean", "min", "max", "sd")
            ]
            if len(values) == 0:
                assert found == [None] * 4
                continue
            wanted = [values.mean(), values.min(), values.max(), values.std()]
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
    centres = np.transpose([table["centroid_y_px"], table["centroid_x_px"]])
    nearest = cKDTree(centres).query(centres, k=2)[0][:, 1]
    np.testing.assert_allclose(table["nearest_neighbour_px"], nearest)


def test_other_features_redo_measure_alone(image, out):
    tokens = {path.name: path.read_text() for path in (out / "manifests").glob("*.json")}
    before = table_of(out, "two")
    assert run(image, out, "tile.channel=DAPI", "measure.features=[shape]").exit_code == 0
    changed = {
        path.name for path in (out / "manifests").glob("*.json") if path.read_text() != tokens[path.name]
    }  # fmt: skip
    assert changed == {"two.measure.json"}
    after = table_of(out, "two")
    assert after.equals(before.select(after.column_names))
    gone = set(before.column_names) - set(after.column_names)
    assert gone and all("intensity" in name or "nearest" in name for name in gone)


def test_features_are_a_set():
    chosen = load_settings(None, ["measure.features=[neighbours,shape,neighbours]"]).measure
    assert chosen.features == ("shape", "neighbours")
    assert load_settings(None, ["measure.features=[]"]).measure.features == ()
