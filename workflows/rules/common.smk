# What the rules share. Rules see jobs (batches of images) only: pixels, tiles and regions are the
# business of the stages, and which image is in which job that of segpipe.workflow.
import os
import shlex
import sys

from segpipe.errors import SegpipeError
from segpipe.workflow import STARTED_IN, open_workflow

try:
    WORKFLOW = open_workflow(config, whole=workflow.is_main_process)
except SegpipeError as error:
    sys.exit(f"segpipe: {error}")


# Jobs on other machines need it to read the configuration as it was meant.
envvars:
    STARTED_IN,


# All paths in the rules are relative to OUT, and so are Snakemake's own records: they belong to the
# results, not to the folder that it was started in.
workdir: WORKFLOW.out


# Jobs run the segpipe of this Python, whether or not its environment is activated, and no other:
# both must agree on what is done. (A prefix replaces Snakemake's own, which sets the strict mode.)
if workflow.deployment_settings.deployment_method:
    sys.exit(
        "segpipe: rules run in the environment of Snakemake; leave out --software-deployment-method"
    )
PYTHON_FOLDER = shlex.quote(os.path.dirname(sys.executable))
shell.prefix(f"set -euo pipefail; export PATH={PYTHON_FOLDER}:$PATH; ")


wildcard_constraints:
    job=r"\d+-[A-Za-z0-9_-]+",


def manifest_of(stage):
    """Where a job's stage says that it is done, for these settings."""
    return WORKFLOW.manifest(stage, "{job}")


def all_measured(wildcards):
    """The last manifest of every job."""
    try:
        jobs = WORKFLOW.all_jobs()
    except SegpipeError as error:  # here, because without input it may still be linted
        sys.exit(f"segpipe: {error}")
    return [WORKFLOW.manifest("measure", job) for job in jobs]


# With `output` among its arguments a param does not count as changed when its value is: what counts
# are the stage's own settings.
def project_file(wildcards, output):
    """The whole project, for the command line of a job."""
    return WORKFLOW.project_file


def memory_mb(wildcards, threads, attempt):
    """Memory of a job: of its own process and of one worker per thread; more at each try."""
    return (1000 + 2000 * threads) * attempt


def minutes(wildcards, attempt):
    """Walltime of a job: it goes on from its last finished region if that is not enough."""
    return 240 * attempt
