# The data of a study: corpus, tokenizer, tokens, and the checkpoint that fine-tuning starts from.


from bwsk.study.base_checkpoint import FILES as BASE_FILES
from bwsk.study.tokenizer import FILES as TOKENIZER_FILES

TRAINS_TOKENIZER = PARAMS.tokenizer.source == "train"
PRETRAINS_BASE = PARAMS.base.source == "pretrain"


rule corpus:
    input:
        local_files(PARAMS.corpus, [f"{split}{kind}" for split in SPLITS for kind in (".txt", ".parquet")]),
    output:
        collect("build/corpus/{split}.parquet", split=SPLITS),
        "build/corpus/corpus.json",
    log:
        "build/logs/corpus.log",
    benchmark:
        "build/benchmarks/corpus.tsv"
    conda:
        "../envs/bwsk.yml"
    resources:
        mem_mb=4000,
        runtime="30m",
    params:
        identity=params_identity("corpus"),
    message:
        "Get the corpus"
    shell:
        "bwsk corpus --params params.yaml --out build/corpus &> {log}"


rule tokenizer:
    input:
        local_files(PARAMS.tokenizer, TOKENIZER_FILES),
        ["build/corpus/train.parquet", "build/corpus/corpus.json"] if TRAINS_TOKENIZER else [],
    output:
        "build/tokenizer/tokenizer.json",
        "build/tokenizer/tokenizer_config.json",
        "build/tokenizer/info.json",
    log:
        "build/logs/tokenizer.log",
    benchmark:
        "build/benchmarks/tokenizer.tsv"
    conda:
        "../envs/bwsk.yml"
    resources:
        mem_mb=4000,
        runtime="30m",
    params:
        identity=params_identity("tokenizer"),
        corpus="--corpus build/corpus" if TRAINS_TOKENIZER else "",
    message:
        "Get the tokenizer"
    shell:
        "bwsk tokenizer --params params.yaml {params.corpus} --out build/tokenizer &> {log}"


rule tokens:
    input:
        collect("build/corpus/{split}.parquet", split=SPLITS),
        "build/corpus/corpus.json",
        "build/tokenizer/tokenizer.json",
        "build/tokenizer/tokenizer_config.json",
    output:
        collect("build/tokens/{split}.npy", split=SPLITS),
        "build/tokens/tokens.json",
    log:
        "build/logs/tokens.log",
    benchmark:
        "build/benchmarks/tokens.tsv"
    conda:
        "../envs/bwsk.yml"
    resources:
        mem_mb=4000,
        runtime="30m",
    params:
        identity=params_identity("tokens"),
    message:
        "Tokenise the corpus into blocks and windows"
    shell:
        "bwsk tokens --params params.yaml --corpus build/corpus --tokenizer build/tokenizer"
        " --out build/tokens &> {log}"


rule base:
    input:
        local_files(PARAMS.base, BASE_FILES),
        "build/tokenizer/tokenizer.json",
        "build/tokenizer/tokenizer_config.json",
        ["build/tokens/train.npy", "build/tokens/tokens.json"] if PRETRAINS_BASE else [],
    output:
        "build/base/config.json",
        "build/base/generation_config.json",
        "build/base/model.safetensors",
        "build/base/base.json",
    log:
        "build/logs/base.log",
    benchmark:
        "build/benchmarks/base.tsv"
    conda:
        "../envs/bwsk.yml"
    threads: PARAMS.train.threads
    resources:
        mem_mb=8000,
        runtime="1h",
    params:
        identity=params_identity("base"),
    message:
        f"Get the base checkpoint (progress: tail -f {SHOWN / 'build/logs/base.log'})"
    shell:
        "bwsk base --params params.yaml --tokenizer build/tokenizer --tokens build/tokens" " --out build/base &> {log}"
