"""Planes and scenes of one file: each as it was written, projections, names, and no silent choice."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner
from zarr.storage import LocalStore

from fields import SIZES, labels_of, nuclei, run, table_of
from segpipe.cli import main
from segpipe.errors import InputError
from segpipe.geometry import Box
from segpipe.inputs import find_inputs, known_inputs
from segpipe.prepare import prepare
from segpipe.settings import load_settings
from segpipe.slide import Choice, Plane, Scene, open_file, open_slide, tiff
from segpipe.slide.planes import MAX_IMAGES, choose_planes
from segpipe.slide.segments import SegmentCache
from segpipe.stages.reading import closing_input, reader
from test_slide import noise, one_line, smooth, whole, write_zarr

Pixels = np.ndarray[Any, np.dtype[Any]]
EACH = Choice(z="each", t="each", scene="each")


def names(folder: Path, out: Path, *settings: str) -> dict[str, str]:
    """What is asked for by the names given to it."""
    found = find_inputs([folder], out, load_settings(None, settings).tile)
    return {one.name: f"{one.source.name}: {one.plane}" for one in found}


def segpipe(*arguments: object) -> Any:
    """Run the command line in this process; a traceback fails the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


# --- every kind of stack --------------------------------------------------------------------------

T, Z, C, Y, X = 3, 4, 2, 40, 53


def stack(axes: str, dtype: str = "uint16") -> Pixels:
    """Noise along these axes; S are three colours."""
    return noise(
        *({"T": T, "Z": Z, "C": C, "Y": Y, "X": X, "S": 3}[axis] for axis in axes), dtype=dtype
    )


def write_ome(path: Path, pixels: Pixels, axes: str, **options: Any) -> None:
    photometric = "rgb" if "S" in axes else "minisblack"
    tifffile.imwrite(
        path, pixels, ome=True, photometric=photometric, metadata={"axes": axes}, **options
    )


def write_imagej(path: Path, pixels: Pixels, axes: str, **options: Any) -> None:
    tifffile.imwrite(path, pixels, imagej=True, metadata={"axes": axes}, **options)


def write_shaped(path: Path, pixels: Pixels, axes: str, **options: Any) -> None:
    photometric = "rgb" if "S" in axes else "minisblack"
    tifffile.imwrite(path, pixels, photometric=photometric, metadata={"axes": axes}, **options)


def write_zarr_stack(path: Path, pixels: Pixels, axes: str, **options: Any) -> None:
    write_zarr(path, pixels, axes.lower(), **options)


