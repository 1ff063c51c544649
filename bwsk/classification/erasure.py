"""Dynamic erasure: how much the K-type operations really erased on one batch.

A rule says that a ReLU erases; how much depends on its input. `ErasureMeter.measure(batch)` runs one forward pass as
training runs it (dropout on) and reports for every kind of erasing operation

- **zeroed**: the share of elements that it replaced by zero,
- **bits kept**: the share of the input's bits that the output still determines (n elements of b bits, z zeroed):
  dropout (n - z)b; ReLU (n - z)b + z, as a zero still gives the sign; GELU and SiLU nb - (negative inputs), one bit of
  branch each, and nothing of what underflowed to zero; pooling: outputs / inputs; softmax: all but one number per row
  and what underflowed. It is a count of representable bits, not an entropy of the activations.
- **entropy** of attention rows, H = -sum p log2 p in bits, beside the entropy of equal weights on the visible keys.
  Fused attention does not expose p, so it is recomputed from the queries, keys and mask.

The pass changes nothing that training sees: no gradients are computed, random states are forked, buffers and modes are
restored, and autocast caches nothing. Hooks exist only while it runs.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bwsk._compat import inside_compiled
from bwsk.classification.identify import identify, leaves

_MEASURED = frozenset({"relu", "gelu", "silu", "dropout", "softmax", "pooling"})
_SCORES = 1 << 22  # attention scores recomputed per call at most; of larger ones, evenly spaced query rows


@dataclass
class _Tally:
    """Sums over all operations of one kind. Values computed from the data stay on its device until the end."""

    operations: int = 0
    elements: int = 0
    bits: float = 0.0
    rows: int = 0
    zeroed: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    uniform: list[Tensor] = field(default_factory=list)
    unseen: list[float] = field(default_factory=list)  # dropout rates inside fused attention


class ErasureMeter:
    """Measures erasure in a model; create one per run and call `measure` as often as needed."""

    def __init__(self, model: nn.Module) -> None:
        """Finds the measurable leaves by what they compute; the model may be on any real device."""
        self.model = inside_compiled(model) or model  # compiled code runs no hooks, so take the module inside
        cache: dict[Any, Any] = {}
        found = [(module, identify(module, cache)) for _, module in leaves(self.model)]
        self._leaves = [
            (module, subject.kind)
            for module, subject in found
            if subject.kind in _MEASURED and (subject.facts.get("last", True) and not subject.facts.get("log"))
        ]
        self._tallies: dict[str, _Tally] = {}
        self._inside = 0  # > 0 while a measured leaf runs: its own calls are not counted again

    def measure(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Erasure of one training-mode forward pass `model(**batch)`, as strict JSON.

        Runs under the caller's autocast. Shares lie between 0 and 1 and are None where nothing of the kind ran.
        """
        start = time.perf_counter()
        self._tallies = {}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_undisturbed(self.model))
            for module, kind in self._leaves:
                stack.callback(module.register_forward_pre_hook(self._enter(kind), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._leave(kind), always_call=True).remove)
            stack.enter_context(_Functions(self))
            self.model(**batch)
            kinds = {kind: _summary(tally) for kind, tally in sorted(self._tallies.items())}
        self._tallies, self._inside = {}, 0
        return {"kinds": kinds, "overall": _overall(kinds), "seconds": time.perf_counter() - start}

    # --- leaves, by hooks ---

    def _enter(self, kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inside += 1
            x = args[0] if args else next(iter(kwargs.values()))
            seen = _unmasked(x) if kind == "softmax" else (x == 0).sum() if kind == "dropout" else None
            module.__dict__["_bwsk_before"] = (x.numel(), seen)
            if kind in ("relu", "gelu", "silu"):
                self.activation(kind, x)  # before it runs: it may run in place

        return hook

    def _leave(self, kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self._inside -= 1
            elements, seen = module.__dict__.pop("_bwsk_before")
            if not isinstance(out, Tensor):
                return
            if kind == "dropout" and module.training:
                self.dropout(elements, seen, out)
            elif kind == "softmax" and getattr(module, "dim", -1) in (-1, out.dim() - 1, None):
                self.attention(out, seen)
            elif kind == "pooling":
                tally = self._tally("pooling", elements, out)
                kept = min(out.numel(), elements)  # adaptive pooling may have more outputs than inputs
                tally.kept.append(torch.tensor(float(kept * _bits(out)), device=out.device))

        return hook

    # --- what is counted ---

    def _tally(self, kind: str, elements: int, like: Tensor) -> _Tally:
        tally = self._tallies.setdefault(kind, _Tally())
        tally.operations += 1
        tally.elements += elements
        tally.bits += elements * _bits(like)
        return tally

    def activation(self, kind: str, x: Tensor) -> None:
        """An activation function is about to be applied to `x`."""
        tally, bits = self._tally(kind, x.numel(), x), _bits(x)
        negative = (x < 0).sum()
        if kind == "relu":
            tally.zeroed.append((x <= 0).sum())
            tally.kept.append((x.numel() - negative) * float(bits) + negative)
        else:
            function = F.silu if kind == "silu" else F.gelu
            gone = ((function(x) == 0) & (x != 0)).sum()
            tally.zeroed.append(gone)
            tally.kept.append((x.numel() - gone) * float(bits) - (negative - gone))

    def dropout(self, elements: int, zeros_before: Tensor, out: Tensor) -> None:
        """Dropout turned a tensor with so many zeros into `out`."""
        tally = self._tally("dropout", elements, out)
        gone = (out == 0).sum() - zeros_before
        tally.zeroed.append(gone)
        tally.kept.append((elements - gone) * float(_bits(out)))

    def attention(self, p: Tensor, visible: Tensor | None) -> None:
        """Rows of weights `p` (..., keys) were used; `visible` marks the keys that a mask lets through."""
        weights = p.float()
        gone = weights == 0 if visible is None else (weights == 0) & visible
        seen = (
            torch.full_like(weights[..., 0], p.shape[-1]) if visible is None else visible.expand_as(p).sum(-1).float()
        )
        tally = self._tally("attention", 0, p)
        rows = weights[..., 0].numel()
        tally.rows += rows
        tally.elements += p.numel()
        tally.bits += p.numel() * _bits(p)
        tally.zeroed.append(gone.sum())
        # One number per row is lost, and whatever underflowed; masked scores are known beforehand and count as kept.
        tally.kept.append(((p.numel() - gone.sum()) - rows).clamp(min=0) * float(_bits(p)))
        tally.entropy.append(torch.special.entr(weights).sum() / math.log(2))
        tally.uniform.append(seen.clamp(min=1).log2().sum())


class _Functions(TorchFunctionMode):
    """Intercepts calls outside of modules: functional dropout, activations, softmax and fused attention."""

    def __init__(self, meter: ErasureMeter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, meter = kwargs or {}, self.meter
        kind = _FUNCTIONS.get(func)
        if kind is None or meter._inside:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs.get("input", kwargs.get("query"))
        if kind == "attention":
            meter.attention(*_weights(*args, **kwargs))
            dropped = float(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0))
            meter._tallies["attention"].unseen.append(dropped)
        elif kind in ("relu", "gelu", "silu"):
            meter.activation(kind, x)
        before = (x.numel(), (x == 0).sum()) if kind == "dropout" else None
        out = func(*args, **kwargs)
        active = (args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))) is True
        if before is not None and active and (args[1] if len(args) > 1 else kwargs.get("p", 0.5)) > 0:
            meter.dropout(*before, out)
        if kind == "softmax" and out.dim() and (args[1] if len(args) > 1 else kwargs.get("dim")) in (-1, out.dim() - 1):
            meter.attention(out, _unmasked(x))
        return out


