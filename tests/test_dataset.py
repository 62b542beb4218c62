"""Images and masks of a training: what is refused, and that a field of view stays on one side."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.errors import InputError, SettingsError
from segpipe.training.dataset import Sample, load_samples, read_labels, split_samples
from segpipe.training.settings import DataSettings

LABELS = np.zeros((40, 48), np.uint16)
LABELS[4:12, 4:12], LABELS[20:30, 20:34] = 1, 2


def folder(tmp_path, images, masks, index=None):
    """A folder of images and masks by stem, as DataSettings."""
    for name, files in (("images", images), ("masks", masks)):
        (tmp_path / name).mkdir()
        for stem, pixels in files.items():
            tifffile.imwrite(tmp_path / name / f"{stem}.tif", pixels)
    fields = {"images": tmp_path / "images", "masks": tmp_path / "masks"}
    if index is not None:
        (tmp_path / "index.csv").write_text(index)
        fields["index"] = tmp_path / "index.csv"
    return fields


def image(shape=(40, 48), seed=0):
    return np.random.default_rng(seed).integers(0, 255, shape, np.uint8)


def test_images_and_masks_are_read_in_the_order_of_names(tmp_path):
    fields = folder(tmp_path, {"b": image(seed=1), "a": image(seed=2)}, {"a": LABELS, "b": LABELS})
    samples = load_samples(DataSettings(**fields), 1)
    assert [sample.name for sample in samples] == ["a", "b"]
    assert np.array_equal(samples[0].pixels[0], image(seed=2))
    assert np.array_equal(samples[0].labels, LABELS)


def test_the_index_chooses_and_groups(tmp_path):
    index = "id,kind,fov\na,fluo,f1\nb,fluo,f1\nc,other,f2\nd,fluo,\n"
    images = {stem: image() for stem in "abcd"}
    fields = folder(tmp_path, images, dict.fromkeys("abcd", LABELS), index)
    data = DataSettings(**fields, where={"kind": ("fluo",)}, group="fov")
    samples = load_samples(data, 1)
    assert [sample.name for sample in samples] == ["a", "b", "d"]
    assert samples[0].group == samples[1].group != samples[2].group


@pytest.mark.parametrize(
    ("images", "masks", "told"),
    [
        ({"a": image(), "b": image()}, {"a": LABELS}, "no mask for b"),
        ({"a": image()}, {"a": LABELS, "b": LABELS}, "no image for the mask of b"),
        ({"a": image((40, 50))}, {"a": LABELS}, "40 x 48 pixels, its image has 40 x 50"),
        ({"a": image()}, {"a": LABELS.astype(np.float32) / 2}, "no label image, it has fractions"),
        ({"a": image()}, {"a": np.where(LABELS, LABELS, np.nan)}, "it has fractions or NaN"),
        (
            {"a": image()},
            {"a": -LABELS.astype(np.int16)},
            "no label image, it has negative numbers",
        ),
        ({"a": image()}, {"a": np.where(LABELS, 255, 0).astype(np.uint8)}, "one number, 255"),
        ({"a": image()}, {"a": np.stack([LABELS] * 3, -1).astype(np.uint8)}, "it has 3 channels"),
        ({"a": image((40, 48, 3))}, {"a": LABELS}, "RGB"),
        ({"a": image()}, {"a": LABELS * 0}, "holds an object"),
        ({}, {}, "no images in"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path, images, masks, told):
    with pytest.raises(InputError, match=told) as caught:
        load_samples(DataSettings(**folder(tmp_path, images, masks)), 1)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_or_column_is_a_setting_that_is_wrong(tmp_path):
    fields = folder(tmp_path, {"a": image()}, {"a": LABELS}, "id,kind\na,x\n")
    with pytest.raises(SettingsError, match="not a folder"):
        load_samples(DataSettings(**(fields | {"masks": tmp_path / "none"})), 1)
    with pytest.raises(SettingsError, match="no column 'fov'"):
        load_samples(DataSettings(**fields, group="fov"), 1)
    with pytest.raises(SettingsError, match="lets no row"):
        load_samples(DataSettings(**fields, where={"kind": ("y",)}), 1)


def test_a_truncated_mask_is_named(tmp_path):
    fields = folder(tmp_path, {"a": image()}, {"a": LABELS})
    path = tmp_path / "masks" / "a.tif"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"a\.tif"):
        load_samples(DataSettings(**fields), 1)


def sample(name, group, stratum=""):
    return Sample(name, image()[None], LABELS.astype(np.uint32), group, stratum)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("xy")), min_size=2, max_size=60),
    st.integers(0, 5),
    st.floats(0.05, 0.9),
)
def test_a_group_is_never_on_both_sides(rows, seed, share):
    samples = [sample(f"{n:03}", f"g{g}", s) for n, (g, s) in enumerate(rows)]
    if len({one.group for one in samples}) == 1:
        with pytest.raises(InputError, match="one field of view"):
            split_samples(samples, share, seed)
        return
    try:
        split = split_samples(samples, share, seed)
    except InputError as error:  # few large groups: all of them would go to one side
        assert "nothing is left" in str(error)
        return
    sides = [{one.group for one in side} for side in (split.training, split.validation)]
    assert not sides[0] & sides[1]
    assert sorted(one.name for side in (split.training, split.validation) for one in side) == [
        one.name for one in samples
    ]


def test_the_split_keeps_its_share_in_every_stratum():
    samples = [sample(f"{n:03}", f"g{n}", "xy"[n % 5 == 0]) for n in range(200)]
    split = split_samples(samples, 0.2, 7)
    for stratum, count in (("x", 160), ("y", 40)):
        chosen = [one for one in split.validation if one.stratum == stratum]
        assert abs(len(chosen) - 0.2 * count) <= 1
    assert split_samples(samples, 0.2, 7).digest == split.digest
    assert split_samples(samples, 0.2, 8).digest != split.digest


def test_one_image_cannot_be_split():
    with pytest.raises(InputError, match="1 image of one field of view"):
        split_samples([sample("a", "=a")], 0.2, 0)


def test_a_mask_of_one_object_is_a_label_image(tmp_path):
    masks = {"a": (LABELS == 1).astype(np.uint8) * 255}
    data = DataSettings(**folder(tmp_path, {"a": image()}, masks))
    assert load_samples(data, 1)[0].labels.max() == 255


@pytest.mark.parametrize("largest", [2**24 + 1, 2**31 + 1, 2**32 - 1])
def test_ids_are_read_exactly_however_large(tmp_path, largest):
    labels = LABELS.astype(np.uint32)
    labels[labels == 2] = largest
    tifffile.imwrite(tmp_path / "a.tif", labels)
    assert np.array_equal(read_labels(tmp_path / "a.tif", labels.shape), labels)


def test_a_mask_of_classes_may_be_of_one_in_pieces_but_of_no_other_number(tmp_path):
    masks = {"a": (LABELS > 0).astype(np.uint8), "b": LABELS}
    data = DataSettings(**folder(tmp_path, dict.fromkeys("ab", image()), masks))
    samples = load_samples(data, 1, ("ground", "one", "two"))
    assert [sample.labels.max() for sample in samples] == [1, 2]
    with pytest.raises(
        InputError, match=r"b\.tif: it holds the number 2; expected one from 0 to 1"
    ):
        load_samples(data, 1, ("ground", "one"))
