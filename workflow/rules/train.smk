# Train the variants: one job and one GPU slot each (`--resources gpu=0`: on the CPU).


rule train:
    input:
        tokens=collect("build/tokens/{split}.npy", split=SPLITS),
        counts="build/tokens/tokens.json",
        tokenizer="build/tokenizer/tokenizer.json",
        config="build/base/config.json",
        base="build/base/base.json",
        weights=initial_weights,
        census="build/analysis/census.json",
        memory=memory_prediction,
    output:
        "results/{variant}/model.safetensors",
        "results/{variant}/config.json",
        "results/{variant}/generation_config.json",
        "results/{variant}/tokenizer.json",
        "results/{variant}/tokenizer_config.json",
        "results/{variant}/training_results.json",
        "build/curves/{variant}/train.csv",
        "build/curves/{variant}/validation.csv",
    log:
        "build/logs/train-{variant}.log",
    benchmark:
        "build/benchmarks/train-{variant}.tsv"
    conda:
        "../envs/bwsk.yml"
    threads: PARAMS.train.threads
    resources:
        gpu=1,
        mem_mb=8000,
        runtime="6h",
    params:
        identity=train_identity,
        # Outside the declared outputs: Snakemake deletes those of a killed job, and the run resumes from here.
        checkpoints="build/checkpoints",
    message:
        f"Train {{wildcards.variant}} (progress: tail -f {SHOWN / '{log}'})"
    shell:
        "bwsk train {wildcards.variant} --params params.yaml --tokens build/tokens --tokenizer build/tokenizer"
        " --base build/base --census {input.census} --memory {input.memory} --checkpoints {params.checkpoints}"
        " --curves build/curves/{wildcards.variant} --out results/{wildcards.variant} --gpus {resources.gpu} &> {log}"
