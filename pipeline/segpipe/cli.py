"""The command line: strings to arguments and nothing more. Heavy imports stay inside the commands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from segpipe import __version__
from segpipe.cli_doctor import doctor
from segpipe.cli_export import export
from segpipe.cli_info import info
from segpipe.cli_models import models
from segpipe.cli_report import report
from segpipe.cli_status import status
from segpipe.cli_view import view
from segpipe.errors import SegpipeError, SettingsError

if TYPE_CHECKING:
    from segpipe.settings import Settings

STAGES = ("tile", "infer", "stitch", "measure")


class Commands(click.Group):
    """Shows a SegpipeError as one line and exits with its code; a bug keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SegpipeError as error:
            click.echo(f"segpipe: {error}", err=True)
            ctx.exit(error.exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="segpipe")
def main() -> None:
    """Exact instance masks of images too large for memory.

    \b
    segpipe demo                      see it work on images that it makes
    segpipe predict FOLDER -o OUT     segment every image in FOLDER
    segpipe plan FOLDER               what that would take; nothing is written
    segpipe init FOLDER               write a project YAML for them
    segpipe status OUT                how far its images are, and what failed
    segpipe doctor                    what this installation can do here, and what is broken
    """


main.add_command(info)
main.add_command(models)
main.add_command(report)
main.add_command(view)
main.add_command(export)
main.add_command(status)
main.add_command(doctor)


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What the job is: for `predict`, `stage` and `plan`."""
    options = [
        click.argument("inputs", nargs=-1, type=click.Path(path_type=Path)),
        click.option(
            "-o", "--output", "out", type=click.Path(path_type=Path),
            help="Folder of the results; made if need be.",
        ),
        click.option(
            "-m", "--model", metavar="NAME|FILE",
            help="A model of `segpipe models list`, or a file. [default: auto, by the channels]",
        ),
        click.option(
            "-c", "--config", type=click.Path(path_type=Path),
            help="Settings as YAML; its `input` and `output` stand for INPUTS and -o.",
        ),
        click.option(
            "-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE",
            help="One setting by its dotted name, such as stitch.min_area=20; may be repeated.",
        ),
        click.option(
            "--engine", type=click.Choice(["auto", "serial", "local"]),
            help="Who does the work: this process, or processes on this machine.",
        ),
        click.option("--workers", type=click.IntRange(1), help="Number of processes."),
        click.option(
            "--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), help="Where the network runs."
        ),
        click.option(
            "--channel", "channels", multiple=True, metavar="NAME|NUMBER",
            help="Channel for the model, by name or number from 0; once per channel.",
        ),
        click.option(
            "--planes", type=click.Choice(["each", "max"]),
            help="Files of several planes: each z plane an image, or their maximum; each time "
            "point and each scene an image.",
        ),
        click.option(
            "--tta", is_flag=True,
            help="Test-time augmentation: the mean over 8 views of each window, 8 times the cost.",
        ),
        click.option("--pixel-size", type=float, metavar="UM", help="Size of a pixel in um."),
        click.option(
            "--export", "exports", multiple=True, metavar="FORMAT,...",
            help="Files beside the table: geojson (QuPath), geoparquet, csv, anndata, tiff.",
        ),
        click.option(
            "--diameter", type=float, metavar="PX",
            help="Diameter of the objects in pixels: the image is scaled to what the model knows.",
        ),
        click.option(
            "--scale", type=float, metavar="FACTOR",
            help="Make the image this many times as wide for the model; 1: leave it as it is.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How it goes on: for `predict` and `stage`."""
    restart = click.option("--restart", is_flag=True, help="Forget what OUT holds of these images.")
    verify = click.option(
        "--verify", is_flag=True, help="First check what is finished against its checksums."
    )
    return restart(verify(command))


@main.command()
@job_options
@run_options
def predict(**options: Any) -> None:
    """Segment images, and folders of images, into OUT.

    \b
    OUT/<name>.ome.zarr   the image, and labels/instances with its pyramid (OME-Zarr 0.5)
    OUT/<name>.parquet    one row per object
    OUT/<name>.png        what to look at first
    OUT/report.html       all of it on a page: counts, sizes, seam check, times, failures
    OUT/run.json          the same for machines

    A run that was interrupted goes on where it stopped; a finished one is not done again.
    Exit code 0: all done. 1: an input failed and is named. 2: wrong usage, nothing was started.
    """
    _run(STAGES, **options)


