"""The published rules: the table of the publication (github.com/tzervas/ai-s-combinator), verdict by verdict.

It is a table of opinions, so its rules need a witness only for *some* case that they cover: the square linear layer
stands for all of them. Where the evidence contradicts it in another case (`RuleSet.contradictions`), the strict rules
differ. Kinds that the publication does not mention have no rule here and are GRAY in a census of modules.
"""

from __future__ import annotations

from collections.abc import Callable

from bwsk.classification.cases.functions import SIGMOID_PLATEAU, SOFTMAX_OFFSET, TANH_PLATEAU
from bwsk.classification.cases.layers import BATCH_OFFSET
from bwsk.classification.cases.operators import ATTENTION_ONE_KEY
from bwsk.classification.operators import Facts
from bwsk.classification.rules.rule import Rule, RuleSet, always
from bwsk.classification.rules.strict import ALL, BIT, BY_NAME, GRAY, NOTHING, ROW, K, S
from bwsk.classification.witness import Residue, Verdict, WitnessCase

_SOURCE = "publication's table"


def build() -> RuleSet:
    """The rule set that gives the published figures: T5-small 134 S / 56 K, BERT-base 103 / 50, GPT-2 small 76 / 49."""
    rules = RuleSet("published", opinion=True)

    def add(kind: str, verdict: Verdict, residue: Residue, witnesses: str | tuple[WitnessCase, ...], reason: str,
            condition: str = "always", when: Callable[[Facts], bool] = always) -> None:  # fmt: skip
        shown = tuple(BY_NAME[w] for w in witnesses.split("; ")) if isinstance(witnesses, str) else witnesses
        rules.register(Rule(kind, verdict, residue, reason, _SOURCE, shown, condition, when), prove=False)

    add("linear", S, NOTHING, "linear 4->4; linear 4->8", "a projection preserves information")
    add("embedding", S, NOTHING, "embedding", "a lookup is injective")
    add("position", S, NOTHING, "rotary positions", "a rotation or a table of positions")
    add("layer_norm", S, ROW, "layer norm of 8 elements", "invertible given mean and deviation")
    add("rms_norm", S, ROW, "rms norm of 8 elements", "invertible given the scale")
    add("group_norm", S, ROW, "group norm", "invertible given mean and deviation")
    add(
        "batch_norm",
        K,
        ALL,
        (BATCH_OFFSET,),
        "batch statistics mix the samples",
        "training",
        lambda f: f["batch_statistics"],
    )
    add(
        "batch_norm",
        S,
        NOTHING,
        "batch norm in eval",
        "an affine map per channel",
        "eval",
        lambda f: not f["batch_statistics"],
    )
    add(
        "convolution",
        S,
        NOTHING,
        "convolution 3x3 same; convolution depthwise causal",
        "stride 1 keeps the resolution",
        "stride 1",
        lambda f: set(f["stride"]) == {1},
    )
    add(
        "convolution",
        K,
        ALL,
        "convolution 1x1 stride 2; convolution 3x3 stride 2, same width",
        "a stride samples down",
        "strided",
        lambda f: set(f["stride"]) != {1},
    )
    add("injective_elementwise", S, NOTHING, "leaky relu; softplus", "a bijective activation")
    add("identity", S, NOTHING, "identity", "nothing happens")
    add("reshape", S, NOTHING, "flatten; view", "the same elements in another arrangement")
    add("relu", K, ALL, "relu", "negative inputs become 0")
    add("gelu", K, BIT, "gelu; gelu, tanh form", "not injective")
    add("silu", K, BIT, "silu", "not injective")
    add("erasing_elementwise", K, ALL, "relu6; hard swish", "an activation that is not bijective")
    add("tanh", K, ALL, (TANH_PLATEAU,), "saturates")
    add("sigmoid", K, ALL, (SIGMOID_PLATEAU,), "saturates")
    add("softmax", K, ALL, (SOFTMAX_OFFSET,), "normalisation loses the scale of the scores")
    add("dropout", K, ALL, "dropout in training", "random zeroing")
    add("pooling", K, ALL, "max pooling; mean pooling", "many values, one result")
    add("loss", K, ALL, "squared error", "a number for a batch")
    add("routing", K, ALL, "argmax; top 1", "what was not chosen is gone")
    add("recurrent", GRAY, ALL, "recurrent cell, full rank; recurrent cell, rank one", "context dependent")
    add("attention", GRAY, ALL, (ATTENTION_ONE_KEY, BY_NAME["attention over equal keys"]), "context dependent")
    return rules
