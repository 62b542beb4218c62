"""Arrays on disk: what other tools must be able to open, and what must be noticed when damaged."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from ome_zarr_models.v05 import Image, ImageLabel

from fields import labels_of, nuclei, run
from segpipe.errors import SegpipeError
from segpipe.geometry import Box, Lattice
from segpipe.records import Records, begin_stage, fingerprint, has_begun, shards_in
from segpipe.store import (
    STRIP,
    Grid,
    Shard,
    create_array,
    halve_mean,
    open_array,
    read_box,
    shard_is_whole,
    shard_path,
    write_shard,
)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    assert run(nuclei(folder / "in" / "field.tif", (200, 333)), folder / "out").exit_code == 0
    return folder / "out"


def test_ome_zarr_models_validates_image_and_labels(result):
    group = zarr.open_group(result / "field.ome.zarr", mode="r")
    image = Image.from_zarr(group)
    assert image.labels is not None
    label = ImageLabel.from_zarr(group["labels/instances"])
    ours, theirs = (one.ome_attributes.multiscales[0].datasets for one in (image, label))
    assert len(ours) == len(theirs) > 2
    assert label.ome_attributes.image_label.source.image == "../../"
    assert [axis.unit for axis in image.ome_attributes.multiscales[0].axes[1:]] == [
        "micrometer"
    ] * 2
    assert theirs[1].coordinateTransformations[0].scale == [1.0, 1.0]


def test_ome_zarr_py_opens_it(result):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own dependencies'
        from ome_zarr.io import parse_url
        from ome_zarr.reader import Reader

        location = parse_url(str(result / "field.ome.zarr"))
        nodes = list(Reader(location)())
    by_axes = {node.data[0].ndim: node for node in nodes if node.data}
    np.testing.assert_array_equal(np.asarray(by_axes[2].data[0]), labels_of(result, "field"))
    image = zarr.open_array(result / "field.ome.zarr" / "0", mode="r")[:]
    np.testing.assert_array_equal(np.asarray(by_axes[3].data[0]), image)


@given(
    st.tuples(st.integers(1, 9000), st.integers(1, 9000)),
    st.sampled_from([512, 64]),
    st.integers(1, 8),
)
def test_shards_are_whole_chunks_and_levels_go_down_to_one(shape, chunk, times):
    grid = Grid.fitting(shape, chunk * times, chunk)
    for number, size in enumerate(grid.levels):
        level = grid.level(number)
        assert level.shape == size == tuple(-(-n // 2**number) for n in shape)
        assert all(a % b == 0 for a, b in zip(level.shard, level.chunk, strict=True))
        assert all(inner <= outer for inner, outer in zip(level.chunk, size, strict=True))
    assert len(Lattice(level.shape, level.shard)) == 1
    if min(shape) > chunk * times:
        assert grid.shard == (chunk * times, chunk * times)


def test_a_shard_is_written_read_and_told_from_a_torn_one(tmp_path):
    path = tmp_path / "a.zarr"
    create_array(path, (2,), Grid.fitting((100, 90), 64, 32), np.dtype(np.uint16))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 9999, (2, 36, 26), dtype=np.uint16)
    box = Box(64, 64, 100, 90)
    shard = write_shard(path, box, pixels)
    np.testing.assert_array_equal(read_box(path, box), pixels)
    np.testing.assert_array_equal(read_box(path, Box(70, 80, 71, 90), [1]), pixels[1:, 6:7, 16:26])
    assert shard_is_whole(path, box, shard, verify=True)
    file = shard_path(path, box)
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    assert shard_is_whole(path, box, shard) and not shard_is_whole(path, box, shard, verify=True)
    with pytest.raises(SegpipeError, match="is damaged at"):
        read_box(path, box)
    file.write_bytes(data[: len(data) // 2])
    assert not shard_is_whole(path, box, shard)
    assert write_shard(path, box, pixels) == shard  # over a torn one


def test_an_empty_shard_has_no_file_and_a_record_says_so(tmp_path):
    path = tmp_path / "a.zarr"
    create_array(path, (), Grid.fitting((64, 64), 64, 32), np.dtype(np.uint32))
    box = Box(0, 0, 64, 64)
    full = write_shard(path, box, np.ones((64, 64), np.uint32))
    empty = write_shard(path, box, np.zeros((64, 64), np.uint32))
    assert empty.empty and not full.empty
    assert shard_is_whole(path, box, empty) and not shard_is_whole(path, box, full)


def test_an_array_made_anew_is_opened_anew(tmp_path):
    path = tmp_path / "a.zarr"
    create_array(path, (), Grid.fitting((8, 8), 8, 8), np.dtype(np.uint8))
    assert open_array(path).shape == (8, 8)
    for file in path.iterdir():
        file.unlink()
    create_array(path, (), Grid.fitting((9, 8), 8, 8), np.dtype(np.uint8))
    assert open_array(path).shape == (9, 8)


@given(
    st.integers(1, 9) | st.integers(2 * STRIP - 1, 4 * STRIP + 3),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_mean_of_whole_blocks_rounds_half_up(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 65536, (1, height, width), dtype=np.uint16)
    halved = halve_mean(pixels)
    assert halved.shape == (1, -(-height // 2), -(-width // 2))
    for y in range(-(-height // 2)):
        for x in range(-(-width // 2)):
            block = pixels[0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].astype(int)
            assert halved[0, y, x] == (2 * block.mean() + 1) // 2


def test_records_forget_torn_lines_other_settings_and_what_is_discarded(tmp_path):
    (tmp_path / "stage").mkdir()
    records = Records(tmp_path / "stage", "pass", "abc")
    begin_stage(tmp_path / "stage", "abc")
    records.add("0_0", None, {"rows": np.arange(3)}, device="cpu")
    records.add("0_1")
    Records(tmp_path / "stage", "pass", "other").add("0_2")
    Records(tmp_path / "stage", "another", "abc").add("0_0")
    with next((tmp_path / "stage").glob("*.jsonl")).open("ab") as file:
        file.write(b'{"region": "0_3", "fing')
    found = records.read()
    assert sorted(found) == ["0_0", "0_1"]
    assert found["0_0"].facts == {"device": "cpu"}
    np.testing.assert_array_equal(records.payload(found["0_0"])["rows"], np.arange(3))
    assert records.payload(found["0_1"]) == {}
    records.discard(["0_0"])
    records.add("0_4")
    assert sorted(records.read()) == ["0_1", "0_4"]
    blob = next((tmp_path / "stage").glob("*.bin"))
    blob.write_bytes(b"\0" * blob.stat().st_size)
    with pytest.raises(SegpipeError, match="is damaged"):
        records.payload(found["0_0"])
    for folder, name, key in (("stage", "pass", "x"), ("stage", "x", "abc"), ("no", "pass", "abc")):
        assert Records(tmp_path / folder, name, key).read() == {}
    records.discard()
    assert records.read() == {} and has_begun(tmp_path / "stage", "abc")
    assert sorted(Records(tmp_path / "stage", "another", "abc").read()) == ["0_0"]
    assert not has_begun(tmp_path / "stage", "x") and not has_begun(tmp_path / "no", "abc")


def test_records_tell_what_shards_were_written(tmp_path):
    records = Records(tmp_path / "records" / "stage", "pass", "abc", tmp_path / "a.zarr")
    begin_stage(records.folder, "x")
    records.add("0_0", Shard(5, 7), {"rows": np.arange(3)})
    records.add("0_1")
    assert list(shards_in(records.folder)) == [("pass", tmp_path / "a.zarr", "0_0", Shard(5, 7))]


def test_fingerprints_differ_with_every_part_and_not_with_key_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert len({fingerprint(1), fingerprint("1"), fingerprint(1, None), fingerprint([1])}) == 4