@main.command()
@click.argument("stage", type=click.Choice(STAGES))
@job_options
@run_options
@click.option(
    "--job",
    type=click.Path(path_type=Path),
    help="Instead of INPUTS: the images of a job of the workflow.",
)
@click.option(
    "--manifest",
    type=click.Path(path_type=Path),
    help="With --job: where to tell what became of them.",
)
def stage(stage: str, job: Path | None, manifest: Path | None, **options: Any) -> None:
    """Run one stage by hand: tile, infer, stitch or measure.

    The stages before it must be done with the same settings.

    This is also what the rules of the workflow call, with --job and --manifest. Images that fail are
    then told by the manifest and by `segpipe check`, not by the exit code.
    """
    if (job is None) != (manifest is None):
        raise SettingsError("--job and --manifest go together")
    _run((stage,), job=job, manifest=manifest, **options)


@main.command()
@job_options
@click.option(
    "--sample/--no-sample",
    default=True,
    show_default=True,
    help="Run parts of the images, for an estimate of time: about a minute.",
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Where to write it for machines."
)  # fmt: skip
def plan(sample: bool, json_file: Path | None, **options: Any) -> None:
    """What predict would do, and what it needs: tiles, memory, disk, files, time.

    Nothing is written into OUT; with -o, what is done there already is told.
    Exit code 0: all inputs can be used. 1: some cannot, and are named. 2: wrong usage or settings.
    """
    _log_to_stderr()
    settings, inputs, out = _load(**options)
    from segpipe.plan import plan_job
    from segpipe.plan_text import plan_text
    from segpipe.prepare import writable_folder
    from segpipe.records import write_json

    log = logging.getLogger("segpipe.plan")
    if json_file is not None:
        writable_folder(json_file.parent)  # before a minute's work
    found = plan_job(_named(inputs), out, settings, sampled=sample, told=log.info)
    for line in plan_text(found):
        click.echo(line)
    if json_file is not None:
        write_json(json_file, found.to_json())
    sys.exit(1 if found.failed else 0)


@main.command()
@click.option("-c", "--config", required=True, type=click.Path(path_type=Path), help="The project.")
@click.option(
    "--manifest",
    required=True,
    type=click.Path(path_type=Path),
    help="Written when nothing has failed.",
)
def check(config: Path, manifest: Path) -> None:
    """The last rule of the workflow: name the images that failed, and write run.json.

    The next run of the workflow tries them again. Exit code 0: all done. 1: some failed.
    """
    _log_to_stderr()
    from segpipe.settings import load_project
    from segpipe.workflow import check as check_images

    sys.exit(check_images(load_project(config), manifest))


@main.command()
def workflow() -> None:
    """Where the Snakefile is: snakemake --snakefile "$(segpipe workflow)" ..."""
    from segpipe.workflow import find_snakefile

    click.echo(find_snakefile())


def _run(
    stages: tuple[str, ...],
    restart: bool,
    verify: bool,
    job: Path | None = None,
    manifest: Path | None = None,
    **options: Any,
) -> None:
    _log_to_stderr()
    settings, given, out = _load(**options)
    if job is not None and manifest is not None and out is not None:
        from segpipe.run import run_job

        run_job(stages[0], job, manifest, out, settings)
        return
    if out is None:
        raise SettingsError("no OUT: name it by -o, or give a YAML that holds `output:` by -c")
    from segpipe.run import predict as run

    result = run(_named(given), out, settings, stages=stages, restart=restart, verify=verify)
    sys.exit(result.exit_code)


def _load(
    inputs: tuple[Path, ...],
    out: Path | None,
    model: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
    engine: str | None,
    workers: int | None,
    device: str | None,
    channels: tuple[str, ...],
    planes: str | None,
    tta: bool,
    pixel_size: float | None,
    exports: tuple[str, ...],
    diameter: float | None,
    scale: float | None,
) -> tuple[Settings, tuple[Path, ...], Path | None]:
    """Settings, inputs and OUT: from the YAML, and over it from the options."""
    from segpipe.settings import load_project

    if planes is not None:  # -s wins
        overrides = (f"tile.z={planes}", "tile.t=each", "tile.scene=each", *overrides)
    project = load_project(
        config,
        overrides,
        {
            "infer.model": model,
            "infer.device": device,
            "infer.tta": tta or None,
            "engine.kind": engine,
            "engine.workers": workers,
            "tile.channel": list(channels) or None,
            "tile.pixel_size_um": pixel_size,
            "export.formats": list(exports) or None,
            "tile.diameter": diameter,
            "tile.scale": scale,
        },
    )
    return project.settings, inputs or project.input or (), out or project.output


def _named(inputs: tuple[Path, ...]) -> list[Path]:
    if not inputs:
        raise SettingsError(
            "no INPUTS: name images or folders, or give a YAML that holds `input:` by -c"
        )
    return list(inputs)


