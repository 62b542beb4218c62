"""Arrays on disk: what other tools must be able to open, and what must be noticed when damaged."""

from __future__ import annotations

import json
import resource
import signal
import warnings

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from ome_zarr_models.v05 import Image, ImageLabel
from zarr.codecs import Crc32cCodec, ZstdCodec

from fields import labels_of, nuclei, run
from segpipe.errors import SegpipeError
from segpipe.geometry import Box, Lattice
from segpipe.records import Records, drop_records, fingerprint, read_records
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


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32"])
@pytest.mark.parametrize("names", [None, ("c", "y", "x")])
def test_metadata_say_what_zarr_would_write(tmp_path, dtype, names):
    create_array(tmp_path / "ours", (2,), Grid.fitting((300, 90), 64, 32), np.dtype(dtype), names)
    zarr.create_array(
        tmp_path / "theirs",
        shape=(2, 300, 90),
        chunks=(1, 32, 32),
        shards=(2, 64, 64),
        dtype=dtype,
        compressors=[ZstdCodec(level=1), Crc32cCodec()],
        fill_value=0,
        dimension_names=names,
    )
    ours, theirs = (tmp_path / name / "zarr.json" for name in ("ours", "theirs"))
    assert json.loads(ours.read_bytes()) == json.loads(theirs.read_bytes())
    opened = zarr.open_array(tmp_path / "theirs").with_config({"write_empty_chunks": True})
    assert open_array(tmp_path / "theirs") == opened


def test_groups_say_what_zarr_would_write(result, tmp_path):
    for inside in ("", "labels", "labels/instances"):
        ours = json.loads((result / "field.ome.zarr" / inside / "zarr.json").read_bytes())
        zarr.create_group(tmp_path / inside, attributes=ours["attributes"])
        assert ours == json.loads((tmp_path / inside / "zarr.json").read_bytes())


def test_the_display_range_is_the_one_that_was_found(result):
    described = zarr.open_group(result / "field.ome.zarr").attrs["ome"]["omero"]["channels"]
    facts = json.loads((result / "manifests/field.tile.json").read_text())["facts"]
    shown = [[one["window"]["start"], one["window"]["end"]] for one in described]
    assert shown == facts["ranges"] and all(one["window"]["min"] == 0 for one in described)


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


def rows(length, seed=0):
    """Rows of an object with columns of several types."""
    rng = np.random.default_rng(seed)
    made = np.zeros(length, [("id", "<u4"), ("sum", "<i8")])
    made["id"], made["sum"] = rng.integers(0, 99, (2, length))
    return made


def test_records_are_read_as_they_were_added(tmp_path):
    records = Records(tmp_path / "records", "pass", "abc", tmp_path / "a.zarr")
    records.folder.mkdir()
    arrays = {"rows": rows(3), "none": np.empty((0, 2)), "flat": np.arange(6).reshape(2, 3)}
    added = [
        records.add("0_0", Shard(5, 7), arrays, device="cpu", box=(1, 2)),
        records.add("0_1"),
        Records(records.folder, "another", "x").add("0_0", Shard(0, 0)),
    ]
    assert read_records(records.folder) == added
    assert (added[0].shard, added[0].array) == (Shard(5, 7), "../a.zarr")
    assert added[0].facts == {"device": "cpu", "box": [1, 2]}
    found = records.payload(added[0])
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert list(records.payload(added[0], ["flat"])) == ["flat"]
    assert records.payload(added[1]) == {}
    assert read_records(tmp_path / "no") == []


def test_what_is_dropped_counts_no_more_and_nothing_else_is_lost(tmp_path):
    records = Records(tmp_path, "pass", "abc")
    added = [records.add(f"0_{number}", None, {"rows": rows(number)}) for number in range(5)]
    drop_records(tmp_path, [added[0], added[3]])
    added.append(records.add("0_5"))
    assert read_records(tmp_path) == [added[1], added[2], added[4], added[5]]
    np.testing.assert_array_equal(records.payload(added[4])["rows"], rows(4))


def test_wherever_a_file_of_records_is_cut_the_whole_ones_before_count(tmp_path):
    records = Records(tmp_path, "pass", "abc")
    added = [records.add(f"0_{number}", None, {"rows": rows(number)}) for number in range(3)]
    (path,) = tmp_path.glob("*.records")
    whole = path.read_bytes()
    ends = [*(one.offset for one in added[1:]), len(whole)]
    for length in range(len(whole)):
        for content in (whole[:length], whole[:length] + bytes(len(whole) - length)):
            path.write_bytes(content)
            counts = [one for one, end in zip(added, ends, strict=True) if end <= length]
            found = read_records(tmp_path)
            assert found[: len(counts)] == counts
            # Bytes that are zero anyway are not missed.
            assert all(
                path.read_bytes()[: ends[added.index(one)]] == whole[: ends[added.index(one)]]
                for one in found
            )


def test_damaged_arrays_are_an_error_and_their_region_is_done_again(tmp_path):
    records = Records(tmp_path, "pass", "abc")
    added = [records.add("0_0", None, {"rows": rows(9)}), records.add("0_1")]
    (path,) = tmp_path.glob("*.records")
    damaged = bytearray(path.read_bytes())
    damaged[added[1].offset - 4] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(SegpipeError, match="is damaged"):
        records.payload(added[0])
    assert read_records(tmp_path) == added[1:]


def test_a_full_disk_leaves_no_torn_record(tmp_path):
    """What comes after a torn one in its file would not be read."""
    records = Records(tmp_path, "pass", "abc")
    first = records.add("0_0", None, {"rows": rows(9)})
    size = (tmp_path / first.file).stat().st_size
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 150, hard))
        with pytest.raises(OSError, match="File too large"):
            records.add("0_1", None, {"rows": rows(99)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    third = records.add("0_2")
    assert read_records(tmp_path) == [first, third]


def test_fingerprints_differ_with_every_part_and_not_with_key_order():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert len({fingerprint(1), fingerprint("1"), fingerprint(1, None), fingerprint([1])}) == 4
