# What can be said about the model before training it; needs its configuration, not its weights, and no GPU.


# The training step that is traced and predicted.
STEP = f"--batch {PARAMS.train.batch_size} --input {PARAMS.tokens.block // 2} --target {PARAMS.tokens.block // 2}"


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
        "../envs/bwsk.yml"
    resources:
        mem_mb=2000,
        runtime="10m",
    params:
        identity=params_identity("classify"),
    message:
        "Classify the model's operations into S-type and K-type"
    shell:
        "bwsk classify {input} --rules published --json {output} &> {log}"


rule trace:
    input:
        "build/base/config.json",
    output:
        json="build/analysis/operations.json",
        figure=report(
            "build/analysis/barriers.svg",
            caption="../report/barriers.rst",
            category="2 Figures",
            labels={"what": "What crosses the barriers"},
        ),
    log:
        "build/logs/trace.log",
    benchmark:
        "build/benchmarks/trace.tsv"
    conda:
        "../envs/bwsk.yml"
    resources:
        mem_mb=4000,
        runtime="10m",
    params:
        identity=params_identity("trace"),
        step=STEP,
    message:
        "List the operations of a training step, its phases and barriers"
    shell:
        "bwsk trace {input} {params.step} --json {output.json} --figure {output.figure} &> {log}"


rule predict_memory:
    input:
        "build/base/config.json",
    output:
        "build/analysis/memory-{mode}.json",
    log:
        "build/logs/memory-{mode}.log",
    benchmark:
        "build/benchmarks/memory-{mode}.tsv"
    wildcard_constraints:
        mode="|".join(PARAMS.variants.modes),
    conda:
        "../envs/bwsk.yml"
    resources:
        mem_mb=4000,
        runtime="10m",
    params:
        identity=memory_identity,
        step=STEP,
        precision=PARAMS.train.precision,
        mode=memory_mode,
    message:
        "Predict the peak memory of a training step, {wildcards.mode}"
    shell:
        "bwsk memory {input} {params.step} --precision {params.precision} --optimizer fused"
        " --mode {params.mode} --json {output} &> {log}"
