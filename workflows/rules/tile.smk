# Copy the images into OME-Zarr, with pyramids, and find their normalisation.
rule tile:
    input:
        images=ancient("manifests/jobs/{job}.images.json"),
    output:
        manifest=manifest_of("tile"),
    log:
        "logs/tile/{job}.log",
    benchmark:
        "benchmarks/tile/{job}.tsv"
    conda:
        "../envs/segpipe.yaml"
    threads: 2
    resources:
        mem_mb=memory_mb,
        runtime=minutes,
    params:
        settings=WORKFLOW.settings("tile"),
        project=project_file,
    shell:
        "segpipe stage tile --job {input.images} --manifest {output.manifest}"
        " -c {params.project} --workers {threads} 2> {log}"
