# The study's workflow: params.yaml -> corpus -> tokens -> train x 6 -> evaluate x 6 -> results.json -> model card.
#
#   snakemake --cores 1 --resources gpu=1                  the study in this directory
#   snakemake --directory demo --cores 2 --resources gpu=0 another study (a directory with a params.yaml), on the CPU
from snakemake.utils import min_version

min_version("9.19")


configfile: "params.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/analysis.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/publish.smk"
include: "workflow/rules/source.smk"


rule all:
    default_target: True
    input:
        "results/results.json",
        "results/README.md",
        "build/analysis/operations.json",
        "build/check.json",
    message:
        f"The model repository is {SHOWN / 'results'}, its card README.md"
