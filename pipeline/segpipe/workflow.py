"""What the Snakefile asks before it starts jobs, and what its last rule checks.

`open_workflow` parses the configuration, names the images, puts them into jobs and makes everything
that jobs share, so that what is wrong is said before the first job and no two jobs write the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from segpipe.errors import SettingsError
from segpipe.inputs import find_inputs
from segpipe.jobs import Job, job_manifest, plan_jobs, synchronise, told_by
from segpipe.models.modelfile import find_model, is_model_name
from segpipe.numeric_plan import model_hashes, stage_digests
from segpipe.prepare import begin, writable_folder
from segpipe.records import fingerprint, write_json, write_text
from segpipe.report import read_entries, write_run_json
from segpipe.reporting import write_report
from segpipe.results import counted, found_text, log_failed
from segpipe.settings import AUTO, Project, Settings, parse_project
from segpipe.stages.image import STAGES, settings_of

log = logging.getLogger(__name__)

STARTED_IN = "SEGPIPE_STARTED_IN"
"""Environment variable: the folder in which Snakemake was started, for its processes that run one
job. On a cluster these start in OUT, where the relative paths of the configuration mean nothing."""


@dataclass(frozen=True)
class Workflow:
    """A project as the rules see it.

    Attributes
    ----------
    jobs
        Empty where this process only runs one of them.
    """

    project: Project
    jobs: tuple[Job, ...]

    @property
    def out(self) -> Path:
        """OUT; here when none was named."""
        return self.project.output or Path()

    @cached_property
    def digests(self) -> dict[str, str]:
        """Of the settings, for each stage."""
        return stage_digests(self.project.settings)

    @cached_property
    def project_file(self) -> str:
        """The project as a file in OUT, for jobs; other settings are another file."""
        text = yaml.safe_dump(_plain(self.project), sort_keys=False)
        path = Path("manifests", "projects", f"{fingerprint(text)}.yaml")
        if not (self.out / path).exists():
            write_text(self.out / path, text)
        return os.fspath(path)

    def manifest(self, stage: str, job: str) -> str:
        """A job's manifest of a stage, relative to OUT."""
        return os.fspath(job_manifest(Path(), job, stage, self.digests[stage]))

    @property
    def check_manifest(self) -> str:
        """Says that all jobs are done and nothing has failed, relative to OUT."""
        digest = fingerprint(self.digests["measure"], [job.id for job in self.jobs])
        return f"manifests/check.{digest}.json"

    def all_jobs(self) -> list[str]:
        """Names of the jobs.

        Raises
        ------
        SettingsError
            When no input or no output was named.
        """
        for key, value in ("input", self.project.input), ("output", self.project.output):
            if not value:
                raise SettingsError(
                    f"no {key}: name it by --config {key}=PATH, or in a --configfile"
                )
        return [job.id for job in self.jobs]

    def settings(self, stage: str) -> dict[str, Any]:
        """The settings that concern a stage, as a rule's params."""
        settings = self.project.settings
        return settings_of(stage, settings, model_hashes(settings))


def find_snakefile() -> Path:
    """The Snakefile that belongs to this package: of the checkout, or in the installed package."""
    package = Path(__file__).parent
    for folder in (package / "_workflow", package.parents[1]):
        if (folder / "Snakefile").is_file():
            return folder / "Snakefile"
    raise SettingsError(f"there is no Snakefile beside {package}; install segpipe again")


def open_workflow(config: Mapping[str, Any], *, whole: bool) -> Workflow:
    """The workflow of a configuration. One that names no input or output may be looked at (linted).

    Parameters
    ----------
    whole
        Whether this process decides what is to be done; else it runs one job of those decided.

    Raises
    ------
    SettingsError, ModelError
        Whatever is wrong with the settings: nothing was started.
    """
    if whole:
        os.environ[STARTED_IN] = os.fspath(Path.cwd())
    project = project_of(config, Path(os.environ[STARTED_IN]))
    out = project.output
    if not whole or not project.input or out is None:
        return Workflow(project, ())
    writable_folder(out)
    found = find_inputs(project.input, out, project.tile)
    begin(out, project.settings)
    jobs = plan_jobs(found, out, project.batch)
    workflow = Workflow(project, tuple(jobs))
    synchronise(out, jobs, workflow.digests, read_entries(out), project.settings)
    return workflow


