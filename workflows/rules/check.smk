# Name the images that failed, so that the run does not end well; the next run tries them again.
rule check:
    input:
        measured=all_measured,
    output:
        manifest=WORKFLOW.check_manifest,
    log:
        "logs/check.log",
    benchmark:
        "benchmarks/check.tsv"
    localrule: True
    conda:
        "../envs/segpipe.yaml"
    params:
        project=project_file,
    shell:
        "segpipe check -c {params.project} --manifest {output.manifest} 2>&1 | tee {log} >&2"
