"""Bytes, FLOPs and working memory of each way to run a T5 block, from the config and the batch shape alone.

Sizes follow what `nodes` saves. X = B·L·d elements of the residual stream (float32 under autocast too), E bytes per
element in the compute dtype. One multiply-add is two FLOPs; elementwise operations are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from bwsk.reversible.cross_entropy import block_rows, chunk_rows
from bwsk.reversible.plan import Choice, Head, Level, Unit


@dataclass(frozen=True)
class Shape:
    """A batch: sequences, tokens in and out, and bytes per element of the compute dtype."""

    batch: int
    input_length: int
    target_length: int
    element: int = 4


@dataclass(frozen=True)
class Parts:
    """The parts of a T5 that a model class has."""

    decoder: bool = True
    projection: bool = True  # onto the vocabulary, with the loss on it
    prefix: str = ""  # of the stacks' module names

    @classmethod
    def of(cls, kind: type) -> Parts:
        """The parts of a class of transformers or of one derived from it."""
        names = [base.__name__.removeprefix("M") for base in kind.__mro__]
        heads = ("T5ForSequenceClassification", "T5ForTokenClassification")
        return cls(
            decoder=not any(name in names for name in ("T5EncoderModel", "T5ForTokenClassification")),
            projection="T5ForConditionalGeneration" in names,
            prefix="transformer." if any(name in names for name in heads) else "",
        )


@dataclass(frozen=True)
class _Piece:
    saved: int
    flops: int
    work: int


def _attention(config: Any, shape: Shape, length: int, source: int) -> dict[str, _Piece]:
    """Level to cost of one attention sublayer with `length` queries and `source` keys."""
    b, d, inner, e = shape.batch, config.d_model, config.num_heads * config.d_kv, shape.element
    scores = b * config.num_heads * length * source
    stream, rows, keys = b * length * d, b * length * inner, b * source * inner
    bits = scores // 8 + stream // 8
    one = 2 * b * length * source * inner
    project = 2 * b * length * d * inner + 4 * b * source * d * inner
    # Probabilities and their gradient in float32, the mask, its unpacked bits; operands of the batched products.
    work = 2 * 4 * scores + scores + 3 * e * (rows + keys) + 2 * 4 * stream
    core = 4 * b * length + e * (rows + 2 * keys) + bits
    entry = bits
    return {
        Level.SAVE_CONTEXT: _Piece(core + e * rows, one, work),
        Level.SAVE_QKV: _Piece(core, 2 * one, work + e * rows),
        Level.SAVE_INPUT: _Piece(entry, 2 * one + project, work + e * (2 * rows + 2 * keys)),
    }


def _feed(config: Any, shape: Shape, length: int) -> dict[str, _Piece]:
    """Level to cost of one feed-forward sublayer."""
    b, d, f, e = shape.batch, config.d_model, config.d_ff, shape.element
    branches = 2 if config.is_gated_act else 1
    hidden, stream = b * length * f, b * length * d
    rectified = not config.is_gated_act and config.dense_act_fn == "relu"
    work = e * hidden * (2 if rectified else 3 + 2 * branches) + 3 * 4 * stream
    first = 2 * stream * f * branches
    core = 4 * b * length + e * hidden * branches + stream // 8 + (0 if rectified else hidden // 8)
    return {
        Level.SAVE_CONTEXT: _Piece(core, 0, work),
        Level.SAVE_INPUT: _Piece(stream // 8 + hidden // 8, first, work + (0 if rectified else e * hidden * branches)),
    }


def _forward(config: Any, shape: Shape, length: int, sources: list[int]) -> int:
    b, d, inner = shape.batch, config.d_model, config.num_heads * config.d_kv
    flops = 2 * b * length * d * config.d_ff * (3 if config.is_gated_act else 2)
    for source in sources:
        flops += 4 * b * length * source * inner + 4 * b * length * d * inner + 4 * b * source * d * inner
    return flops


def _weights(config: Any, attentions: int) -> int:
    d, inner = config.d_model, config.num_heads * config.d_kv
    return attentions * (4 * d * inner + d) + d * config.d_ff * (3 if config.is_gated_act else 2) + d


def _unit(
    config: Any, shape: Shape, name: str, sublayers: list[str], length: int, sources: list[int], shared: int = 0
) -> Unit:
    """One block. `shared`: bytes that the blocks of a stack save together, which live until its first one is done."""
    stream = 4 * shape.batch * length * config.d_model
    inner = shape.element * shape.batch * length * config.num_heads * config.d_kv
    pieces = [*(_attention(config, shape, length, source) for source in sources), _feed(config, shape, length)]
    choices = []
    for levels in product(*(piece.keys() for piece in pieces)):
        costs = [piece[level] for piece, level in zip(pieces, levels, strict=True)]
        saved = sum(cost.saved for cost in costs) + len(costs) * stream + shared
        work = max(cost.work for cost in costs)
        named = tuple(zip(sublayers, levels, strict=True))
        choices.append(Choice(saved, sum(cost.flops for cost in costs), work, named))
    entries = [piece[Level.SAVE_INPUT] for piece in pieces]
    # The residual stream between the sublayers needs W_o again, and the gradient needs the scores once more.
    heads = config.num_heads * config.d_kv
    outs = 2 * shape.batch * length * heads * (config.d_model * len(sources) + sum(sources))
    tapes = sum(inner * 2 + 2 * shape.element * shape.batch * s * config.num_heads * config.d_kv for s in sources)
    choices.append(
        Choice(
            stream + sum(entry.saved for entry in entries) + shared,
            sum(entry.flops for entry in entries) + outs,
            max(entry.work for entry in entries) + tapes + stream * len(sources),
            ((name, Level.CHECKPOINT_BLOCK),),
        )
    )
    choices.sort(key=lambda choice: (-choice.saved, choice.flops))
    useful = [c for i, c in enumerate(choices) if all(c.flops < o.flops for o in choices[i + 1 :]) or i == 0]
    core = next(i for i, c in enumerate(useful) if all(level == Level.SAVE_CONTEXT for _, level in c.levels))
    return Unit(
        name, tuple(useful[core:]), 4 * _weights(config, len(sources)), _forward(config, shape, length, sources)
    )


def parameters(config: Any, parts: Parts) -> int:
    """Number of parameters of a T5 of this config, without the few of a classifier."""
    d, table = config.d_model, config.vocab_size * config.d_model
    blocks = config.num_layers * _weights(config, 1)
    if parts.decoder:
        blocks += config.num_decoder_layers * _weights(config, 2)
    stacks = 2 if parts.decoder else 1
    biases = stacks * config.relative_attention_num_buckets * config.num_heads
    tables = 2 if parts.projection and not getattr(config, "tie_word_embeddings", True) else 1
    return blocks + biases + stacks * d + table * tables


def units(config: Any, shape: Shape, parts: Parts) -> list[Unit]:
    """The blocks of encoder and decoder in forward order."""
    found, prefix = [], parts.prefix
    stream, biases = 4 * shape.batch * shape.input_length * config.d_model, 4 * config.num_heads
    for i in range(config.num_layers):
        name = f"{prefix}encoder.block.{i}"
        layers = [f"{name}.layer.{j}" for j in range(2)]
        found.append(_unit(config, shape, name, layers, shape.input_length, [shape.input_length],
                           0 if i else biases * shape.input_length**2))  # fmt: skip
    for i in range(config.num_decoder_layers if parts.decoder else 0):
        name = f"{prefix}decoder.block.{i}"
        layers = [f"{name}.layer.{j}" for j in range(3)]
        sources = [shape.target_length, shape.input_length]
        # The position bias, the causal mask, and the encoder's output before and after its last norm and dropout.
        shared = (biases + 4 * shape.batch) * shape.target_length**2 + 2 * stream
        found.append(_unit(config, shape, name, layers, shape.target_length, sources, 0 if i else shared))
    if not parts.projection:
        # A lookup's gradient is as large as the table and is made when its stack's backward is done. That of a second
        # lookup is added out of place, so that three are alive.
        table = 4 * config.vocab_size * config.d_model
        lookups = {0: 2 * table, config.num_layers: table} if parts.decoder else {0: table}
        found = [replace(u, gradients=u.gradients + lookups.get(i, 0)) for i, u in enumerate(found)]
    return found


def head(config: Any, shape: Shape, kind: str, parts: Parts) -> Head:
    """The loss head: it saves the logits until their gradient overwrites them, or (chunked) the gradients alone.

    Without a projection onto the vocabulary there is only the last stack's output, before and after its last norm.
    """
    if not parts.projection:
        outs = 2 * 4 * shape.batch * (shape.target_length if parts.decoder else shape.input_length) * config.d_model
        return Head("none", outs, outs // 2, 0, 0)
    tokens, d, v = shape.batch * shape.target_length, config.d_model, config.vocab_size
    table, logits = 4 * v * d, tokens * v
    forward, outs = 2 * tokens * d * v, 2 * 4 * tokens * d
    if kind == "chunked":
        return Head(kind, table + 4 * tokens * d + outs, 4 * 2 * v * min(tokens, chunk_rows(tokens)), table, forward)
    block = 3 * 4 * v * min(tokens, block_rows(tokens, d))
    narrow = shape.element * v * d if shape.element < 4 else 0  # the table's gradient before it is widened
    return Head(kind, shape.element * logits + outs, max(block, table + narrow + 4 * tokens * d), table, forward)