TILED: dict[str, Any] = {"tile": (16, 32), "compression": "zlib"}
STACKS: dict[str, tuple[Callable[..., None], str, str, dict[str, Any]]] = {
    "OME": (write_ome, "a.ome.tif", "TZCYX", {}),
    "OME tiles": (write_ome, "a.ome.tif", "TZCYX", TILED),
    "OME strips big-endian": (write_ome, "a.ome.tif", "TZCYX", {"byteorder": ">", "rowsperstrip": 9}),
    "OME in another order": (write_ome, "a.ome.tif", "CTZYX", TILED),
    "OME Z first": (write_ome, "a.ome.tif", "ZCTYX", {}),
    "OME Z": (write_ome, "a.ome.tif", "ZYX", TILED),
    "OME RGB": (write_ome, "a.ome.tif", "TZYXS", {}),
    "OME RGB separate": (write_ome, "a.ome.tif", "ZSYX", {"planarconfig": "separate"}),
    "ImageJ": (write_imagej, "a.tif", "TZCYX", {}),
    "ImageJ compressed": (write_imagej, "a.tif", "TZCYX", {"compression": "zlib"}),
    "ImageJ T": (write_imagej, "a.tif", "TYX", {}),
    "axes in tifffile's own words": (write_shaped, "a.tif", "ZCYX", TILED),
    "RGB pages": (write_shaped, "a.tif", "ZYXS", {}),
    "RGB pages separate": (write_shaped, "a.tif", "ZSYX", {"planarconfig": "separate", **TILED}),
    "zarr 0.4": (write_zarr_stack, "a.zarr", "TCZYX", {"version": "0.4"}),
    "zarr deep chunks": (write_zarr_stack, "a.zarr", "TCZYX", {"chunks": (1, 1, 3, 16, 16)}),
    "zarr shards": (
        write_zarr_stack,
        "a.zarr",
        "CZYX",
        {"chunks": (1, 2, 16, 16), "shards": (2, 4, 32, 32)},
    ),
    "zarr axes in another order": (write_zarr_stack, "a.zarr", "ZTYX", {"chunks": (2, 1, 16, 16)}),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_each_plane_and_the_maximum_are_what_was_written(tmp_path: Path, name: str) -> None:
    write, file_name, axes, options = STACKS[name]
    dtype = "uint8" if "S" in axes else "uint16"
    pixels = stack(axes, dtype)
    path = tmp_path / file_name
    write(path, pixels, axes, **options)
    order = [axis for axis in "TZCSYX" if axis in axes]
    cube = pixels.transpose([axes.index(axis) for axis in order])
    cube = cube.reshape(T if "T" in axes else 1, Z if "Z" in axes else 1, -1, Y, X)
    box = Box(7, 11, 34, 49)
    with open_file(path) as file:
        assert [(scene.t, scene.z, scene.pages) for scene in file.scenes] == [(*cube.shape[:2], 1)]
        chosen = [one.plane for one in file.choose(EACH)]
        assert len(chosen) == cube.shape[0] * cube.shape[1]
        slides = [file.slide(plane) for plane in chosen]
        projected = [file.slide(one.plane) for one in file.choose(Choice(z="max", t="each"))]
    for plane, slide in zip(chosen, slides, strict=True):
        with slide:
            assert slide.plane == plane and slide.rgb == ("S" in axes)
            written = cube[plane.t or 0, plane.z or 0]
            np.testing.assert_array_equal(whole(slide), written)
            np.testing.assert_array_equal(slide.read(box), written[(slice(None), *box.slices)])
    for t, slide in enumerate(projected):
        with slide:
            np.testing.assert_array_equal(whole(slide), cube[t].max(axis=0))
            np.testing.assert_array_equal(
                slide.read(box, [len(cube[t, 0]) - 1])[0], cube[t].max(axis=0)[-1][box.slices]
            )


def write_pages(path: Path, pixels: Pixels, one_by_one: bool, **options: Any) -> None:
    if not one_by_one:
        tifffile.imwrite(path, pixels, photometric="minisblack", **options)
        return
    with tifffile.TiffWriter(path) as writer:
        for page in pixels:
            writer.write(page, **options)


@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"metadata": None, **TILED}, TILED])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_pages_without_a_meaning_are_refused_until_it_is_said(
    tmp_path: Path, options: dict[str, Any], one_by_one: bool
) -> None:
    pixels = noise(12, Y, X, dtype="uint16")
    path = tmp_path / "pages.tif"
    write_pages(path, pixels, one_by_one, **options)
    with open_file(path) as file:
        for unsaid in (Choice(), EACH):
            with pytest.raises(InputError, match=r"12 pages .* -s tile.pages=channel") as error:
                file.choose(unsaid)
            one_line(error, path)
        with pytest.raises(InputError, match="has 12 z planes"):
            file.choose(Choice(pages="z"))
        (channels,) = file.choose(Choice(pages="channel"))
        assert channels.suffix == ""
        films = file.choose(Choice(pages="t", t="each"))
        assert [film.suffix for film in films][:2] == ["_t00", "_t01"] and len(films) == 12
        (largest,) = file.choose(Choice(pages="z", z="max"))
        with file.slide(channels.plane) as slide:
            np.testing.assert_array_equal(whole(slide), pixels)
        with file.slide(films[7].plane) as slide:
            np.testing.assert_array_equal(whole(slide)[0], pixels[7])
        with file.slide(largest.plane) as slide:
            np.testing.assert_array_equal(whole(slide)[0], pixels.max(axis=0))
    with pytest.raises(InputError, match="12 pages"):
        open_slide(path)


