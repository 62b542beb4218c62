"""Slides that are damaged or lie about themselves, and those of more than 4 GB: by made files."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image

from fields import labels_of, nuclei, run
from segpipe.cli import main
from segpipe.errors import InputError
from segpipe.geometry import Box
from segpipe.slide import open_slide

Pixels = np.ndarray[Any, np.dtype[Any]]
TILE: dict[str, Any] = {"tile": (64, 64)}


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(1, 200, shape).astype(dtype)


def whole(path: Path) -> Pixels:
    with open_slide(path) as slide:
        return slide.read(Box(0, 0, *slide.shape[1:]))


# --- NDPI -----------------------------------------------------------------------------------------


def stream(pixels: Pixels) -> tuple[bytes, list[int]]:
    """A JPEG with a restart marker after every 32 blocks, and where the data after each begin."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file, "jpeg", quality=95, subsampling="4:2:2", restart_marker_blocks=32
    )
    data = file.getvalue()
    scan = data.index(b"\xff\xda")
    begin = scan + 2 + struct.unpack_from(">H", data, scan + 2)[0]
    starts = [begin]
    for place in range(begin, len(data) - 1):
        if data[place] == 0xFF and 0xD0 <= data[place + 1] <= 0xD7:
            starts.append(place + 2)
    return data, starts


def write_ndpi(path: Path, pixels: Pixels, at: int) -> None:
    """A Hamamatsu NDPI of one level whose JPEG stream and header lie at a byte, in a sparse file."""
    data, starts = stream(pixels)
    height, width = pixels.shape[:2]
    after = at + len(data) + len(data) % 2
    extra = bytearray()

    def outside(content: bytes) -> int:
        place = after + len(extra)
        extra.extend(content + bytes(len(content) % 2))
        return place

    short, long, rational, text, slong, real = 3, 4, 5, 2, 9, 11
    tags = {
        254: (long, 1, 0),
        256: (long, 1, width),
        257: (long, 1, height),
        258: (short, 3, outside(struct.pack("<3H", 8, 8, 8))),
        259: (short, 1, 7),
        262: (short, 1, 6),
        271: (text, 10, outside(b"Hamamatsu\0")),
        273: (long, 1, at),
        277: (short, 1, 3),
        278: (long, 1, height),
        279: (long, 1, len(data)),
        282: (rational, 1, outside(struct.pack("<2I", 40_000, 1))),
        283: (rational, 1, outside(struct.pack("<2I", 40_000, 1))),
        296: (short, 1, 3),
        65420: (long, 1, 1),
        65421: (real, 1, struct.unpack("<I", struct.pack("<f", 20.0))[0]),
        65422: (slong, 1, 0),
        65423: (slong, 1, 0),
        65424: (slong, 1, 0),
        65426: (long, len(starts), outside(struct.pack(f"<{len(starts)}I", *starts))),
    }
    begin = after + len(extra)
    directory = struct.pack("<H", len(tags))
    for code, (kind, count, value) in tags.items():
        directory += struct.pack("<HHII", code, kind, count, value & 0xFFFFFFFF)
    directory += struct.pack("<Q", 0)
    for _, _, value in tags.values():
        directory += struct.pack("<I", value >> 32)
    with path.open("wb") as file:
        file.write(b"II*\0" + struct.pack("<Q", begin))
        file.seek(at)
        file.write(data + bytes(len(data) % 2) + extra + directory)