def _log_to_stderr() -> None:
    from segpipe.progress import log_to_stderr

    log_to_stderr()


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "path", default="segpipe.yaml", type=click.Path(path_type=Path),
    show_default=True, help="The YAML to write.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the YAML where there is one.")
def init(folder: Path, path: Path, force: bool) -> None:
    """Write a commented project YAML for the images in FOLDER.

    Only their headers are read. What they do not tell, such as which of several channels shows the
    nuclei, is marked FILL IN.
    """
    from segpipe.project_yaml import write_project_yaml

    for key, value in write_project_yaml(folder, path, force=force):
        click.echo(f"{key:<12}{value}")


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
def clean(out: Path) -> None:
    """Remove the work files of finished images from OUT; results stay."""
    from segpipe.cleaning import clean as remove_work

    unfinished = remove_work(out)
    for name in unfinished:
        click.echo(f"{name} is not finished: its work files stay", err=True)
    sys.exit(1 if unfinished else 0)


@main.command()
@click.option(
    "-o", "--output", "out", default="demo", type=click.Path(path_type=Path), show_default=True,
    help="Folder of the images and the results.",
)  # fmt: skip
@click.option(
    "--size", type=click.IntRange(64), default=4096, show_default=True,
    help="Pixels a side of the made field.",
)  # fmt: skip
def demo(out: Path, size: int) -> None:
    """Segment a real image and a made field of nuclei, and compare with the truth."""
    _log_to_stderr()
    from segpipe.demo import run_demo

    sys.exit(run_demo(out, size))


@main.command()
@click.option(
    "--size",
    type=click.IntRange(64),
    default=4096,
    show_default=True,
    help="Pixels a side of the made field.",
)
@click.option("--workers", type=click.IntRange(1), help="Number of processes.")
@click.option(
    "-m",
    "--model",
    default="nuclei-fluorescence",
    metavar="NAME|FILE",
    show_default=True,
    help="A model of one channel.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), help="Where the network runs."
)
@click.option(
    "-o", "--output", "told", type=click.Path(path_type=Path), help="JSON to write the figures to."
)
@click.option(
    "-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As for predict."
)  # fmt: skip
def bench(
    size: int,
    workers: int | None,
    model: str,
    device: str | None,
    told: Path | None,
    overrides: tuple[str, ...],
) -> None:
    """Measure this machine: a fixed made image through the four stages.

    \b
    seconds, CPU s   of the stage as a command, all its processes
    start s          of that, to start: Python, processes, loading the network
    Mpx/s            image over seconds; per core: over CPU seconds, starting left out
    floor s, share   what cannot be done without, measured now; 100 %: nothing else is spent
    peak MB, all MB  memory of the largest process; of all at once

    Floors: tile, reading the TIFF and writing its pixels once; infer, the bare network over the same
    windows; stitch, scipy.ndimage.label of the foreground; measure, numpy.bincount of the labels.
    """
    _log_to_stderr()
    from segpipe.bench import Job, run_bench

    run_bench(Job.of(size, model, workers, device, overrides), told, click.echo)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--restart", is_flag=True, help="Forget what the output folder holds.")
def train(config: Path, restart: bool) -> None:
    """Train a network of the U-Net family as the YAML CONFIG says, and write a model file.

    configs/training holds those of the models that ship. Stopped at any time, even by kill -9, the
    same command goes on to the same weights.
    """
    _log_to_stderr()
    from segpipe.training.run import train as run_training
    from segpipe.training.settings import load_train_settings

    trained = run_training(load_train_settings(config), restart=restart)
    click.echo(f"{trained.model}  report: {trained.report}")


@main.command()
@click.argument("predicted", type=click.Path(path_type=Path))
@click.argument("truth", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), help="Folder to write into."
)
@click.option(
    "--images", type=click.Path(path_type=Path), help="Folder of the images, for worst.png."
)
def evaluate(predicted: Path, truth: Path, out: Path | None, images: Path | None) -> None:
    """How well PREDICTED matches TRUTH: AP at IoU .50 to .95, PQ, AJI, Dice, pooled and by image.

    Both are label files, folders of them, OME-Zarr, or an OUT of `predict`; matched by name.
    -o FOLDER gets per_image.csv, scores.json, and worst.png, a picture of the worst cases.
    Exit code 0: all scored. 1: some were not, and are named. 2: wrong usage.
    """
    _log_to_stderr()
    from segpipe.evaluation import run_evaluation

    sys.exit(run_evaluation(predicted, truth, out, images, click.echo))


if __name__ == "__main__":
    main()
