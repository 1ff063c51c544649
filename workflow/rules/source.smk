# For DVC alone, whose stages depend on these files; Snakemake's own rules have the digests as parameters.


localrules:
    source,


from bwsk.study.provenance import STEPS


rule source:
    output:
        collect("build/source/{step}", step=STEPS),
    log:
        "build/logs/source.log",
    conda:
        "../envs/bwsk.yml"
    message:
        "Digest the code of each step"
    shell:
        "bwsk source --out build/source &> {log}"
