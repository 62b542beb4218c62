# segpipe as a workflow: one job per stage and batch of images, the same bytes as `segpipe predict`.
#
#   snakemake --cores 8 --config input=FOLDER output=OUT --workflow-profile workflows/profiles/local
#
# Everything is written into OUT, from whatever folder it is started.
from pathlib import Path

from snakemake.utils import min_version

min_version("9.0")


configfile: Path(workflow.basedir) / "configs/default.yaml"


include: "workflows/rules/common.smk"
include: "workflows/rules/tile.smk"
include: "workflows/rules/infer.smk"
include: "workflows/rules/stitch.smk"
include: "workflows/rules/measure.smk"
include: "workflows/rules/check.smk"


rule all:
    input:
        rules.check.output.manifest,
