# Label pyramid, table and picture.
rule measure:
    input:
        stitched=manifest_of("stitch"),
    output:
        manifest=manifest_of("measure"),
    log:
        "logs/measure/{job}.log",
    benchmark:
        "benchmarks/measure/{job}.tsv"
    conda:
        "../envs/segpipe.yaml"
    threads: 2
    resources:
        mem_mb=memory_mb,
        runtime=minutes,
    params:
        settings=WORKFLOW.settings("measure"),
        project=project_file,
    shell:
        "segpipe stage measure --job {input.stitched} --manifest {output.manifest}"
        " -c {params.project} --workers {threads} 2> {log}"
