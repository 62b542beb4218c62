"""Readers that need an extra, and those of other packages."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from pylibCZIrw import czi

from segpipe.errors import InputError
from segpipe.geometry import Box
from segpipe.slide import Choice, Level, Plane, open_file, open_slide, readers
from segpipe.slide.pixel_size import PixelSize
from segpipe.slide.planes import Place, Scene
from segpipe.slide.source import Header

Pixels = np.ndarray[Any, np.dtype[Any]]


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


# --- OpenSlide ------------------------------------------------------------------------------------

TILE = 256


def write_mrxs(path: Path, tiles: dict[tuple[int, int], Pixels], rows: int, columns: int) -> None:
    """A MIRAX slide of one level: a file, and a folder with settings, index and JPEG tiles."""
    folder = path.with_suffix("")
    folder.mkdir()
    path.write_bytes(imagecodecs.jpeg_encode(noise(16, 16, 3)))
    slide_id = "0123456789ABCDEF0123456789ABCDEF"
    sections = {
        "GENERAL": {
            "SLIDE_VERSION": "01.02",
            "SLIDE_ID": slide_id,
            "IMAGENUMBER_X": columns,
            "IMAGENUMBER_Y": rows,
            "OBJECTIVE_MAGNIFICATION": 20,
            "CURRENT_SLIDE_VERSION": "01.02",
        },
        "HIERARCHICAL": {
            "HIER_COUNT": 1,
            "NONHIER_COUNT": 0,
            "INDEXFILE": "Index.dat",
            "HIER_0_NAME": "Slide zoom level",
            "HIER_0_COUNT": 1,
            "HIER_0_VAL_0_SECTION": "LAYER_0_LEVEL_0_SECTION",
        },
        "DATAFILE": {"FILE_COUNT": 1, "FILE_0": "Data0000.dat"},
        "LAYER_0_LEVEL_0_SECTION": {
            "OVERLAP_X": 0,
            "OVERLAP_Y": 0,
            "MICROMETER_PER_PIXEL_X": 0.25,
            "MICROMETER_PER_PIXEL_Y": 0.25,
            "IMAGE_FORMAT": "JPEG",
            "IMAGE_FILL_COLOR_BGR": 0xFFFFFF,
            "DIGITIZER_WIDTH": TILE,
            "DIGITIZER_HEIGHT": TILE,
            "IMAGE_CONCAT_FACTOR": 0,
        },
    }
    lines = (
        f"[{name}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())
        for name, keys in sections.items()
    )
    (folder / "Slidedat.ini").write_text("\n".join(lines))
    start = b"01.02" + slide_id.encode()
    data, entries = bytearray(start + bytes(64)), []
    for (row, column), pixels in tiles.items():
        coded = imagecodecs.jpeg_encode(pixels, level=100, subsampling="444")
        entries.append(struct.pack("<4i", row * columns + column, len(data), len(coded), 0))
        data += coded
    (folder / "Data0000.dat").write_bytes(data)
    # Pointers to the list of levels, to that of level 0, and behind a 0 to its only page.
    root = len(start) + 8
    index = start + struct.pack("<5i", root, 0, root + 4, 0, root + 12)
    index += struct.pack("<2i", len(entries), 0) + b"".join(entries)
    (folder / "Index.dat").write_bytes(index)


def smooth(height: int, width: int) -> Pixels:
    y, x = np.mgrid[:height, :width]
    return np.stack([y % 200 + 20, x % 200 + 20, (x + y) % 200 + 20], axis=-1).astype(np.uint8)


def test_mirax_reads_its_tiles_and_white_where_nothing_was_scanned(tmp_path: Path) -> None:
    path = tmp_path / "a.mrxs"
    picture = smooth(2 * TILE, 3 * TILE)
    tiles = {
        (row, column): picture[row * TILE :, column * TILE :][:TILE, :TILE]
        for row in range(2)
        for column in range(3)
        if (row, column) != (1, 1)
    }
    write_mrxs(path, tiles, 2, 3)
    with open_slide(path) as slide:
        assert slide.shape == (3, 2 * TILE, 3 * TILE)
        assert (slide.pixel_size_um, slide.pixel_size_from) == (0.25, "OpenSlide's mpp")
        assert slide.reader == "openslide/mirax"
        pixels = np.moveaxis(slide.read(Box(0, 0, 2 * TILE, 3 * TILE)), 0, -1)
    assert (pixels[TILE:, TILE : 2 * TILE] == 255).all()
    for row, column in tiles:
        here = (slice(row * TILE, (row + 1) * TILE), slice(column * TILE, (column + 1) * TILE))
        difference = np.abs(pixels[here].astype(int) - picture[here])
        assert difference.max() <= 4


def write_pyramid(path: Path) -> list[Pixels]:
    """What OpenSlide reads as a generic pyramid; its last level has a factor that is not whole."""
    levels = [noise(1300, 2200, 3, seed=0), noise(650, 1100, 3, seed=1), noise(250, 423, 3, seed=2)]
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate(levels):
            tiff.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                subfiletype=min(number, 1),
                resolution=(4e4, 4e4),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return levels


def test_openslide_reads_levels_and_any_box_is_a_part_of_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.svslide"
    levels = write_pyramid(path)
    with open_slide(path) as slide:
        assert slide.reader == "openslide/generic-tiff"
        assert [level.shape for level in slide.levels] == [level.shape[:2] for level in levels]
        assert slide.levels[1] == Level((650, 1100), 2.0)
        for number, level in enumerate(levels):
            height, width = level.shape[:2]
            full = slide.read(Box(0, 0, height, width), level=number)
            if number < 2:
                np.testing.assert_array_equal(full, np.moveaxis(level, -1, 0))
            for box in (Box(3, 5, 200, 301), Box(height - 7, width - 9, height, width)):
                part = slide.read(box, [2, 0], number)
                np.testing.assert_array_equal(part, full[[2, 0]][(slice(None), *box.slices)])


def test_after_a_damaged_tile_openslide_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.svslide"
    pixels = smooth(2048, 2048)
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None, "tile": (256, 256)}
    tifffile.imwrite(path, pixels, compression="jpeg", **options)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    with open_slide(path) as slide:
        for _ in range(2):
            with pytest.raises(InputError, match=r"a\.svslide: cannot be decoded in .*0.*1024"):
                slide.read(Box(0, 0, 10, 10))
            good = slide.read(Box(1100, 1100, 1200, 1200))
            there = np.moveaxis(pixels[1100:1200, 1100:1200], -1, 0)
            assert np.abs(good - there.astype(int)).mean() < 10


def test_what_openslide_cannot_open_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.mrxs"
    path.write_bytes(imagecodecs.jpeg_encode(noise(16, 16, 3)))
    with pytest.raises(
        InputError, match=r"a\.mrxs: cannot be opened by OpenSlide .*folder"
    ) as error:
        open_slide(path)
    assert "\n" not in str(error.value)


# --- CZI ------------------------------------------------------------------------------------------


def write_czi(path: Path, pixels: Pixels, scale_m: float = 0.25e-6) -> None:
    """(S, Z, C, Y, X) uint16 in tiles of a mosaic that does not begin at 0."""
    scenes, depth, channels, height, width = pixels.shape
    with czi.create_czi(str(path), compression_options="zstd0:ExplicitLevel=1") as document:
        for s, z, c in np.ndindex(scenes, depth, channels):
            for y in range(0, height, 300):
                for x in range(0, width, 300):
                    tile = np.ascontiguousarray(pixels[s, z, c, y : y + 300, x : x + 300, None])
                    place = (x + 100 + 5000 * s, y - 50)
                    document.write(tile, location=place, plane={"C": c, "Z": z}, scene=s)
        names = {0: "DAPI", 1: "GFP"}
        document.write_metadata("a", channel_names=names, scale_x=scale_m, scale_y=scale_m)


def test_czi_reads_scenes_planes_and_channels(tmp_path: Path) -> None:
    path = tmp_path / "a.czi"
    pixels = noise(2, 3, 2, 700, 1300, dtype="uint16")
    write_czi(path, pixels)
    with open_file(path) as file:
        assert [(scene.size, scene.z) for scene in file.scenes] == [((700, 1300), 3)] * 2
        with pytest.raises(InputError, match=r"2 scenes .* and 3 z planes"):
            file.choose(Choice())
        with file.slide(Plane(scene=1, z=2)) as slide:
            assert slide.channel_names == ("DAPI", "GFP")
            assert (slide.pixel_size_um, slide.pixel_size_from) == (
                pytest.approx(0.25),
                "CZI's scaling",
            )
            assert slide.dtype == np.uint16
            box = Box(250, 1000, 700, 1300)
            np.testing.assert_array_equal(slide.read(box), pixels[(1, 2, slice(None), *box.slices)])
            np.testing.assert_array_equal(
                slide.read(box, [1]), pixels[(1, 2, slice(1, 2), *box.slices)]
            )
        with file.slide(Plane(scene=0, z="max")) as slide:
            whole = slide.read(Box(0, 0, 700, 1300))
            np.testing.assert_array_equal(whole, pixels[0].max(axis=0))


def test_czi_colours_are_red_green_blue_and_gaps_are_white(tmp_path: Path) -> None:
    path = tmp_path / "a.czi"
    pixels = noise(100, 130, 3)
    with czi.create_czi(str(path)) as document:
        document.write(pixels[..., ::-1], location=(0, 0))
        document.write(pixels[..., ::-1], location=(200, 0))
        document.write_metadata("a")
    with open_slide(path) as slide:
        assert slide.rgb
        assert slide.pixel_size_um is None
        assert slide.warnings == ()
        read = np.moveaxis(slide.read(Box(0, 0, 100, 330)), 0, -1)
    np.testing.assert_array_equal(read[:, :130], pixels)
    np.testing.assert_array_equal(read[:, 200:], pixels)
    assert (read[:, 130:200] == 255).all()


def test_a_damaged_czi_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.czi"
    write_czi(path, noise(1, 1, 1, 64, 64, dtype="uint16"))
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(InputError, match=r"a\.czi: is damaged, or no CZI") as error:
        open_slide(path)
    assert "\n" not in str(error.value)


# --- bioio ----------------------------------------------------------------------------------------


def lif_block(description: str, data: bytes) -> bytes:
    """A block of a LIF file: its memory, named."""
    name = description.encode("utf-16-le")
    head = struct.pack("<cQcI", b"\x2a", len(data), b"\x2a", len(name) // 2) + name
    return struct.pack("<II", 0x70, len(head)) + head + data


def write_lif(path: Path, pixels: Pixels) -> None:
    """(Z, C, Y, X) uint8 as a Leica image file of one image."""
    depth, channels, height, width = pixels.shape
    plane = height * width
    xml = (
        '<LMSDataContainerHeader Version="2"><Element Name="root" Visibility="1"><Data/>'
        "<Memory Size='0' MemoryBlockID='MemBlock_0'/><Children>"
        '<Element Name="field" UniqueID="1" Visibility="1"><Data><Image><ImageDescription><Channels>'
        + "".join(
            f'<ChannelDescription DataType="0" ChannelTag="0" Resolution="8" LUTName="{name}" '
            f'IsLUTInverted="0" BytesInc="{n * plane}" BitInc="0" NameOfMeasuredQuantity="" '
            'Min="0" Max="1" Unit=""/>'
            for n, name in zip(range(channels), ("Blue", "Green"), strict=False)
        )
        + "</Channels><Dimensions>"
        + "".join(
            f'<DimensionDescription DimID="{number}" NumberOfElements="{size}" Origin="0" '
            f'Length="{length}" Unit="m" BytesInc="{step}" BitInc="0"/>'
            for number, size, length, step in (
                (1, width, (width - 1) * 0.5e-6, 1),
                (2, height, (height - 1) * 0.5e-6, width),
                (3, depth, (depth - 1) * 1e-6, channels * plane),
            )
        )
        + "</Dimensions></ImageDescription></Image></Data>"
        f'<Memory Size="{pixels.size}" MemoryBlockID="MemBlock_1"/><Children/></Element>'
        "</Children></Element></LMSDataContainerHeader>"
    )
    text = xml.encode("utf-16-le")
    head = struct.pack("<cI", b"\x2a", len(xml)) + text
    content = struct.pack("<II", 0x70, len(head)) + head
    content += lif_block("MemBlock_0", b"") + lif_block("MemBlock_1", pixels.tobytes())
    path.write_bytes(content)


def test_lif_reads_planes_through_bioio(tmp_path: Path) -> None:
    path = tmp_path / "a.lif"
    pixels = noise(3, 2, 60, 80)
    write_lif(path, pixels)
    with open_file(path) as file:
        assert [(scene.size, scene.z) for scene in file.scenes] == [((60, 80), 3)]
        with file.slide(Plane(z=1)) as slide:
            assert slide.reader == "bioio-lif"
            assert slide.pixel_size_um == pytest.approx(0.5)
            box = Box(5, 7, 40, 80)
            np.testing.assert_array_equal(slide.read(box), pixels[(1, slice(None), *box.slices)])
        with file.slide(Plane(z="max")) as slide:
            np.testing.assert_array_equal(slide.read(Box(0, 0, 60, 80)), pixels.max(axis=0))


@pytest.mark.parametrize("suffix", [".nd2", ".lif", ".vsi"])
def test_what_bioio_cannot_read_is_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"no image at all" * 10)
    with pytest.raises(InputError, match=r"cannot be opened by bioio .*bioio-") as error:
        open_slide(path)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_told_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(function: str) -> readers.Opener:
        raise ImportError("No module named 'openslide'")

    monkeypatch.setattr(readers, "_own", missing)
    path = tmp_path / "a.mrxs"
    path.write_bytes(b"x" * 100)
    with pytest.raises(InputError, match=r"a\.mrxs: needs a package .*segpipe\[wsi\]"):
        open_slide(path)


# --- readers of other packages --------------------------------------------------------------------

SHAPE = (2, 30, 40)


class Ramp:
    """A made reader: pixels that follow from their place."""

    def __init__(self, path: Path) -> None:
        if path.read_bytes() == b"bad":
            raise RuntimeError("no ramp\nat all")
        self.scenes = (Scene("ramp", SHAPE[1:]),)
        self.header = Header(
            shape=SHAPE,
            dtype=np.dtype(np.uint16),
            channel_names=("a", "b"),
            rgb=False,
            pixel_size=PixelSize(0.5, "the ramp"),
            levels=(Level(SHAPE[1:], 1.0),),
            reader="ramp",
            compression="none",
        )

    def source(self, place: Place) -> Ramp:
        return self

    def read(self, box: Box, channels: tuple[int, ...], level: int) -> Pixels:
        full = np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)
        return full[list(channels)][(slice(None), *box.slices)]

    def close(self) -> None:
        pass


class Wrong(Ramp):
    """One that gives other pixels than it says."""

    def read(self, box: Box, channels: tuple[int, ...], level: int) -> Pixels:
        return super().read(box, channels, level).astype(np.float64)


def install(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    entries = [EntryPoint("ramp", f"{__name__}:{value}", readers.GROUP) for value in values]
    monkeypatch.setattr(readers, "entry_points", lambda group: entries)
    readers._plugins.cache_clear()


@pytest.fixture
def plugins() -> Iterator[None]:
    yield
    readers._plugins.cache_clear()


@pytest.mark.usefixtures("plugins")
def test_another_package_reads_its_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.RAMP"
    path.write_bytes(b"good")
    with pytest.raises(InputError, match="is not an image that segpipe reads"):
        open_slide(path)
    install(monkeypatch, "Ramp")
    assert ".ramp" in readers.searched_suffixes()
    with open_slide(path) as slide:
        assert (slide.reader, slide.pixel_size_um, slide.channel_names) == ("ramp", 0.5, ("a", "b"))
        assert slide.read(Box(1, 2, 3, 4), [1]).tolist() == [[[1242, 1243], [1282, 1283]]]
    path.write_bytes(b"bad")
    with pytest.raises(InputError, match=r"a\.RAMP: cannot be read by test_readers:Ramp") as error:
        open_slide(path)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("plugins")
def test_a_reader_that_is_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ramp"
    path.write_bytes(b"good")
    install(monkeypatch, "Wrong")
    with open_slide(path) as slide, pytest.raises(InputError, match=r"float64, not .* repair that"):
        slide.read(Box(0, 0, 4, 4))
    install(monkeypatch, "Absent")
    with pytest.raises(InputError, match="has a reader test_readers:Absent that cannot be loaded"):
        open_slide(path)
    install(monkeypatch, "Ramp", "Wrong")
    with pytest.raises(InputError, match="read by several installed packages"):
        open_slide(path)
