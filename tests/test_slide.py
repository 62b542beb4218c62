"""Every format against the array written into it; lazy, bounded, loud about what it cannot read."""

from __future__ import annotations

import json
import os
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from segpipe.errors import InputError
from segpipe.geometry import Box
from segpipe.slide import (
    IMAGE_SUFFIXES,
    Level,
    Slide,
    input_fingerprint,
    omezarr,
    open_slide,
    picture,
    select_channels,
    source,
    tiff_coding,
    tiff_level,
)
from segpipe.slide.segments import SegmentCache, jpeg_size

Pixels = np.ndarray[Any, np.dtype[Any]]
SHARED = Path(__file__).parents[2] / "shared/data"


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> Pixels:
    """Random values over the whole range of the dtype (floats: standard normal)."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return rng.standard_normal(shape).astype(kind)
    if kind.kind == "b":
        return rng.random(shape) < 0.5
    bounds = np.iinfo(kind)
    low, high = max(bounds.min, -(2**24)), min(bounds.max, 2**24)
    return rng.integers(low, high, shape, dtype=kind, endpoint=True)


def smooth(height: int, width: int) -> Pixels:
    """(height, width, 3) uint8 without edges, which JPEG keeps to a few grey levels."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y + x, 255 - y, x // 2 + 60], axis=-1).astype(np.uint8)


def whole(slide: Slide) -> Pixels:
    return slide.read(Box(0, 0, *slide.shape[1:]))


def one_line(error: pytest.ExceptionInfo[InputError], path: Path) -> str:
    """The message, which is one line, begins with the name and says what to do."""
    message = str(error.value)
    assert message.isprintable()
    assert message.startswith(f"{path.name}: ")
    assert "; " in message
    return message


# --- formats --------------------------------------------------------------------------------

