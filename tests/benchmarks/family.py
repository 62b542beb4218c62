"""The U-Net family at one equal budget, and what each part of the recipe is worth: a table each.

    python tests/benchmarks/family.py networks DATA -o FOLDER --steps 400
    python tests/benchmarks/family.py ablation DATA -o FOLDER --steps 400

DATA holds images, masks and index.csv as configs/training/nuclei-fluorescence.yaml says; every run
is that training with a smaller budget and the network, or the part of the recipe, changed. All see the
same crops of the same split in the same order; weights and thresholds are chosen on its validation
images, whose AP is printed. Trainings resume: run it again after a stop.

    weights          parameters of the network
    AP .50, mean     pooled over the validation images; mean over IoU .50 to .90
    CPU ms / Mpx     of core: CPU time of one thread by the CPU backend, windows of 1024, halo
                     computed and thrown away as in `predict`; of two halos and 1024 where
                     the halo leaves nothing of that
    context, useful  pixels; share of a 1024 x 1024 window that is core
    train s          wall time of the training on this machine, validation included; of what was left,
                     where it was resumed
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from segpipe.models.budget import MILLION
from segpipe.models.context import next_admissible
from segpipe.models.modelfile import load_model, model_geometry
from segpipe.segmenter import load_segmenter
from segpipe.training.run import train
from segpipe.training.settings import parse_train_settings

RECIPE = Path(__file__).parents[2] / "configs" / "training" / "nuclei-fluorescence.yaml"
WINDOW = 1024

ABLATION: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "the recipe": {},
    "no weight map": {"loss": {"weight_map": False}},
    "no elastic deformation": {"augment": {"elastic_px": 0.0}},
    "foreground alone": {"network": {"outputs": ["foreground"]}},
}


def recipe_at(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """The shipped model's recipe with the small budget."""
    tree: dict[str, Any] = yaml.safe_load(RECIPE.read_text())
    tree["name"] = name.replace(" ", "-")
    tree["output"] = str(arguments.output / tree["name"])
    for key, file in (("images", "images"), ("masks", "masks"), ("index", "index.csv")):
        given = getattr(arguments, key)
        tree["data"][key] = str(given or arguments.data / file)
    tree["course"] |= {
        "steps": arguments.steps,
        "batch": arguments.batch,
        "crop": arguments.crop,
        "averaging": 0.99,
        "validate_every": max(1, arguments.steps // 2),
    }
    tree["threads"] = arguments.threads
    return tree


def trained(tree: dict[str, Any]) -> dict[str, Any]:
    """Figures of a training; from its folder where it is finished already."""
    kept = Path(tree["output"]) / "figures.json"
    settings = parse_train_settings(tree, "benchmark")
    told = settings.model_dump(mode="json")
    if kept.is_file():
        before: dict[str, Any] = json.loads(kept.read_text())
        if before.get("settings") == told:
            return before
    start = time.perf_counter()
    result = train(settings)
    network, card = load_model(result.model)
    geometry = model_geometry(card)
    found: dict[str, Any] = {
        "settings": told,
        "weights": sum(parameter.numel() for parameter in network.parameters()),
        "AP .50": result.figures["AP at IoU .50"],
        "AP .90": result.figures["AP at IoU .90"],
        "mean": result.figures["mean AP, IoU .50 to .90"],
        "context": geometry.context,
        "useful": max(0, WINDOW - 2 * geometry.halo) ** 2 / WINDOW**2,
        "exact": geometry.exact,
        "CPU ms / Mpx": cpu_ms(result.model),
        "train s": time.perf_counter() - start,
    }
    kept.write_text(json.dumps(found, indent=1))
    return found


def cpu_ms(model: Path) -> float:
    """CPU milliseconds for a megapixel of core: the least of three windows."""
    segmenter = load_segmenter(model, "cpu", threads=1, core_only=True)
    network, _ = load_model(model)
    halo = segmenter.halo
    # where the halo leaves nothing of a window of 1024: one of two halos and 1024
    size = next_admissible(network, WINDOW if 2 * halo < WINDOW else 2 * halo + WINDOW)
    window = np.random.default_rng(0).random((1, segmenter.channels, size, size), np.float32)
    segmenter(window)
    times = []
    for _ in range(3):
        start = time.process_time()
        output = segmenter(window)
        times.append(time.process_time() - start)
    return min(times) * 1e3 / (output.shape[-1] * output.shape[-2] / 1e6)


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| | weights | AP .50 | AP .90 | mean .50 to .90 | CPU ms / Mpx | context | useful | exact "
        "| train s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['weights'] / 1e6:.2f} M | {row['AP .50']:.3f} | {row['AP .90']:.3f} "
            f"| {row['mean']:.3f} | {row['CPU ms / Mpx']:.0f} | {row['context']} "
            f"| {100 * row['useful']:.0f} % | {'yes' if row['exact'] else 'no'} "
            f"| {row['train s']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["networks", "ablation"])
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=192)
    parser.add_argument("--threads", type=int)
    for key in ("images", "masks", "index"):
        parser.add_argument(f"--{key}", type=Path, help=f"instead of that in DATA: {key}")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if arguments.what == "networks":
        for name, parameters in MILLION.items():
            tree = recipe_at(arguments, name)
            tree["network"]["architecture"] = {"name": name, "parameters": dict(parameters)}
            rows[name] = trained(tree)
            print(table({name: rows[name]}).splitlines()[-1], flush=True)
    else:
        for name, changes in ABLATION.items():
            tree = recipe_at(arguments, name)
            small = {"name": "unet", "parameters": dict(MILLION["unet"])}
            tree["network"]["architecture"] = small
            for section, values in changes.items():
                tree[section] = tree.get(section, {}) | values
            rows[name] = trained(tree)
            print(table({name: rows[name]}).splitlines()[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
