"""The ways to run a T5 training step that the benches put side by side, each as a context manager on one model."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bwsk import make_reversible

T5_SMALL = {
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "vocab_size": 32128,
    "decoder_start_token_id": 0,
    "architectures": ["T5ForConditionalGeneration"],
}


@dataclass(frozen=True)
class Rival:
    """A row of the table: mode and optimizer as `predict_memory` names them, and the budget or compiler budget."""

    name: str
    mode: str
    optimizer: str
    budget: str | None = None
    compiled: float | None = None
    trainer: bool = False


RIVALS = (
    Rival("stock", "conventional", "foreach"),
    Rival("stock, fused AdamW", "conventional", "fused"),
    Rival("stock checkpointing", "checkpoint", "foreach"),
    Rival("stock checkpointing, fused AdamW", "checkpoint", "fused"),
    Rival("torch.compile, activation budget 0.5", "conventional", "fused", compiled=0.5),
    Rival("HF Trainer, checkpointing, fused AdamW", "checkpoint", "fused", trainer=True),
    Rival("bwsk fast", "reversible", "fused", "fast"),
    Rival("bwsk balanced", "reversible", "fused", "balanced"),
    Rival("bwsk max", "reversible", "fused", "max"),
)


def config(model: str | None, attention: str) -> Any:
    """The config named on the command line, or T5-small's."""
    from transformers import T5Config

    from bwsk.architecture import load_config

    found = T5Config(**T5_SMALL) if model is None else load_config(model)
    found._attn_implementation = attention
    return found


def release(device: str) -> None:
    """Free what a finished run leaves on the device, where it would count as memory of the next: models that hang in
    cycles, and the workspaces that cuBLAS keeps for each thread and stream. No graph may be replayed afterwards."""
    gc.collect()
    if device == "cuda":
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def running(model: nn.Module, rival: Rival, shape: tuple[int, int, int], precision: str) -> Iterator[nn.Module]:
    """The model as the rival runs it; afterwards the stock model again."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    if rival.mode == "checkpoint":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            yield model
        finally:
            model.gradient_checkpointing_disable()
    elif rival.mode == "reversible":
        batch, ins, outs = shape
        handle = make_reversible(
            model, rival.budget, batch=batch, input_length=ins, target_length=outs, precision=precision
        )
        try:
            yield model
        finally:
            handle.undo()
    elif rival.compiled is not None:
        import torch._functorch.config as functorch

        before = functorch.activation_memory_budget
        functorch.activation_memory_budget = rival.compiled
        try:
            yield torch.compile(model)
        finally:
            functorch.activation_memory_budget = before
            torch.compiler.reset()
    else:
        yield model


def batch_of(model: nn.Module, shape: tuple[int, int, int], seed: int) -> dict[str, Any]:
    """Random tokens of the shape (batch, input, target)."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    batch, ins, outs = shape
    vocabulary = model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (batch, ins), generator=generator).to(device)
    labels = torch.randint(0, vocabulary, (batch, outs), generator=generator).to(device)
    return {"input_ids": tokens, "labels": labels, "use_cache": False}


def autocast(model: nn.Module, precision: str):
    """Autocast of the named precision on the model's device; off for fp32."""
    kind = next(model.parameters()).device.type
    dtype = {"fp32": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(kind, dtype=dtype, enabled=precision != "fp32")


def gradients(model: nn.Module, inputs: dict[str, Any], precision: str, seed: int, stock: nn.Module) -> dict[str, Any]:
    """Loss and gradients of one step with the given seed, cloned; `stock` is the module that owns the parameters."""
    stock.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with autocast(stock, precision):
        loss = model(**inputs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in stock.named_parameters() if p.grad is not None}
    stock.zero_grad(set_to_none=True)
    return {"loss": loss.detach().clone(), **found}


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> tuple[int, int]:
    """(gradients with the same bits, gradients), the loss counted among them."""
    equal = sum(name in other and torch.equal(value, other[name]) for name, value in one.items())
    return equal, len(one)
