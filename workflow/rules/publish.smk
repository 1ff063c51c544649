# Collect the results, write the model card, verify the finished repository. Seconds each: no cluster jobs.


localrules:
    results,
    card,
    check,


from bwsk.files import sha256_file
from bwsk.study.repository import PLOTS, TEMPLATE, VARIANT as VARIANT_FILES

PLOT_LABELS = dict(
    zip(PLOTS, ("Training loss", "Validation perplexity", "Memory and time of a training step"), strict=True)
)


rule results:
    input:
        collect("results/{variant}/training_results.json", variant=VARIANTS),
        collect("results/{variant}/model.safetensors", variant=VARIANTS),
        collect("build/evaluation/{variant}.json", variant=VARIANTS),
        "build/corpus/corpus.json",
        "build/tokens/tokens.json",
        "build/base/base.json",
        "build/analysis/census.json",
    output:
        results="results/results.json",
        table=report(
            "build/report/results.csv",
            caption="../report/results.rst",
            category="1 Results",
            labels={"what": "Figures of the variants"},
        ),
    log:
        "build/logs/results.log",
    benchmark:
        "build/benchmarks/results.tsv"
    conda:
        "../envs/bwsk.yml"
    params:
        identity=params_identity("results"),
    message:
        "Collect the results and judge the published claims"
    shell:
        "bwsk results --table {output.table} &> {log}"


rule card:
    input:
        "results/results.json",
        collect("results/{variant}/training_results.json", variant=VARIANTS),
    output:
        card="results/README.md",
        html=report(
            "build/report/card.html",
            caption="../report/card.rst",
            category="1 Results",
            labels={"what": "Model card"},
        ),
        figures=[
            report(
                f"results/figures/{file}",
                caption="../report/figures.rst",
                category="2 Figures",
                labels={"what": what},
            )
            for file, what in PLOT_LABELS.items()
        ],
    log:
        "build/logs/card.log",
    benchmark:
        "build/benchmarks/card.tsv"
    conda:
        "../envs/bwsk.yml"
    params:
        identity=params_identity("card"),
        # As a digest: an edit rewrites the card, a fresh checkout with its new timestamps does not.
        template=sha256_file(TEMPLATE),
    message:
        "Draw the figures and write the model card"
    shell:
        "bwsk card --html {output.html} &> {log}"


rule check:
    input:
        "results/results.json",
        "results/README.md",
        collect("results/figures/{file}", file=PLOTS),
        collect("results/{variant}/{file}", variant=VARIANTS, file=VARIANT_FILES),
    output:
        "build/check.json",
    log:
        "build/logs/check.log",
    benchmark:
        "build/benchmarks/check.tsv"
    conda:
        "../envs/bwsk.yml"
    params:
        identity=params_identity("check"),
    message:
        "Verify the model repository: layout, loading, JSON, card, hashes"
    shell:
        "bwsk check &> {log}"
