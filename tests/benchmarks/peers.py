"""The whole job, from a TIFF to labels on disk, against peers with the same weights on one image.

    python tests/benchmarks/peers.py --size 4096 \\
        --python-monai MONAI/bin/python --python-patchworks PATCHWORKS/bin/python

Each contender is a command of its own, watched from outside: wall seconds, seconds of CPU, and the
peak memory of all its processes, starting included. All may use `--workers` cores. The peers are
given the intensities of the normalisation; segpipe finds them, and writes pyramids, table and
preview besides the labels.

- MONAI `sliding_window_inference`, eager: windows of 1216 every 1024 pixels, the overlap that the halo
  of 96 needs, which are segpipe's windows, blended evenly; and, as is often advised, a quarter of
  overlap with gaussian blending. Then scikit-image's seeded watershed over the whole image.
- patchworks: tiles of 1024 with an overlap of 96, each through network and watershed, joined by touch
  (its default) or by IoU.
- segpipe predict.

Then instances: against the answer of one window over the whole image with the same decode, and against
the truth. Cut: an object of which two labels hold a tenth or more each. Fused: a label that holds most
of two objects. Lost: an object that no label matches at an IoU above one half. Changed: an object that
is not the same to the pixel. "At seams" are objects that touch a line where the contender's
windows or tiles end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from peers_images import made_field, montage

import segpipe
from segpipe import load_settings
from segpipe.evaluate import count_matches
from segpipe.memory import find_ranges
from segpipe.models.modelfile import find_model, read_card
from segpipe.overlaps import Overlaps, split_ids
from segpipe.usage import Usage, watch

HERE = Path(__file__).parent
MODEL = "nuclei-fluorescence"
CORE, HALO = 1024, 96
WINDOW = CORE + 2 * HALO


@dataclass(frozen=True)
class Contender:
    """One way to do the job.

    command
        What to run, given the file of the labels.
    python
        None when it was not given: then it is not run.
    decode
        Which of the untiled answers is its own.
    seams
        Rows, and columns alike, at which a window or tile begins.
    """

    name: str
    python: str | None
    command: Callable[[Path], list[str]]
    read: Callable[[Path], np.ndarray]
    decode: str
    seams: tuple[int, ...]


def main() -> None:
    """Run all that can be run; say what was not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=4096, help="pixels a side")
    parser.add_argument(
        "--speed-only",
        action="store_true",
        help="do not compare instances: one window over the whole image takes 0.5 GB a megapixel",
    )
    parser.add_argument("--real", type=Path, help="folder with images/ and masks/ for a montage")
    parser.add_argument("--workers", type=int, default=2, help="cores for each contender")
    parser.add_argument("--repeats", type=int, default=1, help="the median is told")
    parser.add_argument("--python-monai", help="Python of an environment with MONAI")
    parser.add_argument("--python-patchworks", help="Python of an environment with patchworks")
    parser.add_argument("-s", "--set", action="append", default=[], help="a setting of segpipe")
    parser.add_argument("-o", "--output", type=Path, help="all figures as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pixels, truth = montage(given.real, given.size) if given.real else made_field(given.size)
        tifffile.imwrite(
            folder / "image.tif",
            pixels,
            tile=(512, 512),
            compression="zlib",
            photometric="minisblack",
        )
        contenders = list(list_contenders(given, folder, range_of(pixels)))
        answers = {} if given.speed_only else untiled(folder, range_of(pixels))
        what = "a montage of real images" if given.real else "a made field"
        print(f"{what} of {given.size} x {given.size} pixels, {given.workers} cores each")
        usages: dict[str, list[Usage]] = {}
        instances: dict[str, dict[str, dict[str, float]]] = {}
        for turn in range(given.repeats):
            for one in contenders:
                if one.python is None:
                    continue
                target = folder / "labels"
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
                usage = run(one, target, folder)
                if usage is None:
                    continue
                usages.setdefault(one.name, []).append(usage)
                if turn == 0 and answers:
                    found = one.read(target)
                    instances[one.name] = compare(one, found, answers[one.decode], truth)
        tell_usage(usages)
        if answers:
            tell_instances(instances)
        for one in contenders:
            if one.name not in usages:
                why = "it failed" if one.python else f"no {option_of(one)} was given"
                print(f"NOT RUN: {one.name}: {why}")
    if given.output:
        told = {name: [asdict(one) for one in found] for name, found in usages.items()}
        figures = {"size": given.size, "workers": given.workers, "image": what}
        given.output.write_text(
            json.dumps(figures | {"usage": told, "instances": instances}, indent=1)
        )


def option_of(one: Contender) -> str:
    """The option that names its Python."""
    return f"--python-{one.name.split()[0].lower()}"


def range_of(pixels: np.ndarray) -> tuple[float, float]:
    """The intensities that become 0 and 1."""
    return find_ranges(pixels[None], read_card(find_model(MODEL)), load_settings())[0]


def list_contenders(
    given: argparse.Namespace, folder: Path, ends: tuple[float, float]
) -> Iterable[Contender]:
    """All of them, those without a Python too."""
    image = str(folder / "image.tif")
    common = ["--model", MODEL, "--range", *(repr(float(end)) for end in ends)]
    size = given.size

    def monai(layout: str, pitch: int, blend: str) -> Contender:
        starts = range(-HALO, size, pitch)
        lines = {line for start in starts for line in (start, start + WINDOW) if 0 < line < size}
        options = ["--layout", layout, "--pitch", str(pitch), "--blend", blend]
        options += ["--threads", str(given.workers), "--halo", str(HALO), "--window", str(WINDOW)]
        overlap = "halo" if pitch == CORE else f"overlap {1 - pitch / WINDOW:.2f}"
        return Contender(
            f"MONAI {layout}, {overlap}, {blend}",
            given.python_monai,
            lambda target: [
                *(str(given.python_monai), str(HERE / "peers_monai.py")),
                *(image, str(target / "labels.npy"), *common, *options),
            ],
            lambda target: np.load(target / "labels.npy"),
            "watershed",
            tuple(sorted(lines)),
        )

    def patchworks(layout: str, stitch: str) -> Contender:
        options = ["--layout", layout, "--stitch", stitch, "--workers", str(given.workers)]
        options += ["--tile", str(CORE), "--overlap", str(HALO)]
        return Contender(
            f"patchworks {layout}, {stitch}",
            given.python_patchworks,
            lambda target: [
                *(str(given.python_patchworks), str(HERE / "peers_patchworks.py")),
                *(image, str(target / "labels.zarr"), *common, *options),
            ],
            lambda target: zarr.open_array(target / "labels.zarr" / "labels", mode="r")[:],
            "watershed",
            tuple(range(CORE, size, CORE)),
        )

    yield monai("contiguous", CORE, "constant")
    yield monai("channels_last", CORE, "constant")
    yield monai("channels_last", WINDOW * 3 // 4, "gaussian")
    yield patchworks("channels_last", "touch")
    yield patchworks("channels_last", "iou")
    settings = [part for setting in given.set for part in ("-s", setting)]
    yield Contender(
        "segpipe",
        sys.executable,
        lambda target: [
            *(sys.executable, "-m", "segpipe.cli", "predict", image, "-o", str(target)),
            *("-m", MODEL, "--engine", "local", "--workers", str(given.workers), *settings),
        ],
        lambda target: zarr.open_array(target / "image.ome.zarr/labels/instances/0", mode="r")[:],
        "segpipe",
        tuple(range(CORE, size, CORE)),
    )


def environment() -> dict[str, str]:
    """Where the peers find our network, and nothing that sets threads behind their backs."""
    package = str(Path(segpipe.__file__).parents[1])
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    return kept | {"PYTHONPATH": package}


def untiled(folder: Path, ends: tuple[float, float]) -> dict[str, np.ndarray]:
    """Labels of one window over the whole image, by decode."""
    command = [sys.executable, str(HERE / "peers_untiled.py"), str(folder / "image.tif")]
    command += [str(folder), "--model", MODEL, "--range", *(repr(float(end)) for end in ends)]
    subprocess.run(command, check=True, env=environment())
    return {decode: np.load(folder / f"{decode}.npy") for decode in ("watershed", "segpipe")}


def run(one: Contender, target: Path, folder: Path) -> Usage | None:
    """What the job used; None after a failure, whose last lines are printed."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    try:
        return watch(one.command(target), environment(), log)
    except subprocess.CalledProcessError as error:
        tail = "\n".join(log.read_text().splitlines()[-5:])
        print(f"{one.name} ended with {error.returncode}:\n{tail}", flush=True)
        return None


def compare(
    one: Contender, found: np.ndarray, answer: np.ndarray, truth: np.ndarray
) -> dict[str, dict[str, float]]:
    """Objects that differ, whole and at seams, from the untiled answer and from the truth.

    What the untiled answer itself does to the truth stands beside it.
    """
    told = {
        "untiled": differences(answer, found, one.seams),
        "truth": differences(truth, found, one.seams),
        "untiled to truth": differences(truth, answer, one.seams),
    }
    for name, labels in (("truth", found), ("untiled to truth", answer)):
        told[name]["AP .5"] = count_matches(truth, labels).average_precision
    return told


def differences(wanted: np.ndarray, found: np.ndarray, seams: tuple[int, ...]) -> dict[str, float]:
    """Counts of objects of `wanted` that `found` cuts, fuses, loses or changes."""
    pairs = Overlaps.of(wanted, found)
    objects = pairs.first_ids
    same = pairs.common == pairs.union
    wanted_kinds = {
        "objects": objects,
        "cut": split_ids(pairs),
        "lost": np.setdiff1d(objects, objects[pairs.first[pairs.matches]]),
        "changed": np.setdiff1d(objects, objects[pairs.first[same]]),
    }
    fused = split_ids(pairs.swapped)
    at_seams, found_at_seams = touching(wanted, seams), touching(found, seams)
    told = {kind: len(ids) for kind, ids in wanted_kinds.items()} | {"fused": len(fused)}
    for kind, ids in wanted_kinds.items():
        told[f"{kind} at seams"] = len(np.intersect1d(ids, at_seams))
    told["fused at seams"] = len(np.intersect1d(fused, found_at_seams))
    return told


def touching(labels: np.ndarray, seams: tuple[int, ...]) -> np.ndarray:
    """Ids of the objects with a pixel on either side of a seam."""
    rows = [labels[line - 1 : line + 1].ravel() for line in seams]
    columns = [labels[:, line - 1 : line + 1].ravel() for line in seams]
    return np.setdiff1d(np.concatenate([[0], *rows, *columns]), [0])


def tell_usage(usages: dict[str, list[Usage]]) -> None:
    """Print seconds, memory, and how many times segpipe's each is."""
    median = {
        name: tuple(
            statistics.median(getattr(one, field) for one in found)
            for field in ("seconds", "cpu_seconds", "peak_bytes")
        )
        for name, found in usages.items()
    }
    ours = median.get("segpipe")
    print(f"\n{'':<44}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}   of segpipe's wall, CPU, memory")
    for name, (wall, cpu, peak) in median.items():
        line = f"{name:<44}{wall:>9.1f}{cpu:>9.1f}{peak / 1e6:>9.0f}"
        if ours:
            ratios = (
                f"{mine / our:.2f}" for mine, our in zip((wall, cpu, peak), ours, strict=True)
            )
            line += "   " + ", ".join(ratios)
        print(line)


def tell_instances(instances: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print what differs from the untiled answer, and from the truth."""
    kinds = ("objects", "cut", "fused", "lost", "changed")
    print("\nagainst one window over the whole image with the same decode")
    print(f"{'':<50}{''.join(f'{kind:>9}' for kind in kinds)}")
    for name, where, suffix in places(instances):
        found = instances[name]["untiled"]
        print(f"{where}{''.join(f'{found[kind + suffix]:>9}' for kind in kinds)}")
    print("\nagainst the truth; in brackets, what one window over the whole image does to it")
    print(f"{'':<50}{''.join(f'{kind:>14}' for kind in kinds[:4])}   AP at IoU .5")
    for name, where, suffix in places(instances):
        found, whole = instances[name]["truth"], instances[name]["untiled to truth"]
        cells = [f"{found[kind + suffix]} ({whole[kind + suffix]})" for kind in kinds[1:4]]
        line = where + "".join(f"{cell:>14}" for cell in [found["objects" + suffix], *cells])
        if not suffix:
            line += f"   {found['AP .5']:.4f} ({whole['AP .5']:.4f})"
        print(line)


def places(instances: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Two lines of a table for each contender: its name, how the line begins, and the counts' suffix."""
    for name in instances:
        yield name, f"{name:<44}{'all':<6}", ""
        yield name, f"{'':<44}{'seams':<6}", " at seams"


if __name__ == "__main__":
    main()