def project_of(config: Mapping[str, Any], here: Path) -> Project:
    """The project of Snakemake's `config`, with absolute paths: relative ones are seen from here.

    `--config` gives strings for everything inside of `stitch='{region: 2048}'`, `null` among them.

    Raises
    ------
    SettingsError
        As `parse_project`; a section that is no mapping.
    """
    tree: dict[str, Any] = {}
    for key, value in config.items():
        value = _unquoted(value)
        if key in Settings.model_fields:
            if isinstance(value, str):
                value = _parsed(key, value)
            if value is not None and not isinstance(value, Mapping):
                raise SettingsError(
                    f"'{key}' must hold keys, such as {key}='{{region: 2048}}', got {value!r}"
                )
            value = {name: _unquoted(inner) for name, inner in (value or {}).items()}
        tree[key] = value
    project = parse_project(tree)
    return project.model_copy(
        update={
            "input": tuple(here / path for path in project.input or ()) or None,
            "output": None if project.output is None else here / project.output,
            "tile": project.tile.model_copy(
                update={"mask": None if project.tile.mask is None else here / project.tile.mask}
            ),
            "infer": project.infer.model_copy(
                update={"model": _absolute(project.infer.model, here)}
            ),
        }
    )


def _unquoted(value: Any) -> Any:
    return None if value in ("null", "~") else value


def _parsed(key: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"the value of '{key}' is not YAML: {text!r}") from error


def _absolute(model: str, here: Path) -> str:
    """A model by its path wherever a job starts; a name stays."""
    if model == AUTO or is_model_name(model):
        return model
    return os.fspath(find_model(here / model))


def _plain(project: Project) -> dict[str, Any]:
    """Of what YAML can hold."""
    tree = project.model_dump(mode="json", exclude={"input", "output", "model"})
    paths = [os.fspath(path) for path in project.input or ()]
    return {"input": paths, "output": os.fspath(project.output or ""), **tree}


def check(project: Project, manifest: Path) -> int:
    """Name the images that failed, forget that they were tried, and write run.json; the exit code.

    Parameters
    ----------
    manifest
        Written when nothing has failed.
    """
    if not project.input or project.output is None:
        raise SettingsError("`check` is called by the workflow, with its project (-c)")
    out, digests = project.output, stage_digests(project.settings)
    entries: dict[str, Mapping[str, Any]] = {}
    missing: list[str] = []
    for job in plan_jobs(find_inputs(project.input, out, project.tile), out, project.batch):
        told = told_by(job_manifest(out, job.id, "measure", digests["measure"]))
        entries |= {image.name: image.entry for image in told}
        missing += [one.name for one in job.images if one.name not in entries]
        if any(image.failed for image in told):
            for stage in STAGES:
                path = job_manifest(out, job.id, stage, digests[stage])
                if any(image.failed for image in told_by(path)):
                    path.unlink()
    failed = sorted(name for name, entry in entries.items() if entry["status"] == "failed")
    write_run_json(out, entries, project.settings, None)
    write_report(out)
    for name in failed:
        log.error("%s", entries[name]["error"])
    whole = [entry for name, entry in entries.items() if name not in failed]
    objects = sum(entry["objects"] or 0 for entry in whole)
    found = found_text((entry["objects"], entry.get("classes") or ()) for entry in whole)
    done = counted(len(entries) - len(failed), "image")
    log.info("%s done, %s, %d failed; results in %s", done, found, len(failed), out)
    log_failed(failed, out)
    if missing:
        log.warning("%s came in since the run began: run it again", counted(len(missing), "image"))
    if failed:
        return 1
    write_json(manifest, {"status": "done", "images": len(entries), "objects": objects})
    return 0
