"""The strict rules: what the witnesses support, and nothing else.

Sources: rank-nullity for linear maps (a map to fewer dimensions has a kernel; one of full rank to no fewer has none),
strict monotonicity for functions of one element, and the definitions of the norms. "Full rank" and "no zero scale"
hold almost surely for weights that are initialised and trained in the usual ways; where weights are at hand,
`classify(..., ranks=True)` measures the rank of every linear layer instead of assuming it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from bwsk.operators import Facts
from bwsk.rules import Rule, RuleSet, always
from bwsk.specimens_functions import FUNCTIONS
from bwsk.specimens_layers import LAYERS
from bwsk.specimens_operators import OPERATORS
from bwsk.witness import Residue, Specimen, Verdict

S, K, GRAY = Verdict.S, Verdict.K, Verdict.GRAY
NOTHING, ROW, BIT, RNG, ALL = Residue.NOTHING, Residue.ROW, Residue.BIT, Residue.RNG, Residue.EVERYTHING
SPECIMENS: tuple[Specimen, ...] = (*LAYERS, *FUNCTIONS, *OPERATORS)
BY_NAME: dict[str, Specimen] = {s.name: s for s in SPECIMENS}


def keeps_dimensions(f: Facts) -> bool:
    """A linear map of full rank to at least as many dimensions; `rank` counts where it was measured."""
    return f["out"] >= f["in"] and f.get("rank", f["in"]) >= f["in"]


def keeps_positions(f: Facts) -> bool:
    """A convolution that reads every position and gives no fewer numbers than it takes, borders included.

    Per axis: kernel >= stride (nothing is skipped), padding >= kernel - stride (as many windows as positions / stride)
    and (padding - kernel) mod stride <= padding / 2 (what the last window leaves over is padding, not input); over all
    axes: channels out >= channels in x product of strides. `padding` counts both ends.
    """
    axes = list(zip(f["kernel"], f["stride"], f["padding"], strict=True))
    reads_all = all(k >= s and p >= k - s and (p - k) % s <= p // 2 for k, s, p in axes)
    return reads_all and f["out"] >= f["in"] * math.prod(f["stride"])


def _widens_transposed(f: Facts) -> bool:
    axes = zip(f["kernel"], f["stride"], f["padding"], strict=True)
    return all(k >= s and p <= k - s for k, s, p in axes) and f["out"] * math.prod(f["stride"]) >= f["in"]


@cache
def primitives() -> RuleSet:
    """All strict rules but those for composites, which are decided by these."""
    rules = RuleSet("strict", opinion=False)

    def add(kind: str, verdict: Verdict, residue: Residue, witnesses: str, reason: str, source: str,
            condition: str = "always", when: Callable[[Facts], bool] = always) -> None:  # fmt: skip
        shown = tuple(BY_NAME[w] for w in witnesses.split("; "))
        rules.register(Rule(kind, verdict, residue, reason, source, shown, condition, when), prove=False)

    rank = "rank-nullity theorem"
    add(
        "linear",
        S,
        NOTHING,
        "linear 4->4; linear 4->8; linear 16->16; mm 4->6",
        "full column rank: least squares gives x back",
        rank,
        "out >= in, full rank",
        keeps_dimensions,
    )
    add(
        "linear",
        K,
        ALL,
        "linear 8->4; linear 5->4; mm 2->1",
        "has a kernel: inputs that differ by a null vector agree",
        rank,
        "out < in or rank-deficient",
        lambda f: not keeps_dimensions(f),
    )
    add(
        "convolution",
        S,
        NOTHING,
        "convolution 3x3 same; convolution depthwise causal; convolution patches; convolution strided, widening",
        "a full-rank linear map that keeps all dimensions",
        rank,
        "kernel >= stride, padded, out >= in x strides",
        keeps_positions,
    )
    add(
        "convolution",
        K,
        ALL,
        "convolution 1x1 stride 2; convolution 4->2 channels; convolution 3x3 stride 2, same width; "
        "convolution without padding",
        "fewer numbers out than in, or positions never read",
        rank,
        "otherwise",
        lambda f: not keeps_positions(f),
    )
    add(
        "transposed_convolution",
        S,
        NOTHING,
        "transposed convolution 2x",
        "a full-rank linear map that keeps all dimensions",
        rank,
        "uncropped, out x strides >= in",
        _widens_transposed,
    )
    add(
        "transposed_convolution",
        K,
        ALL,
        "transposed convolution 4->1",
        "fewer numbers out than in",
        rank,
        "otherwise",
        lambda f: not _widens_transposed(f),
    )
    add("embedding", S, NOTHING, "embedding", "rows of a table differ: look the row up", "definition")
    add("position", S, NOTHING, "rotary positions", "the slowest angle tells the position", "Su et al. 2021, RoFormer")

    few, many = "fewer than 3 elements", "3 elements or more"
    add(
        "layer_norm",
        S,
        ROW,
        "layer norm of 8 elements; layer norm of 3 elements",
        "keeps all but mean and deviation of a row",
        "Ba et al. 2016",
        many,
        lambda f: f["size"] >= 3,
    )
    add(
        "layer_norm",
        K,
        ALL,
        "layer norm of 1 element; layer norm of 2 elements",
        "mean and deviation are all there is",
        "Ba et al. 2016",
        few,
        lambda f: f["size"] < 3,
    )
    add(
        "rms_norm",
        S,
        ROW,
        "rms norm of 8 elements; rms norm of 3 elements",
        "keeps all but the scale of a row",
        "Zhang & Sennrich 2019",
        many,
        lambda f: f["size"] >= 3,
    )
    add(
        "rms_norm",
        K,
        ALL,
        "rms norm of 1 element; rms norm of 2 elements",
        "the scale is all there is",
        "Zhang & Sennrich 2019",
        few,
        lambda f: f["size"] < 3,
    )
    add("group_norm", S, ROW, "group norm", "keeps all but mean and deviation of a group", "Wu & He 2018")
    add(
        "batch_norm",
        S,
        ROW,
        "batch norm in training",
        "keeps all but mean and deviation of a channel; couples the batch",
        "Ioffe & Szegedy 2015",
        "batch statistics",
        lambda f: f["batch_statistics"],
    )
    add(
        "batch_norm",
        S,
        NOTHING,
        "batch norm in eval",
        "an affine map per channel",
        "Ioffe & Szegedy 2015",
        "running statistics",
        lambda f: not f["batch_statistics"],
    )

    mono = "strict monotonicity"
    add("identity", S, NOTHING, "identity; cast to the same type", "nothing happens", "definition")
    add(
        "reshape",
        S,
        NOTHING,
        "flatten; pixel shuffle; view; permute; expand; flip; split; zero padding; slice of everything",
        "every element is still there",
        "definition",
    )
    add(
        "injective_elementwise",
        S,
        NOTHING,
        "leaky relu; softplus; elu; exp; log; rsqrt; reciprocal; third power; erf",
        "strictly monotone: one argument for each value",
        mono,
    )
    add("tanh", S, NOTHING, "tanh", "strictly monotone; only rounding flattens it", mono)
    add("sigmoid", S, NOTHING, "sigmoid", "strictly monotone; only rounding flattens it", mono)
    add(
        "erasing_elementwise",
        K,
        ALL,
        "relu6; hard swish; square; absolute value; clamp; cosine; times zero; maximum with a constant",
        "takes a value at more than one argument",
        "definition",
    )
    add("relu", K, ALL, "relu", "all negative inputs become 0", "definition")
    add("gelu", K, BIT, "gelu; gelu, tanh form", "falls, then rises: a bit tells the branch", "Hendrycks & Gimpel 2016")
    add("silu", K, BIT, "silu", "falls, then rises: a bit tells the branch", "Elfwing et al. 2017")
    add(
        "softmax",
        S,
        ROW,
        "softmax; log softmax; softmax operator",
        "keeps all but an offset of the row (log-sum-exp)",
        "definition",
    )

    add(
        "dropout",
        K,
        ALL,
        "dropout in training",
        "dropped values are gone; the RNG state gives back the mask only",
        "Srivastava et al. 2014",
        "training, p > 0",
        lambda f: f["training"] and f["p"] != 0,
    )
    add(
        "dropout",
        S,
        NOTHING,
        "dropout in eval; dropout with p = 0",
        "passes its input through",
        "definition",
        "eval or p = 0",
        lambda f: not f["training"] or f["p"] == 0,
    )
    add("pooling", K, ALL, "max pooling; mean pooling", "many values, one result", "definition")
    add(
        "upsample",
        S,
        NOTHING,
        "nearest upsampling",
        "every element is repeated",
        "definition",
        "nearest",
        lambda f: f["mode"] == "nearest",
    )
    add(
        "recurrent",
        GRAY,
        ALL,
        "recurrent cell, full rank; recurrent cell, rank one",
        "depends on the weights",
        "both witnesses",
    )
    add(
        "attention",
        K,
        ALL,
        "attention over equal keys",
        "an average over keys: queries that weigh alike agree",
        "definition",
    )
    add("loss", K, ALL, "squared error", "a number for a batch", "definition")
    add("routing", K, ALL, "top 1; argmax; top-2 router", "what was not chosen is gone", "definition")

    add("constant", S, NOTHING, "no data", "no activation goes in, so none is erased", "definition")
    add("random", S, RNG, "random draw, replayed", "the generator's state gives the same draw again", "definition")
    add(
        "elementwise_constant",
        S,
        NOTHING,
        "plus a constant; times a parameter",
        "undone with the same number",
        "field arithmetic, to rounding",
    )
    add(
        "row_broadcast",
        S,
        ROW,
        "row times its scalar; row minus its mean",
        "undone with the row's scalar",
        "field arithmetic, to rounding",
    )
    add("merge", K, ALL, "sum of two; product of two", "two tensors become one: one of them must be kept", "definition")
    add("product", K, ALL, "matrix product of two", "two factors become one product", "definition")
    add("widening_cast", S, NOTHING, "cast fp32 to fp64", "every value has a counterpart", "IEEE 754")
    add("narrowing_cast", K, ALL, "cast fp64 to int64", "neighbouring values fall together", "IEEE 754")
    add("selection", K, ALL, "slice", "what is not selected is gone", "definition")
    add("reduction", K, ALL, "sum over an axis; mean over an axis", "many values, one result", "definition")
    add("prefix_sum", S, NOTHING, "cumulative sum", "differences give the terms back", "definition")
    add("sorting", S, NOTHING, "sort with indices", "the indices put the values back", "definition")
    add("comparison", K, ALL, "comparison", "a truth value for a number", "definition")
    add("masking", K, ALL, "masked fill", "overwritten elements are gone", "definition")
    return rules


def composition(facts: Facts) -> dict[str, list[str]]:
    """Kinds of the operators that a composite runs and that erase, and of those that no strict rule decides."""
    decided = [(subject.kind, primitives().decide(subject, operator)) for subject, operator in facts["operations"]]
    return {
        "erasing": sorted({kind for kind, rule in decided if rule and rule.verdict is K}),
        "unknown": sorted({kind for kind, rule in decided if not rule or rule.verdict is GRAY}),
    }


def build() -> RuleSet:
    """The strict rule set: the primitives, and composites by what they consist of."""
    rules = RuleSet("strict", opinion=False)
    rules.rules = {kind: list(cases) for kind, cases in primitives().rules.items()}
    erasing, preserving = BY_NAME["composite with a maximum"], BY_NAME["composite of exponential and flip"]
    for rule in (
        Rule(
            "composite",
            K,
            ALL,
            "one of its operators erases",
            "its operators' rules",
            (erasing,),
            "an operator erases",
            lambda f: bool(composition(f)["erasing"]),
        ),
        Rule(
            "composite",
            S,
            NOTHING,
            "each of its operators preserves",
            "its operators' rules",
            (preserving,),
            "all operators preserve",
            lambda f: not any(composition(f).values()),
        ),
    ):
        rules.register(rule, prove=False)
    return rules