def test_nan_of_one_plane_hides_nothing(tmp_path: Path) -> None:
    pixels = stack("ZYX", "float32")
    pixels[1, 3:9] = np.nan
    pixels[:, 20, 20] = np.nan
    write_ome(tmp_path / "a.ome.tif", pixels, "ZYX")
    write_zarr(tmp_path / "a.zarr", pixels, "zyx", chunks=(3, 16, 16))
    with np.errstate(invalid="ignore"):
        expected = np.fmax.reduce(pixels)
    assert np.isnan(expected).sum() == 1
    for path in (tmp_path / "a.ome.tif", tmp_path / "a.zarr"):
        with open_slide(path, Plane(z="max")) as slide:
            np.testing.assert_array_equal(whole(slide)[0], expected)


@pytest.mark.parametrize("kind", ["tiff", "zarr"])
def test_memory_of_a_projection_does_not_grow_with_its_planes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(tiff, "SegmentCache", lambda: SegmentCache(2**18))
    monkeypatch.setattr("segpipe.slide.omezarr_source._PROJECTED_BYTES", 2**18)
    peaks = []
    for planes in (8, 64):
        pixels = np.zeros((planes, 256, 256), np.uint16)
        path = tmp_path / f"{planes}.{kind}"
        if kind == "tiff":
            write_ome(path, pixels, "ZYX", tile=(64, 64), compression="zlib")
        else:
            write_zarr(path, pixels, "zyx", chunks=(4, 64, 64))
        with open_slide(path, Plane(z="max")) as slide:
            slide.read(Box(0, 0, 64, 64))
            tracemalloc.start()
            whole(slide)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    plane_bytes = 256 * 256 * 2
    assert peaks[1] < 1.3 * peaks[0] + plane_bytes


def test_a_projection_decodes_each_chunk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_zarr(tmp_path / "a.zarr", noise(20, 96, 96), "zyx", chunks=(8, 32, 32))
    monkeypatch.setattr("segpipe.slide.omezarr_source._PROJECTED_BYTES", 2**14)
    read: list[str] = []
    get = LocalStore.get

    async def counting(self: LocalStore, key: str, *rest: Any, **more: Any) -> Any:
        read.append(key)
        return await get(self, key, *rest, **more)

    with open_slide(tmp_path / "a.zarr", Plane(z="max")) as slide:
        monkeypatch.setattr(LocalStore, "get", counting)
        slide.read(Box(32, 0, 96, 96))
    assert len(read) == len(set(read)) == 3 * 2 * 3


def test_a_file_is_parsed_once_for_all_of_its_planes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ome(tmp_path / "a.ome.tif", noise(9, 30, 40), "ZYX", compression="zlib")
    opened: list[Path] = []

    def counting(path: Path, **options: Any) -> tifffile.TiffFile:
        opened.append(path)
        return tifffile.TiffFile(path, **options)

    monkeypatch.setattr(tiff, "TiffFile", counting)
    result = run(tmp_path / "a.ome.tif", tmp_path / "out", "tile.z=each", stages=("tile",))
    assert len(result.images) == 9 and result.exit_code == 0
    assert len(opened) == 3, "once to name, once to plan, once to read"


def test_a_worker_reads_the_plane_that_it_is_asked_for(tmp_path: Path) -> None:
    pixels = noise(2, 2, 70, 90)
    for number in range(2):
        write_ome(tmp_path / f"{number}.ome.tif", pixels[number], "ZYX", compression="zlib")
    settings = load_settings(None, [*SIZES, "tile.z=each"])
    found = find_inputs([tmp_path], tmp_path / "out", settings.tile)
    images = prepare(found, tmp_path / "out", settings).images
    with closing_input():
        for turn in (0, 1, 0, 2, 1, 3, 3):
            read = reader().slide(images[turn]).read(Box(0, 0, 70, 90))
            np.testing.assert_array_equal(read[0], pixels.reshape(4, 70, 90)[turn])


# --- scenes ---------------------------------------------------------------------------------------


