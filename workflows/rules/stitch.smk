# Probabilities become labels, with ids that no tiling shows in.
rule stitch:
    input:
        inferred=manifest_of("infer"),
    output:
        manifest=manifest_of("stitch"),
    log:
        "logs/stitch/{job}.log",
    benchmark:
        "benchmarks/stitch/{job}.tsv"
    conda:
        "../envs/segpipe.yaml"
    threads: 4
    resources:
        mem_mb=memory_mb,
        runtime=minutes,
    params:
        settings=WORKFLOW.settings("stitch"),
        project=project_file,
    shell:
        "segpipe stage stitch --job {input.inferred} --manifest {output.manifest}"
        " -c {params.project} --workers {threads} 2> {log}"
