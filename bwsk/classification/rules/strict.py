"""The strict rules: what the witnesses support, and nothing else.

Sources: rank-nullity for linear maps (a map to fewer dimensions has a kernel; one of full rank to no fewer has none),
strict monotonicity for functions of one element, and the definitions of the norms. "Full rank" and "no zero scale"
hold almost surely for weights that are initialised and trained in the usual ways; where weights are at hand,
`classify(..., ranks=True)` measures the rank of every linear layer instead of assuming it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from bwsk.classification.cases.functions import FUNCTIONS
from bwsk.classification.cases.layers import LAYERS
from bwsk.classification.cases.operators import OPERATORS
from bwsk.classification.convolution import convolution, transposed_convolution
from bwsk.classification.operators import Facts
from bwsk.classification.rules.rule import Rule, RuleSet, always
from bwsk.classification.witness import Residue, Verdict, WitnessCase

S, K, GRAY = Verdict.S, Verdict.K, Verdict.GRAY
NOTHING, ROW, BIT, RNG, ALL = Residue.NOTHING, Residue.ROW, Residue.BIT, Residue.RNG, Residue.EVERYTHING
SPECIMENS: tuple[WitnessCase, ...] = (*LAYERS, *FUNCTIONS, *OPERATORS)
BY_NAME: dict[str, WitnessCase] = {s.name: s for s in SPECIMENS}


def keeps_dimensions(f: Facts) -> bool:
    """A linear map of full rank to at least as many dimensions; `rank` counts where it was measured."""
    return f["out"] >= f["in"] and f.get("rank", f["in"]) >= f["in"]


def enough(f: Facts) -> bool:
    """Rows of at least three elements, the fewest that hold more than two scalars. Unknown sizes count as enough."""
    return f.get("size", 3) >= 3


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
        "reads all, and out >= in x strides (padded) or x taps",
        lambda f: convolution(f) is S,
    )
    add(
        "convolution",
        K,
        ALL,
        "convolution 1x1 stride 2; convolution 4->2 channels; convolution 3x3 stride 2, same width; "
        "convolution without padding",
        "fewer numbers out than in, or positions never read",
        rank,
        "out < in x strides, not padded, or positions skipped",
        lambda f: convolution(f) is K,
    )
    add(
        "convolution",
        GRAY,
        ALL,
        "convolution with an even dilated kernel, length 4; convolution with an even dilated kernel, length 5",
        "depends on the length of the input",
        "both witnesses",
        "otherwise",
        lambda f: convolution(f) is GRAY,
    )
    add(
        "transposed_convolution",
        S,
        NOTHING,
        "transposed convolution 2x",
        "a full-rank linear map that keeps all dimensions",
        rank,
        "out x uncropped phases >= in",
        lambda f: transposed_convolution(f) is S,
    )
    add(
        "transposed_convolution",
        K,
        ALL,
        "transposed convolution 4->1; transposed convolution 2->1 of one phase",
        "fewer numbers out than in",
        rank,
        "out x phases < in",
        lambda f: transposed_convolution(f) is K,
    )
    add(
        "transposed_convolution",
        GRAY,
        ALL,
        "transposed convolution with an even dilated kernel, length 4; "
        "transposed convolution with an even dilated kernel, length 5",
        "depends on the length of the input",
        "both witnesses",
        "otherwise",
        lambda f: transposed_convolution(f) is GRAY,
    )
    add("embedding", S, NOTHING, "embedding", "rows of a table differ: look the row up", "definition")
    add("position", S, NOTHING, "rotary positions", "a code of its own for each position", "Su et al. 2021, RoFormer")

    few, many = "fewer than 3 elements", "3 elements or more"
    add(
        "layer_norm",
        S,
        ROW,
        "layer norm of 8 elements; layer norm of 3 elements",
        "keeps all but mean and deviation of a row",
        "Ba et al. 2016",
        many,
        enough,
    )
    add(
        "layer_norm",
        K,
        ALL,
        "layer norm of 1 element; layer norm of 2 elements",
        "mean and deviation are all there is",
        "Ba et al. 2016",
        few,
        lambda f: not enough(f),
    )
    add(
        "rms_norm",
        S,
        ROW,
        "rms norm of 8 elements; rms norm of 3 elements",
        "keeps all but the scale of a row",
        "Zhang & Sennrich 2019",
        many,
        enough,
    )
    add(
        "rms_norm",
        K,
        ALL,
        "rms norm of 1 element; rms norm of 2 elements",
        "the scale is all there is",
        "Zhang & Sennrich 2019",
        few,
        lambda f: not enough(f),
    )
    add(
        "group_norm",
        S,
        ROW,
        "group norm; group norm operator, groups of 8",
        "keeps all but mean and deviation of a group",
        "Wu & He 2018",
        many,
        enough,
    )
    add(
        "group_norm",
        K,
        ALL,
        "group norm operator, groups of 1",
        "mean and deviation are all there is",
        "Wu & He 2018",
        few,
        lambda f: not enough(f),
    )
    add(
        "batch_norm",
        S,
        ROW,
        "batch norm in training",
        "keeps all but mean and deviation of a channel; couples the batch",
        "Ioffe & Szegedy 2015",
        "batch statistics",
        lambda f: f["batch_statistics"] and enough(f),
    )
    add(
        "batch_norm",
        K,
        ALL,
        "batch norm operator, 2 samples",
        "mean and deviation are all there is",
        "Ioffe & Szegedy 2015",
        f"batch statistics, {few}",
        lambda f: f["batch_statistics"] and not enough(f),
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
        "flatten; pixel shuffle; view; permute; expand; flip; split; zero padding; slice of everything; windows of all",
        "every element is still there",
        "definition",
    )
    add(
        "injective_elementwise",
        S,
        NOTHING,
        "leaky relu; softplus; elu; exp; log; rsqrt; reciprocal; third power; erf; clamp at infinity",
        "strictly monotone: one argument for each value",
        mono,
    )
    add("tanh", S, NOTHING, "tanh", "strictly monotone; only rounding flattens it", mono)
    add("sigmoid", S, NOTHING, "sigmoid", "strictly monotone; only rounding flattens it", mono)
    add(
        "erasing_elementwise",
        K,
        ALL,
        "relu6; hard swish; square; absolute value; clamp; cosine; times zero; maximum with a constant; tangent; "
        "leaky relu, negative slope; softplus, low threshold; division rounded down",
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
        many,
        enough,
    )
    add(
        "softmax",
        K,
        ALL,
        "softmax of 1 element; softmax of 2 elements",
        "the offset is as much as what is left",
        "definition",
        few,
        lambda f: not enough(f),
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
    add(
        "pooling",
        K,
        ALL,
        "max pooling; mean pooling",
        "many values, one result",
        "definition",
        "maximum, or fewer windows than elements",
        lambda f: not (f["mean"] and f["keeps"]),
    )
    add(
        "pooling",
        GRAY,
        ALL,
        "running mean of 3, length 4; running mean of 3, length 5",
        "depends on the length of the input",
        "both witnesses",
        "running mean",
        lambda f: f["mean"] and f["keeps"],
    )
    add(
        "upsample",
        S,
        NOTHING,
        "nearest upsampling",
        "every element is repeated",
        "definition",
        "nearest, reads all",
        lambda f: f["mode"] == "nearest" and f["reads_all"] is True,
    )
    add(
        "upsample",
        K,
        ALL,
        "nearest downsampling",
        "what is not read is gone",
        "definition",
        "nearest, skips some",
        lambda f: f["mode"] == "nearest" and f["reads_all"] is False,
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
        "known numbers",
        lambda f: not f.get("noise"),
    )
    add(
        "elementwise_constant",
        S,
        RNG,
        "plus noise, replayed",
        "undone with the same draw",
        "field arithmetic, to rounding",
        "noise",
        lambda f: bool(f.get("noise")),
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


def composition(facts: Facts) -> dict[str, Any]:
    """What becomes of a composite's input, by the strict rules for its operators.

    `recovered`: the input follows from the output by inverting S operators, with `residue`. `lost`: it does not follow
    even if every operator without a rule could be inverted, and the output has fewer elements, or depends on fewer (by
    the rank of the derivative, where that was measured, by more than two per row). `erasing` and `unknown` are the
    kinds of operators that prevent recovery.
    """
    flow = facts["flow"]
    fewer = flow.fewer or bool(facts["deficient"])
    rules = {call: primitives().decide(call.subject, call.name) for call in flow.calls}
    verdicts = {call: rule.verdict if rule else GRAY for call, rule in rules.items()}
    recovered, used = flow.recovers(lambda call: verdicts[call] is S)
    residues = [rule.residue for call in used if (rule := rules[call])]
    return {
        "recovered": recovered,
        "lost": fewer and not flow.recovers(lambda call: verdicts[call] is not K)[0],
        "residue": max(residues, key=list(Residue).index, default=NOTHING) if recovered else None,
        "erasing": sorted({call.subject.kind for call in flow.calls if verdicts[call] is K}),
        "unknown": sorted({call.subject.kind for call in flow.calls if verdicts[call] is GRAY}),
    }


def build() -> RuleSet:
    """The strict rule set: the primitives, and composites by what they consist of."""
    rules = RuleSet("strict", opinion=False)
    rules.rules = {kind: list(cases) for kind, cases in primitives().rules.items()}

    def add(verdict: Verdict, residue: Residue, witnesses: str, reason: str, condition: str,
            when: Callable[[dict[str, Any]], bool]) -> None:  # fmt: skip
        shown = tuple(BY_NAME[w] for w in witnesses.split("; "))
        source = "its operators' rules"
        rule = Rule("composite", verdict, residue, reason, source, shown, condition, lambda f: when(composition(f)))
        rules.register(rule, prove=False)

    chain = "a chain of preserving operators leads from input to output"
    add(S, NOTHING, "composite of exponential and flip; composite of all and half; additive coupling", chain, "undone",
        lambda c: c["residue"] is NOTHING)  # fmt: skip
    add(S, RNG, "composite of noise and flip", chain, "undone by drawing again",
        lambda c: c["residue"] is RNG)  # fmt: skip
    add(S, ROW, "composite of softmax and scale", chain, "undone with scalars per row", lambda c: c["residue"] is ROW)
    add(
        K,
        ALL,
        "composite with a maximum; composite that drops half",
        "each way to the output erases, and it depends on fewer numbers",
        "no way through, fewer numbers",
        lambda c: c["lost"],
    )
    return rules