def test_scenes_are_images_and_pyramids_labels_and_thumbnails_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    left, right = noise(3, 64, 96), noise(48, 40, seed=1)
    with tifffile.TiffWriter(path, ome=True) as writer:
        options: dict[str, Any] = {"tile": (16, 16), "photometric": "minisblack"}
        writer.write(left, subifds=2, metadata={"axes": "ZYX", "Name": "left"}, **options)
        writer.write(left[:, ::2, ::2], subfiletype=1, **options)
        writer.write(left[:, ::4, ::4], subfiletype=1, **options)
        writer.write(right, metadata={"axes": "YX", "Name": "right"}, **options)
        writer.write(noise(9, 9), metadata={"axes": "YX", "Name": "label image"})
        writer.write(noise(8, 30), metadata={"axes": "YX", "Name": "macro image"})
    with open_file(path) as file:
        assert file.scenes == (Scene("left", (64, 96), z=3), Scene("right", (48, 40)))
        with pytest.raises(InputError, match=r"2 scenes \(left 64 x 96, right 48 x 40\) and 3 z"):
            file.choose(Choice())
        with pytest.raises(InputError, match=r"has 3 z planes; .* or max"):
            file.choose(Choice(scene="each"))
        chosen = file.choose(EACH)
        assert [one.suffix for one in chosen] == ["_s0_z0", "_s0_z1", "_s0_z2", "_s1"]
        with file.slide(chosen[1].plane) as slide:
            assert tuple(level.shape for level in slide.levels) == ((64, 96), (32, 48), (16, 24))
            np.testing.assert_array_equal(whole(slide)[0], left[1])
        with file.slide(chosen[3].plane) as slide:
            assert tuple(level.shape for level in slide.levels) == ((48, 40),)
            np.testing.assert_array_equal(whole(slide)[0], right)
        assert [one.plane for one in file.choose(Choice(scene=(1,)))] == [Plane(scene=1)]
        with pytest.raises(InputError, match=r"no scene 2: it has 2 scenes, numbered from 0; corr"):
            file.choose(Choice(scene=(2,)))


def test_a_reduced_page_is_a_thumbnail_and_pages_of_two_sizes_are_scenes(tmp_path: Path) -> None:
    first, second = noise(60, 80), noise(50, 70, seed=1)
    with tifffile.TiffWriter(tmp_path / "thumb.tif") as writer:
        writer.write(first, metadata=None)
        writer.write(noise(13, 17), subfiletype=1, metadata=None)
    with open_slide(tmp_path / "thumb.tif") as slide:
        np.testing.assert_array_equal(whole(slide)[0], first)
    with tifffile.TiffWriter(tmp_path / "two.tif") as writer:
        writer.write(first, metadata=None)
        writer.write(second, metadata=None)
    with open_slide(tmp_path / "two.tif", Plane(scene=1)) as slide:
        np.testing.assert_array_equal(whole(slide)[0], second)


