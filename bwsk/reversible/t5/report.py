"""The operations of a T5's plan, one by one, as `bwsk plan` lists them."""

from __future__ import annotations

from typing import Any

from bwsk.reversible.plan import Head, Plan
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
    if level == "block":
        last = 2 if decoder else 1
        stream = 4 * shape.batch * length * config.d_model
        found = [PlanRow(module, "residual stream", "its input", "kept", stream, 0)]
        for j in range(last + 1):
            found += _sublayer_rows(config, shape, f"{module}.layer.{j}", "entry", decoder, length, j < last)[1:]
        return found
    return _sublayer_rows(config, shape, module, level, decoder, length, False)


def _sublayer_rows(config, shape, module, level, decoder, length, redo_output) -> list[PlanRow]:
    b, d, e = shape.batch, config.d_model, shape.element
    stream = b * length * d
    found = [
        PlanRow(module, "residual stream", "its input", "kept", 4 * stream, 0),
        PlanRow(module, "RMS norm", verdict("rms_norm", size=d), "residue" if level != "entry" else "redone",
            4 * b * length if level != "entry" else 0, 0),
    ]  # fmt: skip
    dropped = verdict("dropout", training=True, p=0.1)
    index = int(module.rsplit(".", 1)[1])
    if index == (2 if decoder else 1):
        hidden, branches = b * length * config.d_ff, 2 if config.is_gated_act else 1
        again = level == "entry"
        flops = 2 * stream * config.d_ff * branches if again else 0
        narrow = verdict("linear", **{"in": d, "out": config.d_ff})
        if config.is_gated_act or config.dense_act_fn != "relu":
            kept = 0 if again else e * hidden * branches
            found.append(PlanRow(module, "W_i n(x)", narrow, "redone" if again else "kept", kept, flops))
            found.append(PlanRow(module, config.dense_act_fn, verdict("gelu"), "redone", 0, 0))
            found.append(PlanRow(module, "dropout", dropped, "residue", hidden // 8, 0))
        else:
            found.append(PlanRow(module, "W_i n(x)", narrow, "redone", 0, flops))
            found.append(PlanRow(module, "ReLU", verdict("relu"), "redone", 0, 0))
            kept = hidden // 8 if again else e * hidden
            found.append(PlanRow(module, "dropout", dropped, "residue" if again else "kept", kept, 0))
        out = verdict("linear", **{"in": config.d_ff, "out": d})
        found.append(PlanRow(module, "W_o h", out, "passes through", 0, 0))
    else:
        source = shape.input_length if index == 1 else length
        inner, scores = config.num_heads * config.d_kv, b * config.num_heads * length * source
        again = level == "entry"
        project = 2 * b * length * d * inner + 4 * b * source * d * inner
        keys = e * (b * length * inner + 2 * b * source * inner)
        square = verdict("linear", **{"in": d, "out": inner})
        found.append(
            PlanRow(module, "q, k, v", square, "redone" if again else "kept", 0 if again else keys, project * again)
        )
        one = 2 * b * length * source * inner
        found.append(PlanRow(module, "q kᵀ + bias", verdict("product"), "redone", 0, one * (2 if redo_output else 1)))
        found.append(PlanRow(module, "softmax", verdict("softmax"), "redone", 0, 0))
        found.append(PlanRow(module, "dropout", dropped, "residue", scores // 8, 0))
        whole = level == "core"
        kept = e * b * length * inner if whole else 0
        found.append(PlanRow(module, "P v", verdict("product"), "kept" if whole else "redone", kept, one * (not whole)))
        out = verdict("linear", **{"in": inner, "out": d})
        flops = 2 * b * length * inner * d if redo_output else 0
        found.append(PlanRow(module, "W_o out", out, "redone" if redo_output else "passes through", 0, flops))
    found.append(PlanRow(module, "dropout", dropped, "residue", stream // 8, 0))
    found.append(PlanRow(module, "x + f(x)", verdict("merge"), "passes through", 0, 0))
    return found


def _head_rows(config: Any, shape: Shape, head: Head) -> list[PlanRow]:
    wide = verdict("linear", **{"in": config.d_model, "out": config.vocab_size})
    if head.kind == "none":
        return []
    if head.kind == "chunked":
        return [PlanRow("lm_head", "logits and loss, by rows", verdict("loss"), "gradients kept", head.kept, 0)]
    return [
        PlanRow("lm_head", "logits", wide, "kept", head.kept, 0),
        PlanRow("lm_head", "log-softmax", verdict("softmax"), "redone", 0, 0),
        PlanRow("lm_head", "cross-entropy", verdict("loss"), "residue", 4, 0),
    ]