@pytest.mark.parametrize("at", [1024, 5 * 2**30 + 64])
def test_ndpi_reads_boxes_by_restart_markers_beyond_4_gb_too(tmp_path: Path, at: int) -> None:
    path = tmp_path / "a.ndpi"
    y, x = np.mgrid[:256, :1024]
    pixels = np.stack([x // 8 + y // 4, y, x // 5], axis=-1).astype(np.uint8)
    write_ndpi(path, pixels, at)
    assert path.stat().st_size > at
    with open_slide(path) as slide, openslide.OpenSlide(path) as other:
        assert slide.shape == (3, 256, 1024)
        assert slide.reader == "tifffile/ndpi"
        assert slide.pixel_size_um == pytest.approx(0.25)
        assert slide.warnings == ()
        for box in (Box(0, 0, 256, 1024), Box(100, 500, 120, 700)):
            size = (box.x1 - box.x0, box.y1 - box.y0)
            theirs = np.asarray(other.read_region((box.x0, box.y0), 0, size))[..., :3]
            np.testing.assert_array_equal(slide.read(box), np.moveaxis(theirs, -1, 0))


@pytest.mark.parametrize("how", ["an end too early", "zeros"])
def test_a_damaged_part_of_an_ndpi_is_named_and_the_rest_is_read(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.ndpi"
    pixels = noise(256, 1024, 3)
    write_ndpi(path, pixels, 1024)
    before = whole(path)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[3], tiff.pages[0].databytecounts[3]
    with path.open("r+b") as file:
        file.seek(offset + count // 2)
        rest = count - count // 2
        file.write(bytes(rest) if how == "zeros" else (b"\xff\xd9" * rest)[:rest])
    with open_slide(path) as slide:
        with pytest.raises(InputError, match=r"a\.ndpi: has a tile 3 .*JPEG stream ends"):
            slide.read(Box(0, 0, 256, 1024))
        for box in (Box(0, 0, 8, 1024), Box(8, 0, 16, 512), Box(16, 0, 256, 1024)):
            np.testing.assert_array_equal(slide.read(box), before[(slice(None), *box.slices)])


# --- JPEG streams ---------------------------------------------------------------------------------


def jpeg_tile(tmp_path: Path, change: Callable[[bytes], bytes]) -> Pixels:
    """A slide of one JPEG tile whose bytes were changed."""
    path = tmp_path / "a.tif"
    pixels = noise(128, 128, 3)
    options: dict[str, Any] = {"photometric": "rgb", "tile": (128, 128), "metadata": None}
    tifffile.imwrite(path, pixels, compression="jpeg", **options)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        page = tiff.pages[0]
        offset, count = page.dataoffsets[0], page.databytecounts[0]
        file = path.read_bytes()
        data = change(file[offset : offset + count])
        path.write_bytes(
            file[:offset] + data + bytes(max(0, count - len(data))) + file[offset + count :]
        )
        if len(data) < count:
            with tifffile.TiffFile(path, mode="r+b") as again:
                again.pages[0].tags[325].overwrite(len(data))
    return whole(path)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="cut"),
        pytest.param(lambda data: data[: -len(data) // 2].ljust(len(data), b"\0"), id="zeros"),
        pytest.param(lambda data: data[:-200] + b"\xff\xd9" * 100, id="ends"),
        pytest.param(
            lambda data: data[: len(data) // 2] + b"\xff\xd8\xff\xe0" + data[len(data) // 2 + 4 :],
            id="another file",
        ),
    ],
)
def test_a_jpeg_tile_that_is_cut_is_an_error_and_not_grey(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(InputError, match=r"a\.tif: has a tile 0 .*cannot be decoded") as error:
        jpeg_tile(tmp_path, change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data, id="as written"),
        pytest.param(lambda data: data[:-2], id="no end marker"),
        pytest.param(lambda data: data[:-2] + b"\0\0", id="zeros for the end marker"),
    ],
)
def test_a_jpeg_tile_that_is_whole_is_read(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    expected = jpeg_tile(tmp_path, lambda data: data)
    np.testing.assert_array_equal(jpeg_tile(tmp_path, change), expected)


# --- which page is the slide ----------------------------------------------------------------------


@pytest.mark.parametrize("first", ["label", "macro larger than the scan"])
def test_svs_whose_first_page_is_no_slide(tmp_path: Path, first: str) -> None:
    path = tmp_path / "a.svs"
    common: dict[str, Any] = {"photometric": "rgb", "metadata": None}
    size = (90, 70, 3) if first == "label" else (400, 1280, 3)
    picture, pixels = noise(*size, seed=1), noise(256, 320, 3)
    with tifffile.TiffWriter(path) as tiff:
        text = "Aperio Image Library |MPP = 0.5"
        if first == "label":
            tiff.write(picture, description=text, **common)
        tiff.write(pixels, description=text, **TILE, **common)
        if first != "label":
            tiff.write(noise(80, 64, 3), description="Aperio thumbnail", **common)
            tiff.write(picture, subfiletype=9, description="Aperio macro", **common)
    with open_slide(path) as slide:
        assert slide.shape == (3, 256, 320)
        assert any(f"{size[1]} x {size[0]}" in name for name in slide.left_out)
    np.testing.assert_array_equal(whole(path), np.moveaxis(pixels, -1, 0))


def test_a_label_before_a_slide_in_a_plain_tiff_is_asked_about(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(noise(40, 30, 3), photometric="rgb", metadata=None)
        tiff.write(noise(256, 320, 3), photometric="rgb", metadata=None, **TILE)
    with pytest.raises(InputError, match=r"a\.tif: has 2 scenes \(. 40 x 30, . 256 x 320\)"):
        open_slide(path)


def test_pictures_beside_the_slide_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(noise(60, 40), metadata={"axes": "YX", "Name": "slide"})
        tiff.write(noise(9, 8), metadata={"axes": "YX", "Name": "label image"})
    with open_slide(path) as slide:
        assert slide.left_out == ("label image 8 x 9",)


# --- pixel sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "unit", "expected"),
    [
        (0.5, "µm", 0.5),
        (500.0, "nm", 0.5),
        (5000.0, "Å", 0.5),
        (0.00005, "cm", 0.5),
        (0.0005, "mm", 0.5),
        (0.00002, "in", 0.508),
        (0.0, "µm", None),
        (-0.5, "µm", None),
        (1e9, "µm", None),
        (0.5, "m", None),
        (float("nan"), "µm", None),
        (float("inf"), "nm", None),
    ],
)
def test_a_pixel_size_in_any_unit_and_an_absurd_one_is_not_believed(
    tmp_path: Path, size: float, unit: str, expected: float | None
) -> None:
    path = tmp_path / "a.ome.tif"
    sizes = {f"PhysicalSize{axis}": size for axis in "XY"}
    units = {f"PhysicalSize{axis}Unit": unit for axis in "XY"}
    tifffile.imwrite(path, noise(64, 64), ome=True, metadata={"axes": "YX", **sizes, **units})
    with open_slide(path) as slide:
        if expected is None:
            assert slide.pixel_size_um is None
            (warning,) = slide.warnings
            assert warning.startswith("OME-XML states pixels of ")
            assert "--pixel-size" in warning
        else:
            assert slide.pixel_size_um == pytest.approx(expected)
            assert slide.pixel_size_from == "OME-XML"
            assert slide.warnings == ()


@pytest.mark.parametrize("mpp", ["0", "-0.5", "1e9", "abc", "0,5", "0.5"])
def test_aperio_s_pixel_size_is_read_whole(tmp_path: Path, mpp: str) -> None:
    path = tmp_path / "a.svs"
    text = f"Aperio Image Library |AppMag = 20|MPP = {mpp}|Left = 1"
    tifffile.imwrite(path, noise(64, 64, 3), description=text, metadata=None, **TILE)
    good = mpp in ("0.5", "0,5")
    with open_slide(path) as slide:
        assert slide.pixel_size_um == (0.5 if good else None)
        assert len(slide.warnings) == (not good)


def test_a_pixel_size_that_is_not_believed_is_in_the_manifest(tmp_path: Path) -> None:
    path = nuclei(tmp_path / "a.tif", (130, 130))
    metadata = {"axes": "YX", "PhysicalSizeX": 0.0, "PhysicalSizeY": 0.0}
    tifffile.imwrite(tmp_path / "b.ome.tif", tifffile.imread(path), ome=True, metadata=metadata)
    result = run(tmp_path / "b.ome.tif", tmp_path / "out")
    assert result.exit_code == 0
    assert "OME-XML states pixels of 0 x 0 um" in result.images[0].warnings[0]
    manifest = json.loads((tmp_path / "out/manifests/b.tile.json").read_text())
    assert manifest["facts"]["warnings"] == list(result.images[0].warnings)


# --- tiles that are missing or damaged ------------------------------------------------------------


def damage(path: Path, *tiles: int, page: int = 0) -> None:
    with tifffile.TiffFile(path) as tiff:
        places = [
            (tiff.pages[page].dataoffsets[n], tiff.pages[page].databytecounts[n]) for n in tiles
        ]
    with path.open("r+b") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(bytes(count))


def test_damaged_tiles_are_named_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    pixels = noise(256, 320)
    tifffile.imwrite(path, pixels, compression="zlib", **TILE)
    damage(path, 2, 7, 8)
    with open_slide(path) as slide:
        with pytest.raises(InputError, match=r"a\.tif: has a tile 2 .*; 2 more like it") as error:
            slide.read(Box(0, 0, 256, 320))
        assert "\n" not in str(error.value)
        with pytest.raises(InputError, match=r"tile 8") as error:
            slide.read(Box(64, 192, 128, 256))
        assert "more" not in str(error.value)
        good = slide.read(Box(128, 0, 256, 320))
        np.testing.assert_array_equal(good[0], pixels[128:])


def test_a_damaged_tile_is_quarantined_and_never_black(tmp_path: Path) -> None:
    path = nuclei(tmp_path / "field.tif", (256, 256))
    pixels = tifffile.imread(path)
    tifffile.imwrite(path, pixels, compression="zlib", tile=(64, 64))
    damage(path, 0, 1)
    result = run(path, tmp_path / "out", "tile.region=128")
    assert result.exit_code == 1
    (failed,) = result.images[0].failed_regions
    assert failed["box"] == [0, 0, 128, 128]
    assert "tile 0" in failed["error"] and "1 more like it" in failed["error"]
    labels = labels_of(tmp_path / "out", "field")
    assert not labels[:128, :128].any()
    assert labels.any()


def empty(path: Path, tiles: list[int]) -> None:
    """Take the bytes of some tiles away, as scanners do for glass that was not scanned."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for code in (324, 325):
            tag = tiff.pages[0].tags[code]
            values = list(tag.value)
            for tile in tiles:
                values[tile] = 0
            tag.overwrite(values)


@pytest.mark.parametrize("rgb", [True, False])
def test_tiles_without_bytes_are_counted_and_white_in_colours(tmp_path: Path, rgb: bool) -> None:
    path = tmp_path / "a.tif"
    pixels = noise(128, 192, 3) if rgb else noise(128, 192)
    kind = "rgb" if rgb else "minisblack"
    tifffile.imwrite(path, pixels, photometric=kind, compression="zlib", **TILE)
    empty(path, [1, 5])
    with open_slide(path) as slide:
        assert slide.warnings == (
            f"2 of 6 tiles hold no bytes: they are read as {'white' if rgb else 'black'}",
        )
    read = whole(path)
    assert (read[:, :64, 64:128] == (255 if rgb else 0)).all()
    np.testing.assert_array_equal(
        read[0, :64, :64], pixels[:64, :64, 0] if rgb else pixels[:64, :64]
    )


def test_a_level_with_missing_tiles_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    pixels = noise(256, 256)
    with tifffile.TiffWriter(path) as tiff:
        for number, step in enumerate((1, 2)):
            options: dict[str, Any] = {"subfiletype": number, "metadata": None, **TILE}
            tiff.write(pixels[::step, ::step], compression="zlib", **options)
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tag = tiff.pages[1].tags[325]
        tag.overwrite([0, *tag.value[1:]])
    with open_slide(path) as slide:
        assert len(slide.levels) == 1
        assert slide.warnings == (
            "level 1 of the pyramid is left out: 1 of its 4 segments hold no bytes",
        )


# --- colours --------------------------------------------------------------------------------------


def segpipe(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def tissue() -> Pixels:
    pixels = np.full((128, 128, 3), 235, np.uint8)
    pixels[30:60, 30:60] = (150, 90, 160)
    return pixels


def test_rgb_of_16_bits_is_refused_by_a_model_of_8(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, tissue().astype(np.uint16) * 257, photometric="rgb")
    result = run(path, tmp_path / "out", "infer.model=auto")
    assert result.exit_code == 1
    message = str(result.images[0].error)
    assert "RGB of uint16" in message and "infer.normalise" in message and "\n" not in message


def test_alpha_is_no_channel(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    pixels = np.dstack([tissue(), np.full((128, 128), 7, np.uint8)])
    tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(whole(path), np.moveaxis(tissue(), -1, 0))


def test_a_cmyk_jpeg_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(tissue()).convert("CMYK").save(path)
    with pytest.raises(InputError, match=r"a\.jpg: is a JPEG in CMYK colours; convert it to RGB"):
        open_slide(path)


# --- what claims to be something ------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff garbage",
        b"[]",
        b"{}",
        b'{"zarr_format": 3, "node_type": "group", "attributes": {"ome": 7}}',
        b'{"zarr_format": 3, "node_type": "group", "attributes": {"ome": {"multiscales": [1]}}}',
        b'{"zarr_format": 9, "node_type": "group"}',
        b"[" * 100_000,
    ],
)
def test_a_folder_that_claims_to_be_an_ome_zarr(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "in" / "a.ome.zarr"
    folder.mkdir(parents=True)
    (folder / "zarr.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.ome\.zarr: ") as error:
        open_slide(folder)
    assert "\n" not in str(error.value)


def test_a_hostile_name_is_a_name(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    folder = tmp_path / "in"
    nuclei(folder / f"{name}.tif", (100, 100))
    (folder / f"{name}\x1b[2J.svs").write_bytes(b"no slide")
    result = run(folder, tmp_path / "out")
    assert result.exit_code == 1
    done = {one.name: one for one in result.images}
    assert done["_img src=x onerror=alert(1)_"].status == "done"
    (failed,) = result.failed
    assert "\x1b" not in str(failed.error) and "\n" not in str(failed.error)