def raw_folder(root: Path, scenes: int, names: list[str] | None = None) -> list[Pixels]:
    """A bioformats2raw folder; its OME-XML names the images if `names` are given."""
    zarr.open_group(str(root), mode="w", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    written = []
    for number in range(scenes):
        written.append(noise(2, 20 + number, 30, dtype="uint16", seed=number))
        write_zarr(root / str(number), written[-1], "zyx", "0.4")
    if names is not None:
        zarr.open_group(str(root / "OME"), mode="w", zarr_format=2)
        images = "".join(f'<Image Name="{name}"/>' for name in names)
        (root / "OME" / "METADATA.ome.xml").write_text(f"<OME>{images}</OME>")
    return written


def test_the_scenes_of_a_bioformats2raw_folder(tmp_path: Path) -> None:
    root = tmp_path / "raw.zarr"
    written = raw_folder(root, 12)
    (root / "3" / "0" / ".zarray").write_text("{")
    with open_file(root) as file:
        chosen = file.choose(EACH)
        assert (
            len(chosen) == 23 and chosen[0].suffix == "_s00_z0" and chosen[-1].suffix == "_s11_z1"
        )
        for one in chosen:
            if one.plane.scene == 3:
                with pytest.raises(InputError, match=r"raw.zarr: is no OME-Zarr image"):
                    file.slide(one.plane)
                continue
            with file.slide(one.plane) as slide:
                np.testing.assert_array_equal(
                    whole(slide)[0], written[one.plane.scene][one.plane.z]
                )


def test_a_bioformats2raw_folder_names_its_label_and_order(tmp_path: Path) -> None:
    root = tmp_path / "raw.zarr"
    written = raw_folder(root, 3, ["label image", "one", "two"])
    with open_file(root) as file:
        assert [scene.name for scene in file.scenes] == ["one", "two"]
    zarr.open_group(str(root / "OME"), mode="r+").attrs["series"] = ["2", "0", "1"]
    with open_file(root) as file, file.slide(Plane(scene=1, z=1)) as slide:
        np.testing.assert_array_equal(whole(slide)[0], written[1][1])
    zarr.open_group(str(root / "OME"), mode="r+").attrs["series"] = ["../x", "0", "1"]
    with open_file(root) as file:
        assert len(file.scenes) == 2, "the label is not looked at"
    (root / "OME" / "METADATA.ome.xml").unlink()
    with (
        open_file(root) as file,
        pytest.raises(InputError, match=r"points outside itself \(../x\)") as error,
    ):
        file.slide(Plane(scene=0, z=0))
    one_line(error, root)


def test_the_fields_of_a_plate_and_of_a_well(tmp_path: Path) -> None:
    root = tmp_path / "plate.zarr"
    plate = {"plate": {"wells": [{"path": "A/1"}, {"path": "B/2"}, {"path": "B/3"}]}}
    zarr.open_group(str(root), mode="w").attrs["ome"] = {"version": "0.5", **plate}
    written = {}
    for well in ("A/1", "B/2"):
        well_group = zarr.open_group(str(root / well), mode="w")
        well_group.attrs["ome"] = {
            "version": "0.5",
            "well": {"images": [{"path": "0"}, {"path": "1"}]},
        }
        for field in ("0", "1"):
            written[f"{well}/{field}"] = noise(20, 30, seed=len(written))
            write_zarr(root / well / field, written[f"{well}/{field}"], "yx")
    with open_file(root) as file:
        assert [scene.name for scene in file.scenes] == [*written, "B/3"]
        for number, pixels in enumerate(written.values()):
            with file.slide(Plane(scene=number)) as slide:
                np.testing.assert_array_equal(whole(slide)[0], pixels)
        with pytest.raises(InputError, match="B/3"):
            file.slide(Plane(scene=4))
    with open_slide(root / "B/2", Plane(scene=1)) as slide:
        np.testing.assert_array_equal(whole(slide)[0], written["B/2/1"])


# --- what is chosen -------------------------------------------------------------------------------


def test_planes_are_ordered_and_their_numbers_have_as_many_digits_as_the_last() -> None:
    path = Path("a.tif")
    scene = Scene("a", (20, 30), t=100, z=11)
    chosen = choose_planes(path, [scene], Choice(t=(99, 7, 7), z=(10, 3)))
    assert [one.suffix for one in chosen] == ["_t07_z03", "_t07_z10", "_t99_z03", "_t99_z10"]
    assert chosen[0].plane == Plane(t=7, z=3)
    projected = choose_planes(path, [scene], Choice(t=(5,), z="max"))
    assert [(one.suffix, one.plane) for one in projected] == [("_t05", Plane(t=5, z="max"))]
    assert choose_planes(path, [Scene("a", (20, 30))], Choice(z=(3,), t=(2,), scene=(1,))) == (
        choose_planes(path, [Scene("a", (20, 30))], Choice())
    ), "a file of one plane is that plane, whatever is wanted of others"


def test_a_file_may_claim_any_number_of_planes_but_not_become_as_many_images(
    tmp_path: Path,
) -> None:
    scene = Scene("a", (20, 30), t=2**20, z=2**20)
    with pytest.raises(InputError, match=r"would be 1,099,511,627,776 images"):
        choose_planes(Path("a.tif"), [scene], EACH)
    few = choose_planes(Path("a.tif"), [scene], Choice(t=(1,), z=(2,)))
    assert [one.plane for one in few] == [Plane(t=1, z=2)]
    path = tmp_path / "a.zarr"
    write_zarr(path, noise(2, 20, 30), "zyx")
    array = json.loads((path / "0/zarr.json").read_text())
    array["shape"][0] = 2**40
    (path / "0/zarr.json").write_text(json.dumps(array))
    with open_file(path) as file, pytest.raises(InputError, match="more than") as error:
        file.choose(EACH)
    one_line(error, path)
    assert MAX_IMAGES < 2**20


def test_a_plane_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    write_ome(path, stack("TZYX"), "TZYX")
    for plane, message in {
        Plane(t=3, z=0): "has no time point 3: it has 3 time points, numbered from 0",
        Plane(t=0, z=4): "has no z plane 4: it has 4 z planes",
        Plane(scene=1, t=0, z=0): "has no scene 1: it has 1 scene,",
        Plane(t=0): "has 4 z planes; take them",
        Plane(z="max"): "has 3 time points; take them with --planes each",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            open_slide(path, plane)
        one_line(error, path)


def test_labels_of_slices_are_no_names_of_channels(tmp_path: Path) -> None:
    pixels = stack("ZCYX")
    for name, labels, expected in (
        ("slices", [f"slice {n}" for n in range(Z * C)], ("0", "1")),
        ("channels", ["DAPI", "GFP"] * Z, ("DAPI", "GFP")),
    ):
        path = tmp_path / f"{name}.tif"
        tifffile.imwrite(path, pixels, imagej=True, metadata={"axes": "ZCYX", "Labels": labels})
        with open_slide(path, Plane(z=2)) as slide:
            assert slide.channel_names == expected
            np.testing.assert_array_equal(whole(slide), pixels[2])


def test_a_missing_page_concerns_its_own_plane(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    pixels = noise(3, Y, X)
    write_ome(path, pixels, "ZYX", **TILED)
    path.write_bytes(path.read_bytes().replace(b'SizeZ="3"', b'SizeZ="4"'))
    with open_file(path) as file:
        assert file.scenes[0].z == 4
        with file.slide(Plane(z=2)) as slide:
            np.testing.assert_array_equal(whole(slide)[0], pixels[2])
        for plane in (Plane(z=3), Plane(z="max")):
            with pytest.raises(InputError, match=r"of its \d planes at t 0, ") as error:
                file.slide(plane)
            one_line(error, path)


# --- names ----------------------------------------------------------------------------------------


def test_names_of_planes_are_unique_and_stay(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    write_imagej(folder / "a.tif", noise(12, 20, 30), "ZYX")
    write_ome(folder / "b.ome.tif", noise(2, 2, 20, 30), "TZYX")
    tifffile.imwrite(folder / "b_t1_z0.tif", noise(20, 30))
    assert names(folder, out) == {
        "a": "a.tif: the only plane",
        "b": "b.ome.tif: the only plane",
        "b_t1_z0": "b_t1_z0.tif: the only plane",
    }
    largest = names(folder, out, "tile.z=max", "tile.t=each")
    assert list(largest) == ["a", "b_t0", "b_t1", "b_t1_z0"], "a projection is the whole file"
    each = names(folder, out, "tile.z=each", "tile.t=[1]")
    assert next(iter(each)) == "a_z00" and list(each)[11] == "a_z11"
    assert each["b_t1_z0"] == "b_t1_z0.tif: the only plane"
    assert each["b.ome.tif_t1_z0"] == "b.ome.tif: t 1, z 0"
    again = names(folder, out, "tile.z=[3, 10]", "tile.t=each")
    assert {name: again[name] for name in ("a_z03", "a_z10")} == {
        "a_z03": "a.tif: z 3",
        "a_z10": "a.tif: z 10",
    }, "numbers that are wanted and not there concern their own file"
    assert again["b"] == "b.ome.tif: the only plane"
    write_imagej(folder / "a.tiff", noise(2, 20, 30), "ZYX")
    later = names(folder, out, "tile.z=each", "tile.t=each")
    assert later["a.tiff_z1"] == "a.tiff: z 1", "all planes of the later file keep its suffix"
    assert set(each) <= set(later)
    known = known_inputs(out)
    assert {one.name for one in known} >= {"a", "a_z00", "b", "b_t1_z0", "a.tiff_z0"}
    assert [one.name for one in known][:3] == ["a", "b", "b_t1_z0"]


# --- predict --------------------------------------------------------------------------------------


def nuclei_stack(path: Path, planes: int, **options: Any) -> Pixels:
    """A z stack of fields of nuclei; each plane is also written as a file of its own."""
    pixels = []
    for z in range(planes):
        nuclei(path.parent / "planes" / f"{z}.tif", (90, 130), seed=z)
        pixels.append(tifffile.imread(path.parent / "planes" / f"{z}.tif"))
    write_ome(path, np.stack(pixels), "ZYX", **options)
    return np.stack(pixels)


def test_predict_takes_planes_and_projections_as_it_takes_files(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    nuclei(folder / "flat.tif", (80, 70))
    pixels = nuclei_stack(folder / "stack.ome.tif", 3)
    (folder / "planes").rename(tmp_path / "planes")
    result = run(folder, out)
    assert result.exit_code == 1
    assert [(one.name, one.status) for one in result.images] == [
        ("flat", "done"),
        ("stack", "failed"),
    ]
    assert "has 3 z planes" in str(result.images[1].error)

    result = run(folder, out, "tile.z=each")
    assert [(one.name, one.status) for one in result.images] == [
        ("flat", "skipped"),
        *((f"stack_z{z}", "done") for z in range(3)),
    ]
    told = json.loads((out / "run.json").read_text())
    assert told["failed"] == [] and set(told["images"]) == {
        "flat",
        *(f"stack_z{z}" for z in range(3)),
    }
    assert told["images"]["stack_z2"]["plane"] == {"z": 2}
    assert told["images"]["flat"]["plane"] is None
    assert table_of(out, "stack_z2").schema.metadata[b"plane"] == b"z 2"
    alone = tmp_path / "alone"
    run(tmp_path / "planes", alone)
    for z in range(3):
        labels = labels_of(out, f"stack_z{z}")
        assert labels.max() >= 3
        np.testing.assert_array_equal(labels, labels_of(alone, str(z)))
    assert {one.status for one in run(folder, out, "tile.z=each").images} == {"skipped"}

    tifffile.imwrite(
        tmp_path / "largest.tif", pixels.max(axis=0), resolution=(2e4, 2e4), resolutionunit=3
    )
    run(tmp_path / "largest.tif", alone)
    assert run(folder, out, "tile.z=max").exit_code == 0
    np.testing.assert_array_equal(labels_of(out, "stack"), labels_of(alone, "largest"))
    assert segpipe("clean", out).exit_code == 0


def test_a_damaged_plane_does_not_stop_the_others(tmp_path: Path) -> None:
    path = tmp_path / "in" / "stack.ome.tif"
    nuclei_stack(path, 3, tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path) as file:
        offset = file.series[0][1].dataoffsets[0]
    with path.open("r+b") as opened:
        opened.seek(offset)
        opened.write(b"\xff" * 20)
    result = run(path, tmp_path / "out", "tile.z=each", "engine.attempts=1")
    assert [one.status for one in result.images] == ["done", "failed", "done"]
    assert "stack_z1" in str(result.images[1].error)
    told = json.loads((tmp_path / "out" / "run.json").read_text())
    assert told["failed"] == ["stack_z1"] and told["images"]["stack_z1"]["plane"] == {"z": 1}


def test_the_fingerprint_of_the_first_stage_tells_planes_apart(tmp_path: Path) -> None:
    path = tmp_path / "pages.tif"
    with tifffile.TiffWriter(path) as writer:
        for page in noise(3, 90, 100):
            writer.write(page, metadata=None)
    prints: dict[str, str] = {}
    for settings in (
        ("tile.pages=z", "tile.z=each"),
        ("tile.pages=z", "tile.z=max"),
        ("tile.pages=t", "tile.t=each"),
        ("tile.pages=channel", "tile.channel=1"),
    ):
        chosen = load_settings(None, [*SIZES, *settings])
        found = find_inputs([path], tmp_path / "out", chosen.tile)
        images = prepare(found, tmp_path / "out", chosen).images
        assert len(images) == len(found)
        prints |= {f"{settings} {image.name}": image.fingerprint("tile") for image in images}
    assert len(set(prints.values())) == len(prints) == 3 + 1 + 3 + 1


def test_other_meaning_of_the_same_name_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "in" / "stack.ome.tif"
    pixels = nuclei_stack(path, 2)
    out = tmp_path / "out"
    run(path, out, "tile.z=max", stages=("tile",))
    image = zarr.open_array(out / "stack.ome.zarr" / "0", mode="r")
    np.testing.assert_array_equal(image[0], pixels.max(axis=0))
    os.utime(path)
    tifffile.imwrite(path, pixels[0])
    run(path, out, "tile.z=max", stages=("tile",))
    image = zarr.open_array(out / "stack.ome.zarr" / "0", mode="r")
    np.testing.assert_array_equal(image[0], pixels[0])


# --- the command line -----------------------------------------------------------------------------


def test_planes_on_the_command_line_and_single_settings_win(tmp_path: Path) -> None:
    path = tmp_path / "in" / "stack.ome.tif"
    nuclei_stack(path, 3)
    sets = [part for size in SIZES for part in ("-s", size)]
    common = ("stage", "tile", path, "--engine", "serial", *sets)
    refused = segpipe(*common, "-o", tmp_path / "out")
    assert refused.exit_code == 1
    for options, made in (
        (("--planes", "each"), ["stack_z0", "stack_z1", "stack_z2"]),
        (("--planes", "max"), ["stack"]),
        (("--planes", "each", "-s", "tile.z=[0, 2]"), ["stack_z0", "stack_z2"]),
    ):
        out = tmp_path / "-".join(made)
        assert segpipe(*common, "-o", out, *options).exit_code == 0
        assert sorted(file.name for file in out.glob("*.ome.zarr")) == [
            f"{n}.ome.zarr" for n in made
        ]


def test_info_tells_planes_and_scenes_and_what_predict_would_do(tmp_path: Path) -> None:
    write_ome(tmp_path / "a.ome.tif", stack("TZCYX"), "TZCYX")
    told = segpipe("info", tmp_path / "a.ome.tif").stdout
    assert "53 x 40 px, uint16" in told and "3 time points and 4 z planes" in told
    assert "12 images: a_t0_z0 ... a_t2_z3" in told and "3 images: a_t0 ... a_t2" in told
    with tifffile.TiffWriter(tmp_path / "b.ome.tif", ome=True) as writer:
        writer.write(noise(20, 30), metadata={"axes": "YX", "Name": "left"})
        writer.write(noise(21, 31), metadata={"axes": "YX", "Name": "right"})
    told = segpipe("info", tmp_path / "b.ome.tif").stdout
    assert "right, 31 x 21 px" in told and "2 images: b_s0 ... b_s1" in told and "max" not in told
    tifffile.imwrite(tmp_path / "c.tif", noise(5, 20, 30), photometric="minisblack")
    assert "-s tile.pages=channel" in segpipe("info", tmp_path / "c.tif").stdout
    tifffile.imwrite(tmp_path / "d.tif", smooth(20, 30))
    told = segpipe("info", tmp_path / "d.tif").stdout
    assert "1 image: d" in told and "--planes" not in told


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("tile.z=[]", "tile.z: should be a word, or numbers from 0"),
        ("tile.z=-1", "numbers from 0"),
        ("tile.z=[1.5]", "numbers from 0"),
        ("tile.scene=true", "numbers from 0"),
        ("tile.z=all", "tile.z: input should be 'each' or 'max'"),
        ("tile.t=max", "tile.t: input should be 'each'"),
        ("tile.pages=c", "tile.pages"),
    ],
)
def test_wrong_choices_are_named(tmp_path: Path, setting: str, message: str) -> None:
    result = segpipe("predict", tmp_path, "-o", tmp_path / "out", "-s", setting)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1


def test_a_plane_that_is_not_there_is_what_predict_and_info_say(tmp_path: Path) -> None:
    """And not that planes must be chosen, when they were."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(4, 20, 30), photometric="minisblack", metadata={"axes": "ZYX"})
    asked = ("-s", "tile.z=[9]")
    told = segpipe("info", path, *asked).stdout
    result = segpipe("predict", path, "-o", tmp_path / "out", *asked)
    assert result.exit_code == 1
    assert "has no z plane 9" in told and "has no z plane 9" in result.stderr
    tifffile.imwrite(path, noise(4, 20, 30), photometric="minisblack")
    result = segpipe("predict", path, "-o", tmp_path / "out", "-s", "tile.pages=z")
    assert "has 4 z planes; take them with --planes" in result.stderr