TIFF_OPTIONS: dict[str, tuple[tuple[int, ...], str, dict[str, Any]]] = {
    "one strip": ((70, 83), "uint8", {}),
    "strips": ((70, 83), "uint16", {"rowsperstrip": 9}),
    "strips big-endian": ((70, 83), "uint16", {"rowsperstrip": 9, "byteorder": ">"}),
    "tiles": ((70, 83), "uint16", {"tile": (32, 16)}),
    "tiles of the whole width": ((64, 32), "uint16", {"tile": (16, 32)}),
    "tiles big-endian float": ((70, 83), "float32", {"tile": (32, 16), "byteorder": ">"}),
    "BigTIFF": ((70, 83), "uint8", {"bigtiff": True, "tile": (32, 32), "compression": "lzw"}),
    "LZW predictor": ((70, 83), "uint16", {"compression": "lzw", "predictor": True}),
    "deflate one strip": ((70, 83), "uint8", {"compression": "zlib", "rowsperstrip": 70}),
    "deflate predictor": (
        (70, 83, 3),
        "uint8",
        {"compression": "zlib", "predictor": True, "tile": (32, 32), "photometric": "rgb"},
    ),
    "zstd": ((70, 83), "uint16", {"compression": "zstd", "tile": (16, 16)}),
    "lzma": ((70, 83), "uint16", {"compression": "lzma", "rowsperstrip": 20}),
    "packbits": ((70, 83), "uint8", {"compression": "packbits", "rowsperstrip": 8}),
    "float predictor": ((70, 83), "float32", {"compression": "zlib", "predictor": 3}),
    "JPEG 2000": ((70, 83), "uint16", {"compression": 34712, "tile": (32, 32)}),
    "12 bits": ((70, 84), "uint16", {"bitspersample": 12, "compression": None}),
    "RGB": ((70, 83, 3), "uint8", {"photometric": "rgb"}),
    "RGB strips": ((70, 83, 3), "uint16", {"photometric": "rgb", "rowsperstrip": 7}),
    "RGB separate": ((3, 70, 83), "uint8", {"photometric": "rgb", "planarconfig": "separate"}),
    "RGB separate tiles": (
        (3, 70, 83),
        "uint16",
        {"photometric": "rgb", "planarconfig": "separate", "tile": (32, 16), "compression": "zstd"},
    ),
    "float16": ((70, 83), "float16", {}),
    "float64": ((70, 83), "float64", {"compression": "zlib"}),
    "int8": ((70, 83), "int8", {}),
    "int16": ((70, 83), "int16", {"tile": (32, 32)}),
    "uint32": ((70, 83), "uint32", {}),
    "int32": ((70, 83), "int32", {"compression": "lzw"}),
    "one pixel": ((1, 1), "uint8", {}),
    "one row": ((1, 83), "uint16", {"compression": "zlib"}),
    "one column": ((70, 1), "uint8", {"tile": (16, 16)}),
    "channels as samples": (
        (70, 83, 5),
        "uint16",
        {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"},
    ),
    "channels as pages": (
        (4, 70, 83),
        "uint16",
        {
            "photometric": "minisblack",
            "compression": "zlib",
            "tile": (32, 32),
            "metadata": {"axes": "CYX"},
        },
    ),
    "channels in one block": (
        (4, 70, 83),
        "uint16",
        {"photometric": "minisblack", "metadata": {"axes": "CYX"}},
    ),
    "OME YX": ((70, 83), "uint16", {"ome": True, "tile": (32, 32)}),
    "OME CYX": (
        (3, 70, 83),
        "uint16",
        {"ome": True, "photometric": "minisblack", "metadata": {"axes": "CYX"}},
    ),
    "OME CYX tiles": (
        (2, 70, 83),
        "float32",
        {
            "ome": True,
            "photometric": "minisblack",
            "metadata": {"axes": "CYX"},
            "tile": (16, 32),
            "compression": "zlib",
        },
    ),
    "OME YXS": (
        (70, 83, 3),
        "uint8",
        {"ome": True, "photometric": "rgb", "metadata": {"axes": "YXS"}, "tile": (32, 32)},
    ),
    "OME SYX": (
        (3, 70, 83),
        "uint8",
        {
            "ome": True,
            "photometric": "rgb",
            "planarconfig": "separate",
            "metadata": {"axes": "SYX"},
        },
    ),
    "ImageJ": ((70, 83), "uint16", {"imagej": True}),
    "ImageJ CYX": ((3, 70, 83), "uint16", {"imagej": True, "metadata": {"axes": "CYX"}}),
    "ImageJ RGB": ((70, 83, 3), "uint8", {"imagej": True, "photometric": "rgb"}),
    "ImageJ compressed": (
        (3, 70, 83),
        "uint8",
        {"imagej": True, "metadata": {"axes": "CYX"}, "compression": "zlib"},
    ),
}


def write_tiff(path: Path, name: str) -> Pixels:
    """The (C, Y, X) that was written."""
    shape, dtype, options = TIFF_OPTIONS[name]
    pixels = noise(*shape, dtype=dtype)
    if name == "12 bits":
        pixels = pixels & np.uint16(4095)
    tifffile.imwrite(path, pixels, **options)
    if pixels.ndim == 2:
        return pixels[None]
    return np.moveaxis(pixels, -1, 0) if pixels.shape[:2] == (70, 83) else pixels


def write_zarr(
    path: Path,
    pixels: Pixels,
    axes: str,
    version: str = "0.5",
    change: Callable[[dict[str, Any]], None] = lambda metadata: None,
    **options: Any,
) -> None:
    """An OME-Zarr image with two levels; `change` may edit the metadata first."""
    group = zarr.open_group(str(path), mode="w", zarr_format=2 if version == "0.4" else 3)
    chunks = tuple(16 if axis in "yx" else 1 for axis in axes)
    for level, step in enumerate((1, 2)):
        data = pixels[tuple(slice(None, None, step if axis in "yx" else 1) for axis in axes)]
        settings_of_array = {"chunks": chunks, **options}
        array = group.create_array(
            str(level), shape=data.shape, dtype=data.dtype, **settings_of_array
        )
        array[...] = data
    kinds = {"t": "time", "c": "channel"}
    described = [
        {"name": axis, "type": kinds.get(axis, "space")}
        | ({} if axis in kinds else {"unit": "nanometer"})
        for axis in axes
    ]
    scale = [500.0 if axis in "yx" else 1.0 for axis in axes]
    datasets = [
        {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": scale}]},
        {"path": "1", "coordinateTransformations": [{"type": "scale", "scale": scale}]},
    ]
    metadata: dict[str, Any] = {"multiscales": [{"axes": described, "datasets": datasets}]}
    if version == "0.4":
        metadata["multiscales"][0]["version"] = version
    else:
        metadata["version"] = version
    change(metadata)
    group.attrs.update(metadata if version == "0.4" else {"ome": metadata})


def write_any(folder: Path, name: str) -> tuple[Path, Pixels]:
    """A file of the named format and the (C, Y, X) that it should read as."""
    if name in TIFF_OPTIONS:
        path = folder / f"{name}{'.ome' if 'OME' in name else ''}.tif"
        return path, write_tiff(path, name)
    if name.startswith("zarr"):
        path = folder / f"{name}.zarr"
        axes = name.rsplit(" ", 1)[-1]
        shape = tuple({"t": 1, "c": 3, "z": 1, "y": 50, "x": 61}[axis] for axis in axes)
        pixels = noise(*shape, dtype="uint16")
        version = "0.4" if "0.4" in name else "0.5"
        options: dict[str, Any] = {}
        if "shards" in name:
            options["shards"] = tuple(32 if axis in "yx" else 1 for axis in axes)
        write_zarr(path, pixels, axes, version, **options)
        return path, pixels.reshape(-1, 50, 61)
    path = folder / f"{name}.png"
    kind, dtype = name.split(" ")[1:]
    samples = {"grey": 1, "grey+alpha": 2, "rgb": 3, "rgba": 4}[kind]
    pixels = noise(40, 53, samples, dtype=dtype)
    path.write_bytes(imagecodecs.png_encode(pixels))
    return path, np.moveaxis(pixels, -1, 0)[: {2: 1, 4: 3}.get(samples, samples)]


FORMATS = [
    *TIFF_OPTIONS,
    *(f"png {kind} uint8" for kind in ("grey", "grey+alpha", "rgb", "rgba")),
    *(f"png {kind} uint16" for kind in ("grey", "grey+alpha", "rgb", "rgba")),
    *(f"zarr {version} {axes}" for version in ("0.4", "0.5") for axes in ("yx", "cyx", "tczyx")),
    "zarr 0.5 shards cyx",
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Slide, Pixels]]]:
    folder = tmp_path_factory.mktemp("formats")
    opened: dict[str, tuple[Slide, Pixels]] = {}
    for name in FORMATS:
        path, pixels = write_any(folder, name)
        opened[name] = open_slide(path), pixels
    yield opened
    for slide, _ in opened.values():
        slide.close()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_as_it_was_written(
    written: dict[str, tuple[Slide, Pixels]], name: str
) -> None:
    slide, pixels = written[name]
    assert slide.shape == pixels.shape
    assert slide.levels[0] == Level(pixels.shape[1:], 1.0)
    kept = pixels.dtype in (np.uint8, np.uint16, np.float32)
    assert slide.dtype == (pixels.dtype if kept else np.float32)
    assert slide.rgb == (
        "rgb" in name.lower() or name in ("OME YXS", "OME SYX", "deflate predictor")
    )
    read = whole(slide)
    assert read.dtype == slide.dtype
    assert read.dtype.isnative
    assert read.flags.writeable
    np.testing.assert_array_equal(read, pixels.astype(slide.dtype))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_box_is_a_slice_of_the_whole(
    written: dict[str, tuple[Slide, Pixels]], data: st.DataObject
) -> None:
    slide, pixels = written[data.draw(st.sampled_from(FORMATS))]
    count, height, width = slide.shape
    y = sorted(data.draw(st.tuples(st.integers(0, height), st.integers(0, height))))
    x = sorted(data.draw(st.tuples(st.integers(0, width), st.integers(0, width))))
    box = Box(y[0], x[0], y[1], x[1])
    channels = data.draw(st.none() | st.lists(st.integers(0, count - 1), max_size=3))
    picked = list(range(count)) if channels is None else channels
    expected = pixels[(picked, *box.slices)].astype(slide.dtype)
    read = slide.read(box, channels)
    assert read.shape == (len(picked), *box.shape)
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (32, 32), "subsampling": (1, 1)},
        {"tile": (32, 48), "subsampling": (2, 2)},
        {"rowsperstrip": 16, "subsampling": (2, 1)},
    ],
)
def test_jpeg_tiff_reads_as_rgb(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "jpeg.tif"
    tifffile.imwrite(path, smooth(70, 83), photometric="rgb", compression="jpeg", **options)
    with open_slide(path) as slide:
        assert slide.rgb
        assert slide.compression == "jpeg"
        read = whole(slide)
        np.testing.assert_array_equal(slide.read(Box(20, 30, 50, 70)), read[:, 20:50, 30:70])
    np.testing.assert_array_equal(np.moveaxis(read, 0, -1), tifffile.imread(path))
    assert np.abs(np.moveaxis(read, 0, -1).astype(int) - smooth(70, 83)).mean() < 3


def test_jpeg_tables_shared_by_all_strips(tmp_path: Path) -> None:
    path = tmp_path / "tables.tif"
    Image.fromarray(smooth(70, 83)).save(path, compression="jpeg", quality=95)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages.first.jpegtables
    with open_slide(path) as slide:
        assert np.abs(np.moveaxis(whole(slide), 0, -1).astype(int) - smooth(70, 83)).max() < 30


def test_aperio_jpeg_2000_in_ycbcr_reads_as_rgb(tmp_path: Path) -> None:
    path = tmp_path / "aperio.svs"
    rgb = smooth(64, 64)
    ycbcr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    tile = imagecodecs.jpeg2k_encode(ycbcr, level=0, codecformat="j2k", mct=False)
    tifffile.imwrite(
        path,
        iter([tile]),
        shape=(64, 64, 3),
        dtype="uint8",
        tile=(64, 64),
        photometric="rgb",
        compression=33003,
        metadata=None,
        description="Aperio Image Library v1 |MPP = 0.25",
    )
    with open_slide(path) as slide:
        assert np.abs(np.moveaxis(whole(slide), 0, -1).astype(int) - rgb).max() <= 3


def test_bilevel_is_0_and_255(tmp_path: Path) -> None:
    bits = noise(40, 53, dtype="bool")
    tifffile.imwrite(tmp_path / "raw.tif", bits)
    tifffile.imwrite(tmp_path / "white.tif", ~bits, metadata=None, photometric="miniswhite")
    Image.fromarray(bits).save(tmp_path / "fax.tif", compression="group4")
    Image.fromarray(bits).save(tmp_path / "bits.png")
    for name in ("raw.tif", "white.tif", "fax.tif", "bits.png"):
        with open_slide(tmp_path / name) as slide:
            assert slide.dtype == np.uint8
            np.testing.assert_array_equal(whole(slide)[0], bits * np.uint8(255), err_msg=name)


def test_min_is_white_is_inverted_but_not_imagej_s(tmp_path: Path) -> None:
    pixels = noise(20, 30, dtype="uint16")
    for options, expected in (({}, 65535 - pixels), ({"imagej": True}, pixels)):
        path = tmp_path / "white.tif"
        tifffile.imwrite(path, pixels, photometric="miniswhite", compression="zlib", **options)
        with open_slide(path) as slide:
            np.testing.assert_array_equal(whole(slide)[0], expected)


def test_palette_is_colours_but_a_display_in_imagej(tmp_path: Path) -> None:
    index = noise(20, 30)
    colours = noise(3, 256, dtype="uint16", seed=1)
    tifffile.imwrite(tmp_path / "plain.tif", index, photometric="palette", colormap=colours)
    with open_slide(tmp_path / "plain.tif") as slide:
        assert slide.rgb
        assert slide.dtype == np.uint8
        np.testing.assert_array_equal(whole(slide), (colours >> 8)[:, index])
        np.testing.assert_array_equal(slide.read(Box(1, 2, 3, 4), [2]), whole(slide)[2:, 1:3, 2:4])
    tifffile.imwrite(
        tmp_path / "ij.tif", index, photometric="palette", colormap=colours, imagej=True
    )
    with open_slide(tmp_path / "ij.tif") as slide:
        np.testing.assert_array_equal(whole(slide)[0], index)


def test_alpha_is_dropped_and_other_extra_samples_are_not(tmp_path: Path) -> None:
    pixels = noise(20, 30, 4)
    path = tmp_path / "alpha.tif"
    for kind, names in (
        ("unassalpha", ("red", "green", "blue")),
        ("assocalpha", ("red", "green", "blue")),
        ("unspecified", ("0", "1", "2", "3")),
    ):
        tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=[kind])
        with open_slide(path) as slide:
            assert slide.channel_names == names
            assert slide.rgb == (len(names) == 3)
            expected = np.moveaxis(pixels, -1, 0)[: len(names)]
            np.testing.assert_array_equal(whole(slide), expected)


