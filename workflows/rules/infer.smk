# Probabilities of every pixel, by the network.
rule infer:
    input:
        tiled=manifest_of("tile"),
    output:
        manifest=manifest_of("infer"),
    log:
        "logs/infer/{job}.log",
    benchmark:
        "benchmarks/infer/{job}.tsv"
    conda:
        "../envs/segpipe.yaml"
    threads: 8
    resources:
        mem_mb=memory_mb,
        runtime=minutes,
        infer_jobs=1,
    params:
        settings=WORKFLOW.settings("infer"),
        project=project_file,
    shell:
        "segpipe stage infer --job {input.tiled} --manifest {output.manifest}"
        " -c {params.project} --workers {threads} 2> {log}"
