# Evaluate the trained variants, loaded from disk as a user loads them.


rule evaluate:
    input:
        "results/{variant}/model.safetensors",
        "results/{variant}/config.json",
        "results/{variant}/training_results.json",
        tokens=collect("build/tokens/{split}.npy", split=["validation", "test"]),
        counts="build/tokens/tokens.json",
    output:
        evaluation="build/evaluation/{variant}.json",
        metrics="build/metrics/{variant}.json",
    log:
        "build/logs/evaluate-{variant}.log",
    benchmark:
        "build/benchmarks/evaluate-{variant}.tsv"
    conda:
        "../envs/bwsk.yml"
    threads: PARAMS.train.threads
    resources:
        gpu=1,
        mem_mb=8000,
        runtime="1h",
    params:
        identity=params_identity("evaluate"),
    message:
        "Evaluate {wildcards.variant} on validation and test"
    shell:
        "bwsk evaluate results/{wildcards.variant} --params params.yaml --tokens build/tokens"
        " --json {output.evaluation} --metrics {output.metrics} --gpus {resources.gpu} &> {log}"
