"""The publication that this project reproduces, as data: its numbers, its protocol, and their sources.

Numbers are those of the model repository tzervas/bwsk-t5-small (its page and its results file). Each variant was run
once, without a seed, on one RTX 3090 Ti. Two corrections are arithmetic on those numbers: both published memory peaks
contain a second, leaked float32 copy of the model, and the published times contain 35 to 37 validations.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bwsk.units import MIB

REPOSITORY = "tzervas/bwsk-t5-small"
ONE_RUN = "one run per variant on an RTX 3090 Ti; the time added to a step comes from another run on an RTX 5080"
SOFTWARE_URL = "https://github.com/tzervas/ai-s-combinator"
BASE_ID = "google-t5/t5-small"
BASE_REVISION = "df1b051c49625cf57a3d0d8d3863ed4d13564fe4"
DATASET_ID = "Salesforce/wikitext"
DATASET_CONFIG = "wikitext-2-raw-v1"
DATASET_REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"

PARAMETERS = 60_506_624
S_MODULES, K_MODULES, LEAF_MODULES = 134, 56, 190
# Rows of the corpus, blank ones included; and the training blocks that 1,386 steps of batch 4 an epoch allow.
ROWS = MappingProxyType({"train": 36_718, "validation": 3_760, "test": 4_358})
TRAIN_BLOCKS = range(5_541, 5_545)
# One float32 copy of the weights in MiB: the amount by which the published peaks are too large.
LEAKED_MIB = PARAMETERS * 4 / MIB
# The framework's own second benchmark, of training steps alone (300 steps, RTX 5080), in seconds. It has no leak and
# peaks at 1982.85 and 1176.84 MiB, which confirms the arithmetic.
STEPS_ONLY_S = MappingProxyType({"conventional": 9.61, "bwsk-reversible": 12.14})

# Key of params.yaml -> the values that count as published: the page's first, then that of the code that made the
# numbers, where the two differ. Keys that are not here (seed, threads, log_every, …) do not change what is measured.
PROTOCOL: MappingProxyType[str, tuple[Any, ...]] = MappingProxyType(
    {
        "tokens.separator": ("\n\n",),
        "tokens.block": (512,),
        "tokens.window": (512,),
        "tokens.stride": (128,),
        "train.batch_size": (4,),
        "train.epochs": (10,),
        "train.max_steps": (None,),
        "train.lr_finetune": (5.0e-5,),
        "train.lr_scratch": (3.0e-4, 2.5e-4),
        "train.warmup": (0.1,),
        "train.warmup_start": (0.1,),
        "train.betas": ([0.9, 0.999],),
        "train.eps": (1.0e-8,),
        "train.weight_decay": (0.01,),
        "train.max_grad_norm": (1.0,),
        "train.precision": ("fp16", "fp32"),
        "train.eval_every": (500,),
        "train.patience": (3,),
        "train.tf32": (False,),
        "evaluate.precision": ("fp32",),
        "evaluate.max_windows": (None,),
    }
)


@dataclass(frozen=True)
class PublishedVariant:
    """One row of the published result tables, at the precision of the published results file."""

    final_train_loss: float
    best_val_metric: float
    test_metric: float
    epochs_completed: int
    total_steps: int
    wall_time_s: float
    peak_memory_mb: float


VARIANTS: MappingProxyType[str, PublishedVariant] = MappingProxyType(
    {
        "finetune-conventional": PublishedVariant(
            3.6738579273, 31.6355743408, 30.6207695007, 10, 13_000, 824.0613718819, 2214.9150390625
        ),
        "finetune-bwsk-analyzed": PublishedVariant(
            3.7369699478, 31.6206817627, 30.5996856689, 10, 13_860, 880.3513031661, 2214.9150390625
        ),
        "finetune-bwsk-reversible": PublishedVariant(
            3.5710225105, 31.6378078461, 30.5961112976, 10, 13_860, 974.9131275320, 1407.65283203125
        ),
        "scratch-conventional": PublishedVariant(
            4.7316350937, 236.6080322266, 234.2665405273, 10, 13_860, 879.6076198140, 2214.9150390625
        ),
        "scratch-bwsk-analyzed": PublishedVariant(
            4.4786930084, 234.6004486084, 232.1046600342, 10, 13_860, 886.8757166090, 2214.9150390625
        ),
        "scratch-bwsk-reversible": PublishedVariant(
            5.3225903511, 231.8491363525, 230.4225311279, 10, 13_860, 972.5993287450, 1407.65283203125
        ),
    }
)