def test_jpeg_and_palette_pictures(tmp_path: Path) -> None:
    Image.fromarray(smooth(70, 83)).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(smooth(70, 83)[..., 0]).save(tmp_path / "grey.jpeg", quality=95)
    with open_slide(tmp_path / "a.jpg") as slide, Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(np.moveaxis(whole(slide), 0, -1), np.asarray(image))
        assert slide.channel_names == ("red", "green", "blue")
        assert (slide.reader, slide.compression) == ("pillow/jpeg", "jpeg")
    with open_slide(tmp_path / "grey.jpeg") as slide:
        assert slide.shape == (1, 70, 83)
    indexed = Image.fromarray(noise(20, 30) % 4).convert("L").convert("P")
    indexed.putpalette([9, 8, 7, 200, 10, 20, 30, 40, 50, 1, 2, 3])
    indexed.save(tmp_path / "p.png", transparency=b"\x00\x80\xff\xff")
    with open_slide(tmp_path / "p.png") as slide:
        colours = np.array([[9, 8, 7], [200, 10, 20], [30, 40, 50], [1, 2, 3]], np.uint8)
        np.testing.assert_array_equal(np.moveaxis(whole(slide), 0, -1), colours[noise(20, 30) % 4])


def test_a_picture_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pixels = write_any(tmp_path, "png rgb uint8")
    with open_slide(path) as slide:
        decode = picture.PictureSource._decode_file
        decoded = []

        def count(source: picture.PictureSource) -> Pixels:
            decoded.append(1)
            return decode(source)

        monkeypatch.setattr(picture.PictureSource, "_decode_file", count)
        for _ in range(3):
            np.testing.assert_array_equal(slide.read(Box(3, 4, 9, 20)), pixels[:, 3:9, 4:20])
        assert decoded == [1]


def test_one_name_of_a_format_is_enough() -> None:
    assert {".tif", ".ndpi", ".jpeg"} <= IMAGE_SUFFIXES
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    path, pixels = write_any(tmp_path, "png rgb uint8")
    renamed = path.rename(tmp_path / "picture.tif")
    with open_slide(renamed) as slide:
        np.testing.assert_array_equal(whole(slide), pixels)


# --- metadata -------------------------------------------------------------------------------


def test_pyramids_report_their_levels_and_read_the_finest(tmp_path: Path) -> None:
    pixels = noise(2, 64, 96, dtype="uint16")
    path = tmp_path / "pyramid.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        options: dict[str, Any] = {"tile": (16, 16), "photometric": "minisblack"}
        tiff.write(pixels, subifds=2, metadata={"axes": "CYX"}, **options)
        tiff.write(pixels[:, ::2, ::2], subfiletype=1, **options)
        tiff.write(pixels[:, ::4, ::4], subfiletype=1, **options)
    with open_slide(path) as slide:
        assert tuple(level.shape for level in slide.levels) == ((64, 96), (32, 48), (16, 24))
        np.testing.assert_array_equal(whole(slide), pixels)
    path, _ = write_any(tmp_path, "zarr 0.5 cyx")
    with open_slide(path) as slide:
        assert tuple(level.shape for level in slide.levels) == ((50, 61), (25, 31))


def test_a_pyramid_of_pages_in_a_plain_tiff(tmp_path: Path) -> None:
    pixels = noise(64, 96)
    path = tmp_path / "pages.tif"
    with tifffile.TiffWriter(path) as tiff:
        for level, step in enumerate((1, 2, 4)):
            tiff.write(
                pixels[::step, ::step],
                tile=(16, 16),
                subfiletype=min(level, 1),
                metadata=None,
            )
    with open_slide(path) as slide:
        assert tuple(level.shape for level in slide.levels) == ((64, 96), (32, 48), (16, 24))
        np.testing.assert_array_equal(whole(slide)[0], pixels)


def write_svs(path: Path, pixels: Pixels, description: str, **options: Any) -> None:
    """An SVS: baseline, thumbnail, one more level, label and macro."""
    with tifffile.TiffWriter(path) as tiff:
        common: dict[str, Any] = {"photometric": "rgb", "metadata": None}
        tile = {"tile": (16, 16)}
        tiff.write(pixels, description=description, **tile, **common, **options)
        tiff.write(pixels[::8, ::8], description="Aperio thumbnail", **common)
        tiff.write(pixels[::2, ::2], description="Aperio level", **tile, **common)
        tiff.write(noise(30, 20, 3), subfiletype=1, description="Aperio label", **common)
        tiff.write(noise(31, 90, 3), subfiletype=9, description="Aperio macro", **common)


def test_svs_leaves_thumbnail_label_and_macro_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.svs"
    pixels = noise(96, 80, 3)
    write_svs(path, pixels, "Aperio Image Library v1\n96x80 |AppMag = 20|MPP = 0.4990|Left = 1")
    with open_slide(path) as slide:
        assert tuple(level.shape for level in slide.levels) == ((96, 80), (48, 40))
        assert slide.pixel_size_um == 0.499
        assert slide.reader == "tifffile/svs"
        np.testing.assert_array_equal(whole(slide), np.moveaxis(pixels, -1, 0))


def test_ndpi_reads_the_largest_picture(tmp_path: Path) -> None:
    path = tmp_path / "ndpi.tif"
    ndpi = [(65420, "I", 1, 1, True), (271, "s", 0, "Hamamatsu", True)]
    pixels = noise(96, 80, 3)
    with tifffile.TiffWriter(path) as tiff:
        for picture in (pixels, noise(31, 50, 3), noise(20, 90)):
            tiff.write(picture, extratags=ndpi, metadata=None)
    with open_slide(path) as slide:
        assert slide.reader == "tifffile/ndpi"
        np.testing.assert_array_equal(whole(slide), np.moveaxis(pixels, -1, 0))


