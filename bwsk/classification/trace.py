"""Census of operations: what a real training step dispatches, operator by operator, without weights or a GPU.

One forward and one backward pass run on fake tensors (shapes and dtypes without storage). For every operator that the
forward pass dispatches, the trace has its kind and verdict, module path, FLOPs, bytes moved, and how much of its output
is saved for the backward pass. Counts and shares are over the operators that activations go through. Others, such as
building masks and transposing weights, are listed but erase no data and are not counted.

- FLOPs: matrix products, convolutions and attention by formula (2 per multiply-add); a reduction one per input element,
  views and copies none, everything else one per output element.
- bytes: tensors read plus tensors written; views move none.
- saved bytes: storages that autograd saves for backward, each once, at the operator that produced it; parameters and
  the batch itself are not activations and are not counted.

On a machine without CUDA the operators are those of the CPU, except dropout, which is dispatched as CUDA does
(`native_dropout`, a mask of one byte per element); fused attention and the autocast lists of the CPU differ in detail.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bwsk._compat import attention_kind, experts_kind, fake_tensor_log, tree_leaves, tree_map_only
from bwsk.classification.counts import Counts
from bwsk.classification.recorder import BackwardTotals, CudaDropout, Operation, Recorder
from bwsk.classification.rules.rule import RuleSet
from bwsk.classification.rules.sets import rule_set
from bwsk.errors import BwskError
from bwsk.example_batch import example_batch, loss_of
from bwsk.units import Precision, dtype_of, short_precision

# Image size for configs that do not name one (ResNet takes any).
_IMAGE_SIZE = 224


@dataclass(frozen=True)
class Trace(Counts):
    """The operators of one training step of `model` in the order they ran (forward), and totals of its backward."""

    model: str
    rules: str
    setting: dict[str, Any]
    operations: tuple[Operation, ...]
    backward: dict[str, Any] | None
    parameter_bytes: int

    @cached_property
    def data(self) -> list[Operation]:
        """The operations that activations go through; the counts are over these."""
        return [op for op in self.operations if op.on_data]

    @property
    def saved_bytes(self) -> int:
        """Bytes of activations that are saved for backward."""
        return sum(op.saved_bytes for op in self.operations)

    def by_operator(self) -> list[dict[str, Any]]:
        """Sums per operator, kind and verdict over the data's operations, most frequent first."""
        groups: dict[tuple[Any, ...], Counter[str]] = {}
        for op in self.data:
            sums = groups.setdefault((op.operator, op.kind, op.verdict, op.strict, op.published, op.residue), Counter())
            sums.update(count=1, flops=op.flops, bytes=op.bytes, saved_bytes=op.saved_bytes)
        keys = ("operator", "kind", "verdict", "strict", "published", "residue")
        rows = [dict(zip(keys, key, strict=True)) | dict(sums) for key, sums in groups.items()]
        return sorted(rows, key=lambda row: (-row["count"], row["operator"]))

    def unknown(self) -> list[str]:
        """Names of the operators that are GRAY, each once."""
        return sorted({op.operator for op in self.data if op.verdict == "GRAY"})

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for strict JSON."""
        numbers = {n: getattr(self, n) for n in ("s", "k", "gray", "total", "s_ratio", "k_ratio", "saved_bytes")}
        sums = {n: sum(getattr(op, n) for op in self.operations) for n in ("flops", "bytes")}
        head = {
            "model": self.model,
            "rules": self.rules,
            "setting": self.setting,
            "constants": len(self.operations) - self.total,
        }
        return head | numbers | sums | {
            "parameter_bytes": self.parameter_bytes,
            "backward": self.backward,
            "unknown": self.unknown(),
            "by_operator": self.by_operator(),
            "operations": [asdict(op) for op in self.operations],
        }  # fmt: skip


def trace(
    model: Any,
    *,
    batch: int = 4,
    input_length: int = 256,
    target_length: int = 256,
    autocast: str | None = None,
    training: bool = True,
    rules: str | RuleSet = "strict",
    inputs: Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> Trace:
    """Trace one training step of a model on fake tensors; nothing is allocated and the model is not changed.

    `model` is a module, a config, a Hub id, a directory or a `config.json`. Text models are fed `batch` sequences of
    `input_length` tokens (decoders of encoder-decoder models `target_length`), image models `batch` images of their
    config's size; `inputs` replaces all of that. `autocast` is None, "bf16" or "fp16". Under "published" rules,
    kinds that the publication does not mention keep their strict verdict. Raises `BwskError` for a model that cannot be
    built, fed or traced without values.
    """
    from bwsk.architecture import load

    precision: Precision | None = short_precision(autocast)
    if precision not in (None, "bf16", "fp16"):
        raise BwskError(f"autocast {precision!r}: not known; choose from bf16, fp16 or leave it out")
    for label, size in (("batch", batch), ("input length", input_length), ("target length", target_length)):
        if size < 1:
            raise BwskError(f"{label} {size}: must be at least 1")
    chosen = rule_set(rules)
    built, name = load(model, revision=revision, attn_implementation=attn_implementation)
    if not isinstance(model, nn.Module):
        built.train(training)
        if (set_experts := getattr(built, "set_experts_implementation", None)) is not None:
            set_experts("batched_mm")  # runs without values and in any precision
    device = "cuda" if torch.cuda.is_available() else "cpu"
    feed = (
        dict(inputs)
        if inputs is not None
        else example_batch(built, batch, input_length, target_length, image_size=_IMAGE_SIZE, device="meta")
    )
    recorder = Recorder(chosen)
    try:
        backward, parameter_bytes = _step(built, feed, recorder, device, precision)
    except BwskError:
        raise
    except Exception as error:  # anything a model's forward may raise on tensors without values
        text = " ".join(str(error).split())[:160]
        raise BwskError(
            f"{name}: its training step cannot be traced without values: {type(error).__name__}: {text}"
        ) from error
    setting = {
        "mode": "training" if built.training else "eval",
        "device": device,
        "autocast": precision,
        "inputs": {key: list(value.shape) for key, value in feed.items() if isinstance(value, Tensor)},
        "attention": attention_kind(getattr(model, "config", None), None),
        "experts": experts_kind(getattr(model, "config", None), None),
    }
    operations = recorder.finish()
    return Trace(
        **vars(Counts.of(op.verdict for op in operations if op.on_data)),
        model=name,
        rules=chosen.name,
        setting=setting,
        operations=operations,
        backward=backward,
        parameter_bytes=parameter_bytes,
    )


def _step(
    model: nn.Module, feed: Mapping[str, Any], recorder: Recorder, device: str, autocast: Precision | None
) -> tuple[dict[str, Any] | None, int]:
    """Forward and backward under the recorder; totals of backward, and the parameters' bytes."""
    from bwsk._compat import FakeTensorMode

    def fake(t: Tensor) -> Tensor:
        made = torch.empty(t.shape, dtype=t.dtype, device=device)
        return nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made

    lower = torch.autocast(device, dtype_of(autocast)) if autocast else nullcontext()
    with ExitStack() as stack:
        log = fake_tensor_log()  # a failure is reported by our one-line error, not here
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.CRITICAL)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        state = {n: fake(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
        given = tree_map_only(Tensor, fake, dict(feed))
        recorder.start([t for t in tree_leaves(given) if isinstance(t, Tensor)])
        stack.enter_context(recorder.paths(model))
        with torch.enable_grad(), recorder, CudaDropout(), recorder.saving(), lower:
            out = torch.func.functional_call(model, state, (), given)
        loss = loss_of(out)
        backward = None
        if loss is not None and loss.requires_grad:
            totals = BackwardTotals()
            with totals:
                loss.backward()
            backward = totals.result()
        parameter_bytes = sum(t.nbytes for t in state.values() if isinstance(t, nn.Parameter))
    return backward, parameter_bytes
