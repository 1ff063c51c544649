# What the classification says about the model; needs its configuration, not its weights.


rule classify:
    input:
        "build/base/config.json",
    output:
        "build/analysis/census.json",
    log:
        "build/logs/classify.log",
    benchmark:
        "build/benchmarks/classify.tsv"
    conda:
        "bwsk"
    resources:
        mem_mb=2000,
        runtime="10m",
    params:
        identity=params_identity("classify"),
    message:
        "Classify the model's operations into S-type and K-type"
    shell:
        "bwsk classify {input} --rules published --json {output} &> {log}"