def write_scn(path: Path, *sizes_um: float) -> list[Pixels]:
    """A Leica SCN with a picture for each pixel size."""
    pictures = [noise(48, 64, 3, seed=n) for n in range(len(sizes_um))]
    images = "".join(
        f'<image name="image_{n}"><pixels sizeX="64" sizeY="48">'
        f'<dimension sizeX="64" sizeY="48" r="0" ifd="{n}"/></pixels></image>'
        for n in range(len(sizes_um))
    )
    xml = f'<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection>{images}'
    with tifffile.TiffWriter(path) as tiff:
        for n, (picture, size) in enumerate(zip(pictures, sizes_um, strict=True)):
            tiff.write(
                picture,
                photometric="rgb",
                tile=(16, 16),
                description=f"{xml}</collection></scn>" if n == 0 else "",
                resolution=(1e4 / size, 1e4 / size),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return pictures


def test_scn_reads_the_scan_and_not_the_macro(tmp_path: Path) -> None:
    path = tmp_path / "a.scn"
    pictures = write_scn(path, 16.0, 0.5)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(whole(slide), np.moveaxis(pictures[1], -1, 0))
        assert slide.pixel_size_um == pytest.approx(0.5)
    write_scn(path, 16.0, 0.5, 0.5)
    with pytest.raises(InputError, match="has 2 scenes") as error:
        open_slide(path)
    one_line(error, path)


def test_qptiff_names_its_channels(tmp_path: Path) -> None:
    path = tmp_path / "a.qptiff"
    planes = noise(2, 64, 48, dtype="uint16")
    with tifffile.TiffWriter(path) as tiff:
        for name, plane in zip(("DAPI", "CD8"), planes, strict=True):
            xml = f"<PerkinElmer-QPI-ImageDescription><Name>{name}</Name>"
            tiff.write(
                plane,
                description=f"{xml}</PerkinElmer-QPI-ImageDescription>",
                software="PerkinElmer-QPI",
                tile=(16, 16),
                resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
        tiff.write(noise(20, 20, 3), photometric="rgb", software="PerkinElmer-QPI", metadata=None)
    with open_slide(path) as slide:
        assert slide.channel_names == ("DAPI", "CD8")
        assert slide.pixel_size_um == pytest.approx(0.5)
        np.testing.assert_array_equal(whole(slide), planes)


def test_ome_states_names_and_pixel_size(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    metadata = {
        "axes": "CYX",
        "Channel": {"Name": ["DAPI", "", "GFP"]},
        "PhysicalSizeX": 325.0,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": 0.326,
        "PhysicalSizeYUnit": "µm",
    }
    pixels = noise(3, 20, 30, dtype="uint16")
    tifffile.imwrite(path, pixels, photometric="minisblack", ome=True, metadata=metadata)
    with open_slide(path) as slide:
        assert slide.channel_names == ("DAPI", "1", "GFP")
        assert not slide.rgb
        assert slide.pixel_size_um == pytest.approx(0.3255)
        assert slide.reader == "tifffile/ome"


def test_ome_leaves_label_and_macro_images_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    pixels = noise(60, 40, dtype="uint16")
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(pixels, metadata={"axes": "YX", "Name": "slide.svs [0]"})
        tiff.write(noise(9, 9), metadata={"axes": "YX", "Name": "label image"})
        tiff.write(noise(8, 30), metadata={"axes": "YX", "Name": "macro image"})
    with open_slide(path) as slide:
        np.testing.assert_array_equal(whole(slide)[0], pixels)
    tifffile.imwrite(path, pixels, ome=True, metadata={"axes": "YX", "Name": "Overview"})
    with open_slide(path) as slide:
        np.testing.assert_array_equal(whole(slide)[0], pixels)


def test_imagej_states_labels_and_pixel_size(tmp_path: Path) -> None:
    path = tmp_path / "ij.tif"
    metadata = {"axes": "CYX", "Labels": ["DAPI", "GFP"], "unit": "micron"}
    pixels = noise(2, 20, 30, dtype="uint16")
    tifffile.imwrite(path, pixels, imagej=True, metadata=metadata, resolution=(4, 4))
    with open_slide(path) as slide:
        assert slide.channel_names == ("DAPI", "GFP")
        assert slide.pixel_size_um == 0.25


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (25400, 25400), "resolutionunit": "INCH"}, 1.0),
        ({"resolution": (20000, 20100), "resolutionunit": "CENTIMETER"}, 0.49876),
        ({"resolution": (300, 300), "resolutionunit": "CENTIMETER"}, None),
        ({"resolution": (20000, 20000), "resolutionunit": "NONE"}, None),
        ({"imagej": True, "resolution": (4, 4)}, None),
        ({"imagej": True, "resolution": (72, 72), "metadata": {"unit": "inch"}}, None),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "pixel"}}, None),
        ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "um"}}, 0.25),
        (
            {"imagej": True, "resolution": (4, 4), "metadata": {"unit": "um", "yunit": "nm"}},
            None,
        ),
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.5}}, None),
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}}, 0.5),
        (
            {
                "ome": True,
                "metadata": {
                    "PhysicalSizeX": 1.0,
                    "PhysicalSizeXUnit": "pixel",
                    "PhysicalSizeY": 1.0,
                    "PhysicalSizeYUnit": "pixel",
                },
            },
            None,
        ),
    ],
)
def test_a_pixel_size_is_stated_or_none(
    tmp_path: Path, options: dict[str, Any], expected: float | None
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(20, 30), **options)
    with open_slide(path) as slide:
        assert slide.pixel_size_um == (
            expected if expected is None else pytest.approx(expected, abs=1e-5)
        )


def test_zarr_states_names_and_pixel_size(tmp_path: Path) -> None:
    def add_omero(metadata: dict[str, Any]) -> None:
        metadata["omero"] = {"channels": [{"label": "DAPI"}, {"color": "00FF00"}]}

    def add_scale(metadata: dict[str, Any]) -> None:
        more = [{"type": "scale", "scale": [1, 2, 2]}]
        metadata["multiscales"][0]["coordinateTransformations"] = more

    def drop_unit(metadata: dict[str, Any]) -> None:
        for axis in metadata["multiscales"][0]["axes"]:
            axis.pop("unit", None)

    pixels = noise(2, 20, 30, dtype="uint16")
    for version in omezarr.VERSIONS:
        path = tmp_path / f"{version}.zarr"
        write_zarr(path, pixels, "cyx", version, add_omero)
        with open_slide(path) as slide:
            assert slide.channel_names == ("DAPI", "1")
            assert slide.pixel_size_um == 0.5
            assert slide.reader == f"zarr/{version}"
            assert slide.compression == ("blosc" if version == "0.4" else "zstd")
        write_zarr(path, pixels, "cyx", version, add_scale)
        with open_slide(path) as slide:
            assert slide.pixel_size_um == 1.0
        write_zarr(path, pixels, "cyx", version, drop_unit)
        with open_slide(path) as slide:
            assert slide.pixel_size_um is None


@pytest.mark.parametrize(("first", "rgb"), [("red", True), ("DAPI", False)])
def test_zarr_is_rgb_when_its_channels_are_called_so(tmp_path: Path, first: str, rgb: bool) -> None:
    path = tmp_path / "a.zarr"
    channels = [{"label": label, "color": "FF0000"} for label in (first, "green", "blue")]

    def add_omero(metadata: dict[str, Any]) -> None:
        metadata["omero"] = {"channels": channels}

    write_zarr(path, noise(3, 20, 30), "cyx", change=add_omero)
    with open_slide(path) as slide:
        assert slide.channel_names == (first, "green", "blue")
        assert slide.rgb == rgb