_FUNCTIONS: dict[Any, str] = {
    F.dropout: "dropout", torch.dropout: "dropout", torch.dropout_: "dropout",
    F.relu: "relu", torch.relu: "relu", torch.relu_: "relu", Tensor.relu: "relu",
    F.silu: "silu", F.gelu: "gelu",
    F.softmax: "softmax", torch.softmax: "softmax", Tensor.softmax: "softmax",
    F.scaled_dot_product_attention: "attention",
}  # fmt: skip


def _weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention weights and visible keys of one fused call, from its inputs, on evenly spaced query rows."""
    heads, length, keys = query.shape[:-2].numel(), query.shape[-2], key.shape[-2]
    step = max(1, math.ceil(heads * length * keys / _SCORES))
    rows = torch.arange(0, length, step, device=query.device)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query[..., rows, :] @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    visible = None
    if is_causal:
        visible = torch.arange(keys, device=query.device) <= rows[:, None]
        scores = scores.masked_fill(~visible, -math.inf)
    if attn_mask is not None:
        mask = attn_mask.expand(*attn_mask.shape[:-2], length, keys)[..., rows, :]
        if mask.dtype == torch.bool:
            visible, scores = mask, scores.masked_fill(~mask, -math.inf)
        else:
            visible = _unmasked(mask)
            scores = scores + mask
    return torch.softmax(scores.float(), -1).to(query.dtype), visible


def _unmasked(scores: Tensor) -> Tensor:
    """Which scores a mask lets through: masks are written as minus infinity or as about the smallest number."""
    return scores > torch.finfo(scores.dtype).min / 2


def _bits(x: Tensor) -> int:
    return x.element_size() * 8


def _summary(tally: _Tally) -> dict[str, Any]:
    def total(parts: list[Tensor]) -> float:
        return float(torch.stack([part.double() for part in parts]).sum()) if parts else 0.0

    zeroed, kept = total(tally.zeroed), total(tally.kept)
    result: dict[str, Any] = {
        "operations": tally.operations,
        "elements": tally.elements,
        "zeroed": zeroed / tally.elements if tally.elements and tally.zeroed else None,
        "bits": tally.bits,
        "bits_kept": kept / tally.bits if tally.bits else None,
    }
    if tally.rows:
        result["rows"] = tally.rows
        result["entropy_bits"] = total(tally.entropy) / tally.rows
        result["entropy_bits_uniform"] = total(tally.uniform) / tally.rows
        # The mask drawn inside a fused kernel cannot be seen: its rate is reported, but its zeros are not counted.
        result["fused_dropout_rate"] = max(tally.unseen) if tally.unseen else None
    return result


def _overall(kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    elements, bits = (sum(k[key] for k in kinds.values()) for key in ("elements", "bits"))
    zeroed = sum(k["zeroed"] * k["elements"] for k in kinds.values() if k["zeroed"] is not None)
    kept = sum(k["bits_kept"] * k["bits"] for k in kinds.values() if k["bits_kept"] is not None)
    return {
        "operations": sum(k["operations"] for k in kinds.values()),
        "elements": elements,
        "zeroed": zeroed / elements if elements else None,
        "bits": bits,
        "bits_kept": kept / bits if bits else None,
    }


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Training mode inside; afterwards modes, buffers and every random state are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    caching = torch.is_autocast_cache_enabled()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[d.index for d in devices]):
        try:
            model.train()
            # torch 2.13 keeps casts made without gradient out of later steps by itself; not relied on.
            torch.set_autocast_cache_enabled(False)
            yield
        finally:
            torch.set_autocast_cache_enabled(caching)
            random.setstate(python)
            np.random.set_state(numpy)
            for module, training in modes:
                module.training = training
            for buffer, value in buffers:
                buffer.copy_(value)
