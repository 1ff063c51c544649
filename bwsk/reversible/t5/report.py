"""The operations of a T5's plan, one by one, as `bwsk plan` lists them."""

from __future__ import annotations

from typing import Any

from bwsk.reversible.plan import Head, Level, Plan
from bwsk.reversible.plan_row import PlanRow, verdict
from bwsk.reversible.t5.costs import Shape


def rows(plan: Plan, config: Any, shape: Shape, prefix: str) -> list[PlanRow]:
    """The rows of every block in forward order, and of the loss head."""
    found: list[PlanRow] = []
    for choice in plan.choices:
        for module, level in choice.levels:
            found += _rows(config, shape, module, level, prefix)
    return found + _head_rows(config, shape, plan.head)


def _rows(config: Any, shape: Shape, module: str, level: str, prefix: str) -> list[PlanRow]:
    decoder = module.startswith(f"{prefix}decoder")
    length = shape.target_length if decoder else shape.input_length
    if level == Level.CHECKPOINT_BLOCK:
        last = 2 if decoder else 1
        stream = 4 * shape.batch * length * config.d_model
        found = [PlanRow(module, "residual stream", "its input", "saved", stream, 0)]
        for j in range(last + 1):
            found += _sublayer_rows(config, shape, f"{module}.layer.{j}", Level.SAVE_INPUT, decoder, length, j < last)[
                1:
            ]
        return found
    return _sublayer_rows(config, shape, module, level, decoder, length, False)


def _sublayer_rows(
    config: Any, shape: Shape, module: str, level: str, decoder: bool, length: int, recompute_output: bool
) -> list[PlanRow]:
    b, d, e = shape.batch, config.d_model, shape.element
    stream = b * length * d
    found = [
        PlanRow(module, "residual stream", "its input", "saved", 4 * stream, 0),
        PlanRow(module, "RMS norm", verdict("rms_norm", size=d), "residue" if level != Level.SAVE_INPUT
            else "recomputed",            4 * b * length if level != Level.SAVE_INPUT else 0, 0),
    ]  # fmt: skip
    dropped = verdict("dropout", training=True, p=0.1)
    index = int(module.rsplit(".", 1)[1])
    if index == (2 if decoder else 1):
        hidden, branches = b * length * config.d_ff, 2 if config.is_gated_act else 1
        again = level == Level.SAVE_INPUT
        flops = 2 * stream * config.d_ff * branches if again else 0
        narrow = verdict("linear", **{"in": d, "out": config.d_ff})
        if config.is_gated_act or config.dense_act_fn != "relu":
            saved = 0 if again else e * hidden * branches
            found.append(PlanRow(module, "W_i n(x)", narrow, "recomputed" if again else "saved", saved, flops))
            found.append(PlanRow(module, config.dense_act_fn, verdict("gelu"), "recomputed", 0, 0))
            found.append(PlanRow(module, "dropout", dropped, "residue", hidden // 8, 0))
        else:
            found.append(PlanRow(module, "W_i n(x)", narrow, "recomputed", 0, flops))
            found.append(PlanRow(module, "ReLU", verdict("relu"), "recomputed", 0, 0))
            saved = hidden // 8 if again else e * hidden
            found.append(PlanRow(module, "dropout", dropped, "residue" if again else "saved", saved, 0))
        out = verdict("linear", **{"in": config.d_ff, "out": d})
        found.append(PlanRow(module, "W_o h", out, "passes through", 0, 0))
    else:
        source = shape.input_length if index == 1 else length
        inner, scores = config.num_heads * config.d_kv, b * config.num_heads * length * source
        again = level == Level.SAVE_INPUT
        project = 2 * b * length * d * inner + 4 * b * source * d * inner
        keys = e * (b * length * inner + 2 * b * source * inner)
        square = verdict("linear", **{"in": d, "out": inner})
        found.append(
            PlanRow(
                module, "q, k, v", square, "recomputed" if again else "saved", 0 if again else keys, project * again
            )
        )
        one = 2 * b * length * source * inner
        found.append(
            PlanRow(module, "q kᵀ + bias", verdict("product"), "recomputed", 0, one * (2 if recompute_output else 1))
        )
        found.append(PlanRow(module, "softmax", verdict("softmax"), "recomputed", 0, 0))
        found.append(PlanRow(module, "dropout", dropped, "residue", scores // 8, 0))
        whole = level == Level.SAVE_CONTEXT
        saved = e * b * length * inner if whole else 0
        found.append(
            PlanRow(module, "P v", verdict("product"), "saved" if whole else "recomputed", saved, one * (not whole))
        )
        out = verdict("linear", **{"in": inner, "out": d})
        flops = 2 * b * length * inner * d if recompute_output else 0
        found.append(PlanRow(module, "W_o out", out, "recomputed" if recompute_output else "passes through", 0, flops))
    found.append(PlanRow(module, "dropout", dropped, "residue", stream // 8, 0))
    found.append(PlanRow(module, "x + f(x)", verdict("merge"), "passes through", 0, 0))
    return found


def _head_rows(config: Any, shape: Shape, head: Head) -> list[PlanRow]:
    wide = verdict("linear", **{"in": config.d_model, "out": config.vocab_size})
    if head.kind == "none":
        return []
    if head.kind == "chunked":
        return [PlanRow("lm_head", "logits and loss, by rows", verdict("loss"), "gradients saved", head.saved, 0)]
    return [
        PlanRow("lm_head", "logits", wide, "saved", head.saved, 0),
        PlanRow("lm_head", "log-softmax", verdict("softmax"), "recomputed", 0, 0),
        PlanRow("lm_head", "cross-entropy", verdict("loss"), "residue", 4, 0),
    ]