def test_the_only_scene_of_a_bioformats2raw_folder(tmp_path: Path) -> None:
    pixels = noise(2, 20, 30, dtype="uint16")
    root = tmp_path / "raw.zarr"
    zarr.open_group(str(root), mode="w", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    write_zarr(root / "0", pixels, "cyx", "0.4")
    with open_slide(root) as slide:
        np.testing.assert_array_equal(whole(slide), pixels)
    write_zarr(root / "1", pixels, "cyx", "0.4")
    with pytest.raises(InputError, match="has 2 scenes") as error:
        open_slide(root)
    one_line(error, root)
    with open_slide(root / "1") as slide:
        np.testing.assert_array_equal(whole(slide), pixels)


# --- lazy -----------------------------------------------------------------------------------

SIDE, TILE = 50_000, 512


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50,000 x 50,000 pixels in tiles; tile n holds n % 5, and is absent when that is 0."""
    path = tmp_path_factory.mktemp("large") / "large.tif"
    tiles = [zlib.compress(np.full((TILE, TILE), n, np.uint8).tobytes(), 1) for n in range(5)]
    columns = -(-SIDE // TILE)
    tifffile.imwrite(
        path,
        (tiles[n % 5] if n % 5 else b"" for n in range(columns**2)),
        shape=(SIDE, SIDE),
        dtype="uint8",
        tile=(TILE, TILE),
        compression="zlib",
    )
    return path


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Indices of the segments that are decoded from now on."""
    decoded: list[int] = []
    decode = tiff_coding.decode

    def count(keyframe: Any, data: bytes, index: int, *more: Any) -> Pixels:
        decoded.append(index)
        return decode(keyframe, data, index, *more)

    monkeypatch.setattr(tiff_level, "decode", count)
    return decoded


def test_a_box_decodes_the_tiles_that_it_meets(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = counting(monkeypatch)
    tracemalloc.start()
    with open_slide(large) as slide:
        assert slide.shape == (1, SIDE, SIDE)
        box = Box(SIDE - 700, 1000, SIDE, 2000)
        read = slide.read(box)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        columns = -(-SIDE // TILE)
        y, x = np.mgrid[box.y0 : box.y1, box.x0 : box.x1] // TILE
        tiles = y * columns + x
        np.testing.assert_array_equal(read[0], tiles % 5)
        assert 0 in read
        assert sorted(decoded) == sorted(n for n in np.unique(tiles) if n % 5)
        assert peak < 32 * 2**20
        slide.read(box.shift(-100, 100))
        assert len(decoded) == len(set(decoded))


def test_rows_of_uncompressed_pixels_are_read_from_their_place(tmp_path: Path) -> None:
    """A file of 4 GB with a hole: less memory than one row shows that a box reads its columns."""
    path = tmp_path / "hole.tif"
    height, width = 40_000, 50_000
    pixels = noise(8, 200, dtype="uint16")
    tifffile.imwrite(path, None, shape=(height, width), dtype="uint16", bigtiff=True)
    with tifffile.TiffFile(path) as tiff:
        start = tiff.pages.first.dataoffsets[0]
    with path.open("r+b") as file:
        for row in range(8):
            file.seek(start + ((row + 30_000) * width + 20_000) * 2)
            file.write(pixels[row].tobytes())
    with open_slide(path) as slide:
        tracemalloc.start()
        read = slide.read(Box(29_999, 19_999, 30_009, 20_201))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    np.testing.assert_array_equal(read[0], np.pad(pixels, 1))
    assert peak < 100_000


def test_a_large_strip_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "strip.tif"
    pixels = noise(256, 300)
    tifffile.imwrite(path, pixels, compression="zlib", rowsperstrip=256)
    decoded = counting(monkeypatch)
    with open_slide(path) as slide:
        for y in range(0, 256, 64):
            np.testing.assert_array_equal(
                slide.read(Box(y, 10, y + 64, 200))[0], pixels[y : y + 64, 10:200]
            )
    assert decoded == [0]


def test_the_cache_forgets_what_was_used_least_recently() -> None:
    cache = SegmentCache(limit_bytes=250)
    decoded: list[str] = []

    def get(key: str, size: int = 100) -> None:
        def decode() -> Pixels:
            decoded.append(key)
            return np.zeros(size, np.uint8)

        cache.get(key, decode)

    for key in "ab" + "a" + "c" + "a":
        get(key)
    assert decoded == ["a", "b", "c"]
    get("b")
    assert decoded == ["a", "b", "c", "b"]
    get("large", 1000)
    get("large")
    assert decoded[-1:] == ["large"]
    get("a")
    get("large")
    assert decoded[-2:] == ["a", "large"]


def test_threads_wait_for_one_decoder_and_failures_are_not_remembered() -> None:
    cache = SegmentCache()
    started, release = threading.Event(), threading.Event()
    decoded: list[int] = []

    def slow() -> Pixels:
        decoded.append(1)
        started.set()
        assert release.wait(30)
        return np.arange(3)

    def fail() -> Pixels:
        raise ValueError("no")

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(cache.get, "k", slow)
        assert started.wait(30)
        others = [pool.submit(cache.get, "k", slow) for _ in range(3)]
        release.set()
        for future in (first, *others):
            np.testing.assert_array_equal(future.result(30), np.arange(3))
    assert decoded == [1]
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            cache.get("f", fail)
    np.testing.assert_array_equal(cache.get("f", lambda: np.ones(1)), np.ones(1))


def test_threads_read_one_slide(tmp_path: Path) -> None:
    path = tmp_path / "threads.tif"
    pixels = noise(512, 512, dtype="uint16")
    for options in ({"tile": (64, 64), "compression": "zlib"}, {}):
        tifffile.imwrite(path, pixels, **options)
        rng = np.random.default_rng(1)
        corners = [(int(y), int(x)) for y, x in rng.integers(0, 400, (200, 2))]
        with open_slide(path) as slide, ThreadPoolExecutor(4) as pool:
            boxes = [Box(y, x, y + 112, x + 90) for y, x in corners]
            for box, read in zip(boxes, pool.map(slide.read, boxes), strict=True):
                np.testing.assert_array_equal(read[0], pixels[box.slices])


# --- damage and malice ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"tile": (32, 32), "compression": "zlib"},
        {"rowsperstrip": 16, "compression": "lzw"},
        {"rowsperstrip": 16, "compression": "packbits"},
        {"tile": (32, 32)},
        {},
    ],
)
def test_a_truncated_file_is_named_and_never_black(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "cut.tif"
    pixels = noise(100, 90) | np.uint8(1)
    tifffile.imwrite(path, pixels, **options)
    data = path.read_bytes()
    failed = 0
    for length in range(0, len(data), len(data) // 40):
        path.write_bytes(data[:length])
        try:
            slide = open_slide(path)
        except InputError as error:
            assert str(error).startswith("cut.tif: ")
            failed += 1
            continue
        with slide:
            for box in (Box(0, 0, 20, 90), Box(40, 30, 70, 60), Box(95, 85, 100, 90)):
                try:
                    read = slide.read(box)
                except InputError as error:
                    message = str(error)
                    assert message.startswith("cut.tif: ")
                    assert str(box) in message
                    failed += 1
                else:
                    np.testing.assert_array_equal(read[0], pixels[box.slices])
    assert failed > 40


def test_a_damaged_tile_is_named_with_its_box(tmp_path: Path) -> None:
    path = tmp_path / "damaged.tif"
    tifffile.imwrite(path, noise(64, 64), tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages.first.dataoffsets[3]
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = bytes(40)
    path.write_bytes(data)
    with open_slide(path) as slide:
        slide.read(Box(0, 0, 32, 64))
        with pytest.raises(InputError, match=r"tile 3 \[32:64, 32:64\].*\[10:40, 10:40\]") as error:
            slide.read(Box(10, 10, 40, 40))
    one_line(error, path)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_bytes_in_a_header_end_in_pixels_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    name = data.draw(
        st.sampled_from(["OME CYX tiles", "ImageJ CYX", "deflate predictor", "strips"])
    )
    original = folder / f"original {name}.tif"
    if not original.exists():
        write_tiff(original, name)
    file = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(4, 600))] = data.draw(st.integers(0, 255))
    path = folder / "fuzzed.tif"
    path.write_bytes(file)
    try:
        with open_slide(path) as slide:
            corner = Box(0, 0, min(40, slide.shape[1]), min(40, slide.shape[2]))
            assert slide.read(corner).shape == (slide.shape[0], *corner.shape)
    except InputError as error:
        assert str(error).startswith("fuzzed.tif: ")
        assert str(error).isprintable()


def tagged(path: Path, code: int, value: int) -> None:
    """Overwrite the value of a tag of the first page, whatever it was."""
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages.first.tags[code]
        offset, size = tag.valueoffset, struct.calcsize(tag.dataformat) * tag.count
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.to_bytes(size, "little"))


def refuse_z(path: Path) -> None:
    pixels = noise(5, 20, 30, dtype="uint16")
    tifffile.imwrite(path, pixels, ome=True, photometric="minisblack", metadata={"axes": "ZYX"})


def refuse_t(path: Path) -> None:
    pixels = noise(4, 3, 20, 30, dtype="uint16")
    tifffile.imwrite(path, pixels, imagej=True, metadata={"axes": "TZYX"})


def refuse_pages(path: Path) -> None:
    with tifffile.TiffWriter(path) as tiff:
        for plane in noise(4, 20, 30):
            tiff.write(plane, metadata=None)


def refuse_unnamed_axis(path: Path) -> None:
    tifffile.imwrite(path, noise(4, 20, 30), photometric="minisblack")


def refuse_scenes(path: Path) -> None:
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(noise(20, 30), metadata={"axes": "YX", "Name": "left"})
        tiff.write(noise(20, 30), metadata={"axes": "YX", "Name": "right"})


def refuse_sizes(path: Path) -> None:
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(noise(20, 30), metadata=None)
        tiff.write(noise(19, 31), metadata=None)


def refuse_rgb_stack(path: Path) -> None:
    tifffile.imwrite(path, noise(2, 20, 30, 3), imagej=True, metadata={"axes": "CYXS"})


def refuse_cmyk(path: Path) -> None:
    tifffile.imwrite(path, noise(20, 30, 4), photometric="separated")


def refuse_cmyk_jpeg(path: Path) -> None:
    Image.fromarray(smooth(20, 30)).convert("CMYK").save(path, format="jpeg")


def refuse_lab(path: Path) -> None:
    tifffile.imwrite(path, noise(20, 30, 3), photometric="cielab")


def refuse_raw_ycbcr(path: Path) -> None:
    tifffile.imwrite(path, noise(20, 30, 3), photometric="rgb", compression="zlib")
    tagged(path, 262, 6)


def refuse_compression(path: Path) -> None:
    tifffile.imwrite(path, noise(32, 32), compression="jpegxl", tile=(32, 32))


def refuse_complex(path: Path) -> None:
    tifffile.imwrite(path, np.ones((20, 30), np.complex64))


def refuse_flat_pixels(path: Path) -> None:
    options = {"resolution": (20000, 10000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, noise(20, 30), **options)


def refuse_nothing_written(path: Path) -> None:
    tifffile.imwrite(
        path, iter([b""] * 4), shape=(64, 64), dtype="uint8", tile=(32, 32), compression="zlib"
    )


def refuse_no_offset(path: Path) -> None:
    tifffile.imwrite(path, noise(20, 30))
    tagged(path, 273, 0)
    tagged(path, 279, 0)


def refuse_cut(path: Path) -> None:
    tifffile.imwrite(path, noise(64, 64), tile=(32, 32))
    path.write_bytes(path.read_bytes()[:-500])
    with open_slide(path) as slide:
        slide.read(Box(0, 0, 64, 64))


def refuse_wrong_depth(path: Path) -> None:
    tile = imagecodecs.jpeg2k_encode(noise(32, 32, dtype="uint16"), level=0)
    options: dict[str, Any] = {"tile": (32, 32), "compression": 34712}
    tifffile.imwrite(path, iter([tile]), shape=(32, 32), dtype="uint8", **options)
    with open_slide(path) as slide:
        whole(slide)


def refuse_missing_pages(path: Path) -> None:
    pixels = noise(3, 20, 30)
    metadata = {"axes": "CYX"}
    tifffile.imwrite(
        path, pixels, ome=True, photometric="minisblack", metadata=metadata, tile=(16, 16)
    )
    data = path.read_bytes().replace(b'SizeC="3"', b'SizeC="4"')
    path.write_bytes(data)


def rewrite_ome(path: Path, old: str, new: str) -> None:
    tifffile.imwrite(path, noise(3, 20, 30), photometric="minisblack", metadata=None)
    tifffile.imwrite(
        path.with_suffix(".tmp"),
        noise(3, 20, 30),
        photometric="minisblack",
        ome=True,
        metadata={"axes": "CYX"},
    )
    with tifffile.TiffFile(path.with_suffix(".tmp")) as tiff:
        xml = tiff.ome_metadata
    path.with_suffix(".tmp").unlink()
    assert old in xml
    tifffile.imwrite(
        path,
        noise(3, 20, 30),
        photometric="minisblack",
        metadata=None,
        description=xml.replace(old, new, 1).encode(),
    )


def refuse_other_file(path: Path) -> None:
    new = '<TiffData IFD="0" PlaneCount="3"><UUID FileName="../secret.tif">urn:uuid:1</UUID>'
    rewrite_ome(path, '<TiffData IFD="0" PlaneCount="3"/>', f"{new}</TiffData>")


def refuse_many_planes(path: Path) -> None:
    rewrite_ome(path, 'PlaneCount="3"', 'PlaneCount="3000000000"')


def refuse_entities(path: Path) -> None:
    rewrite_ome(path, "<OME ", '<!DOCTYPE x [<!ENTITY a "b">]><OME ')


def refuse_broken_xml(path: Path) -> None:
    rewrite_ome(path, "<Image ", "<Image <")


def refuse_foreign_xml(path: Path) -> None:
    rewrite_ome(path, 'SizeX="30"', 'SizeX="31"')


def refuse_width(path: Path) -> None:
    tifffile.imwrite(path, noise(20, 30), compression="zlib", rowsperstrip=20)
    tagged(path, 256, 2**32 - 1)


def refuse_expansion(path: Path) -> None:
    tifffile.imwrite(path, noise(20, 30), compression="zlib", rowsperstrip=20)
    tagged(path, 256, 2**20)
    tagged(path, 257, 2**20)


def refuse_segment(path: Path) -> None:
    tifffile.imwrite(path, noise(20, 30), compression="zlib", rowsperstrip=20)
    for code in (278, 256, 257):
        tagged(path, code, 2**17)
    with path.open("ab") as file:
        file.truncate(2**20)


def refuse_text(path: Path) -> None:
    path.write_text("not an image\n")


def refuse_empty(path: Path) -> None:
    path.write_bytes(b"")


def refuse_stub(path: Path) -> None:
    path.write_bytes(b"II*\0\xff\xff\xff\xff")


def refuse_no_page(path: Path) -> None:
    path.write_bytes(b"II*\0\0\0\0\0")


def refuse_folder(path: Path) -> None:
    path.mkdir()


def refuse_fifo(path: Path) -> None:
    os.mkfifo(path)


def refuse_png_bomb(path: Path) -> None:
    image = bytearray(imagecodecs.png_encode(noise(4, 4)))
    image[16:24] = struct.pack(">II", 40_000, 40_000)
    path.write_bytes(image)


def refuse_jpeg_bomb(path: Path) -> None:
    image = bytearray(imagecodecs.jpeg_encode(smooth(16, 16)))
    at = image.index(b"\xff\xc0") + 5
    image[at : at + 4] = struct.pack(">HH", 65_000, 65_000)
    path.write_bytes(image)


def refuse_animation(path: Path) -> None:
    frames = [Image.fromarray(noise(8, 8, seed=n)) for n in range(3)]
    frames[0].save(path, format="png", save_all=True, append_images=frames[1:])
    with open_slide(path) as slide:
        whole(slide)


def refuse_cut_png(path: Path) -> None:
    path.write_bytes(imagecodecs.png_encode(noise(64, 64))[:2000])
    with open_slide(path) as slide:
        whole(slide)


def refuse_jpeg_in_tile(path: Path) -> None:
    tifffile.imwrite(path, smooth(64, 64), photometric="rgb", compression="jpeg", tile=(32, 32))
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    path.write_bytes(data)
    with open_slide(path) as slide:
        whole(slide)


def refuse_large_integer(path: Path) -> None:
    tifffile.imwrite(path, np.full((20, 30), 2**24 + 1, np.uint32))
    with open_slide(path) as slide:
        whole(slide)


def refuse_large_float(path: Path) -> None:
    tifffile.imwrite(path, np.full((20, 30), 1e300))
    with open_slide(path) as slide:
        whole(slide)


REFUSED: list[tuple[Callable[[Path], None], str, str]] = [
    (refuse_z, "a.ome.tif", "has 5 z planes; take them with --planes each .* or max .*tile.z="),
    (refuse_t, "a.tif", "has 4 time points and 3 z planes"),
    (refuse_pages, "a.tif", "has 4 pages without a stated meaning; say .* tile.pages=channel"),
    (refuse_unnamed_axis, "a.tif", "has 4 pages without a stated meaning"),
    (
        refuse_scenes,
        "a.ome.tif",
        r"has 2 scenes \(left 20 x 30, right 20 x 30\); take them with --planes each",
    ),
    (refuse_sizes, "a.tif", r"has 2 scenes \(\? 20 x 30, \? 19 x 31\)"),
    (refuse_rgb_stack, "a.tif", "has 2 pages of 3 samples"),
    (refuse_cmyk, "a.tif", "colours of kind SEPARATED"),
    (refuse_cmyk_jpeg, "a.jpg", "JPEG in CMYK colours"),
    (refuse_lab, "a.tif", "colours of kind CIELAB"),
    (refuse_raw_ycbcr, "a.tif", "colours of kind YCBCR"),
    (refuse_compression, "a.tif", "compressed with JPEGXL"),
    (refuse_complex, "a.tif", "pixels of type complex64"),
    (refuse_flat_pixels, "a.tif", r"pixels of 1 x 0.5 um \(y, x\), which are not square"),
    (refuse_nothing_written, "a.tif", "holds no pixels"),
    (refuse_no_offset, "a.tif", "holds no pixels"),
    (refuse_cut, "a.tif", r"ends at byte [\d,]+, before its tile 3"),
    (refuse_wrong_depth, "a.tif", "decodes to .* uint16"),
    (refuse_missing_pages, "a.ome.tif", "has 3 of its 4 planes"),
    (refuse_other_file, "a.tif", r"one of several files of an OME-TIFF \(also ../secret.tif\)"),
    (refuse_many_planes, "a.tif", "3,000,000,000 planes"),
    (refuse_entities, "a.tif", "declares entities"),
    (refuse_broken_xml, "a.tif", "damaged OME-XML"),
    (refuse_foreign_xml, "a.tif", "OME-XML that does not fit its pages"),
    (refuse_width, "a.tif", "claims 20 x 4294967295 pixels"),
    (refuse_expansion, "a.tif", "claims 1,099,511,627,776 bytes of pixels in a file of"),
    (refuse_segment, "a.tif", r"segments of 131072 x 131072 pixels"),
    (refuse_text, "a.tif", "is not an image"),
    (refuse_empty, "a.tif", r"is empty \(0 bytes\)"),
    (refuse_stub, "a.tif", "is a TIFF without an image"),
    (refuse_no_page, "a.tif", "is a TIFF without an image"),
    (refuse_folder, "a.tif", "is a folder and no OME-Zarr"),
    (refuse_fifo, "a.tif", "is not a regular file"),
    (lambda path: None, "a.tif", "cannot be opened .No such file"),
    (refuse_png_bomb, "a.png", "has 40000 x 40000 pixels.*decoded whole; convert it to a tiled"),
    (refuse_jpeg_bomb, "a.jpg", "has 65000 x 65000 pixels"),
    (refuse_animation, "a.png", "is an animated PNG"),
    (refuse_cut_png, "a.png", "is damaged and cannot be decoded"),
    (refuse_jpeg_in_tile, "a.tif", "tile 0 .* claims 60000 x 60000 pixels"),
    (refuse_large_integer, "a.tif", r"an integer of size 16,777,217.* in \[0:20, 0:30\]"),
    (refuse_large_float, "a.tif", "beyond the range of float32"),
]


@pytest.mark.parametrize(
    ("write", "name", "message"), REFUSED, ids=[entry[2][:30] for entry in REFUSED]
)
def test_what_cannot_be_read_right_is_refused_in_one_line(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    write: Callable[[Path], None],
    name: str,
    message: str,
) -> None:
    path = tmp_path / name
    with pytest.raises(InputError, match=message) as error:
        write(path)
        with open_slide(path) as slide:
            pytest.fail(f"opened {slide!r}")
    one_line(error, path)
    assert capfd.readouterr().err == ""
    assert not caplog.records


def break_json(path: Path) -> None:
    (path / "zarr.json").write_text("{")


def remove_metadata(path: Path) -> None:
    (path / "zarr.json").unlink()


def no_multiscales(path: Path) -> None:
    zarr.open_group(str(path), mode="r+").attrs.clear()


def corrupt_chunk(path: Path) -> None:
    (path / "0/c/0/0/0").write_bytes(b"\x01\x02\x03\x04")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    attributes = json.loads((path / "zarr.json").read_text())
    change(attributes["attributes"]["ome"])
    (path / "zarr.json").write_text(json.dumps(attributes))


def edit_array(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    metadata = json.loads((path / "0/zarr.json").read_text())
    change(metadata)
    (path / "0/zarr.json").write_text(json.dumps(metadata))


ZARR_REFUSED: dict[str, Callable[[Path], None]] = {
    "is no OME-Zarr image": break_json,
    "is a folder without Zarr metadata": remove_metadata,
    "no list of multiscales": no_multiscales,
    "no list of wells": lambda path: edit(path, lambda ome: ome.update(plate={})),
    "has 2 images": lambda path: edit(
        path, lambda ome: ome.update(multiscales=ome["multiscales"] * 2)
    ),
    "is OME-Zarr 0.6": lambda path: edit(path, lambda ome: ome.update(version="0.6")),
    "has axes c, c, x": lambda path: edit(
        path, lambda ome: ome["multiscales"][0]["axes"][1].update(name="c")
    ),
    r"points outside itself \(../../b\)": lambda path: edit(
        path, lambda ome: ome["multiscales"][0]["datasets"][0].update(path="../../b")
    ),
    "pixels of 1 x 0.5 um": lambda path: edit(
        path,
        lambda ome: ome["multiscales"][0]["datasets"][0]["coordinateTransformations"][0].update(
            scale=[1, 1000, 500]
        ),
    ),
    "claims 2 x 5000000000 pixels": lambda path: edit_array(
        path, lambda array: array.update(shape=[2, 2, 5_000_000_000])
    ),
    "has chunks of 8,589,934,592 bytes": lambda path: edit_array(
        path,
        lambda array: array["chunk_grid"]["configuration"].update(chunk_shape=[1, 2**16, 2**16]),
    ),
    r"cannot be read at \[0:20, 0:30\]": corrupt_chunk,
}


@pytest.mark.parametrize("message", ZARR_REFUSED)
def test_a_zarr_folder_that_cannot_be_read_right_is_refused(tmp_path: Path, message: str) -> None:
    path = tmp_path / "a.zarr"
    write_zarr(path, noise(2, 20, 30, dtype="uint16"), "cyx")
    ZARR_REFUSED[message](path)
    with pytest.raises(InputError, match=message) as error, open_slide(path) as slide:
        whole(slide)
    one_line(error, path)


def test_a_zarr_z_stack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    write_zarr(path, noise(2, 6, 20, 30, dtype="uint16"), "czyx")
    with pytest.raises(InputError, match="has 6 z planes") as error:
        open_slide(path)
    one_line(error, path)


@pytest.mark.parametrize(
    ("dtype", "codec", "message"),
    [
        ("|O", {"id": "pickle", "protocol": 5}, "no OME-Zarr image that can be read"),
        ("<u2", {"id": "pickle", "protocol": 5}, "no OME-Zarr image that can be read"),
        ("<u2", {"id": "bitround", "keepbits": 3}, "uses codecs bitround"),
    ],
)
def test_a_zarr_codec_that_is_not_listed_is_refused(
    tmp_path: Path, dtype: str, codec: dict[str, Any], message: str
) -> None:
    """A pickle would run code; zarr itself refuses it, and the list whatever zarr would take."""
    path = tmp_path / "a.zarr"
    write_zarr(path, noise(20, 30, dtype="uint16"), "yx", "0.4")
    metadata = json.loads((path / "0/.zarray").read_text())
    metadata |= {"filters": [codec], "dtype": dtype}
    (path / "0/.zarray").write_text(json.dumps(metadata))
    with pytest.raises(InputError, match=message) as error:
        open_slide(path)
    one_line(error, path)


def test_control_characters_of_a_name_stay_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[2J.tif"
    path.write_text("no image")
    with pytest.raises(InputError) as error:
        open_slide(path)
    assert str(error.value).isprintable()
    assert str(error.value).startswith("a\\nb\\x1b[2J.tif: ")


def test_mistakes_of_the_caller_are_not_input_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(20, 30))
    slide = open_slide(path)
    with slide:
        with pytest.raises(ValueError, match="not inside"):
            slide.read(Box(0, 0, 21, 30))
        with pytest.raises(IndexError, match="channels"):
            slide.read(Box(0, 0, 2, 3), [1])
    slide.close()
    with pytest.raises(ValueError, match="closed"):
        slide.read(Box(0, 0, 2, 3))


def test_sizes_in_code_streams() -> None:
    for height, width in ((1, 1), (70, 83), (333, 1000)):
        assert jpeg_size(bytes(imagecodecs.jpeg_encode(smooth(height, width)))) == (height, width)
    assert jpeg_size(b"\xff\xd8\xff\xd9") is None
    assert jpeg_size(b"no JPEG at all") is None


def test_bounds_hold_for_any_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    for shape in ((0, 1, 1), (1, 2**31, 1), (1, 2**22, 2**21), (5000, 2, 2)):
        with pytest.raises(InputError):
            source.check_size(path, shape, 1, None)
    source.check_size(path, (1, 2**21, 2**21), 1, None)


# --- channels and fingerprints --------------------------------------------------------------


@pytest.fixture
def four_channels(tmp_path: Path) -> Iterator[Slide]:
    path = tmp_path / "four.ome.tif"
    metadata = {"axes": "CYX", "Channel": {"Name": ["DAPI", "GFP", "gfp", "2"]}}
    pixels = noise(4, 20, 30, dtype="uint16")
    tifffile.imwrite(path, pixels, photometric="minisblack", ome=True, metadata=metadata)
    with open_slide(path) as slide:
        yield slide


@pytest.mark.parametrize(
    ("wanted", "needed", "expected"),
    [
        (None, 4, (0, 1, 2, 3)),
        (["DAPI"], 1, (0,)),
        (["dapi"], 1, (0,)),
        ("DAPI", 1, (0,)),
        (["GFP"], 1, (1,)),
        (["gfp", "0", 1], 3, (2, 0, 1)),
        (["2"], 1, (3,)),
        ([2], 1, (2,)),
        (["0", "0", "0"], 3, (0, 0, 0)),
    ],
)
def test_channels_by_name_and_number(
    four_channels: Slide, wanted: list[str | int] | None, needed: int, expected: tuple[int, ...]
) -> None:
    assert select_channels(four_channels, wanted, needed) == expected


@pytest.mark.parametrize(
    ("wanted", "needed", "message"),
    [
        (None, 1, r"4 channels, and the model reads 1.*0 \(DAPI\), 1 \(GFP\).*--channel"),
        (None, 3, "--channel 3 times"),
        (None, 5, "choose a model of 4 channels"),
        (["DAPJ"], 1, r"no channel DAPJ; did you mean DAPI\? it has 0 \(DAPI\)"),
        (["mCherry"], 1, r"no channel mCherry; it has 0 \(DAPI\)"),
        (["Gfp"], 1, "has 2 channels named Gfp"),
        (["7"], 1, "no channel 7"),
        ([-1], 1, "no channel -1"),
        (["9" * 5000], 1, "no channel 9"),
        (["DAPI", "GFP"], 1, "the model reads 1 channel and --channel gives 2"),
    ],
)
def test_channels_that_do_not_fit_are_named(
    four_channels: Slide, wanted: list[str | int] | None, needed: int, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        select_channels(four_channels, wanted, needed)
    one_line(error, four_channels.path)


def test_colours_are_not_taken_for_fluorescence(tmp_path: Path) -> None:
    path, _ = write_any(tmp_path, "png rgb uint8")
    with open_slide(path) as slide:
        assert select_channels(slide, None, 3) == (0, 1, 2)
        assert select_channels(slide, ["blue"], 1) == (2,)
        with pytest.raises(InputError, match=r"an RGB image.*1 channel.*0 \(red\).*--channel"):
            select_channels(slide, None, 1)
    path, _ = write_any(tmp_path, "png grey uint8")
    with open_slide(path) as slide, pytest.raises(InputError, match="1 channel, and the model"):
        select_channels(slide, None, 3)


def test_a_fingerprint_follows_the_content_not_the_path(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"1234")
    before = input_fingerprint(path)
    assert len(before) == 16
    moved = path.rename(tmp_path / "b.tif")
    assert input_fingerprint(moved) == before
    os.utime(moved, ns=(1, 1))
    assert input_fingerprint(moved) != before
    with pytest.raises(InputError, match="No such file"):
        input_fingerprint(path)


def test_a_fingerprint_of_a_folder_sees_every_file(tmp_path: Path) -> None:
    folder = tmp_path / "a.zarr"
    write_zarr(folder, noise(20, 30, dtype="uint16"), "yx")
    before = input_fingerprint(folder)
    moved = folder.rename(tmp_path / "b.zarr")
    assert input_fingerprint(moved) == before
    chunk = moved / "0/c/1/1"
    status = chunk.stat()
    chunk.write_bytes(chunk.read_bytes() + b"x")
    os.utime(chunk, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert input_fingerprint(moved) != before
    chunk.rename(moved / "0/c/1/7")
    assert input_fingerprint(moved) != before


# --- real files -----------------------------------------------------------------------------

PATTERNS = ("slides/*.svs", "slides/*.ndpi", "slides/*.tif", "slides/*.zarr")
REAL = [path for pattern in PATTERNS for path in sorted(SHARED.glob(pattern))]


@pytest.mark.parametrize("path", [None, *REAL], ids=lambda path: path.name if path else "made here")
def test_slides_read_as_tifffile_reads_them(tmp_path: Path, path: Path | None) -> None:
    """Over the slides that there are beside the checkout, and one that is always there."""
    if path is None:
        path = tmp_path / "made.svs"
        write_svs(path, smooth(700, 950), "Aperio Image Library |MPP = 0.5|", compression="jpeg")
    if path.suffix == ".zarr":
        with pytest.raises(InputError, match=r"has \d+ z planes") as error:
            open_slide(path)
        one_line(error, path)
        return
    expected = tifffile.imread(path, series=0, level=0)
    expected = expected[None] if expected.ndim == 2 else np.moveaxis(expected, -1, 0)
    with open_slide(path) as slide:
        height, width = slide.shape[1:]
        assert slide.shape == expected.shape
        for box in (Box(0, 0, 300, width), Box(height - 257, 100, height, 900)):
            np.testing.assert_array_equal(slide.read(box), expected[(..., *box.slices)])
