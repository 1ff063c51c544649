"""Census of operations: what a real training step dispatches, operator by operator, without weights or a GPU.

One forward and one backward pass run on fake tensors (shapes and dtypes without storage). For every operator that the
forward dispatches: kind and verdict, module path, FLOPs, bytes moved, and how much of its output backward keeps.
Counts and shares are over operators that activations go through; building masks and transposing weights is listed but
erases no data and is not counted.

- FLOPs: matrix products, convolutions and attention by formula (2 per multiply-add); a reduction one per input element,
  views and copies none, everything else one per output element.
- bytes: tensors read plus tensors written; views move none.
- saved bytes: storages that autograd keeps for backward, each once, at the operator that produced it; parameters and
  the batch itself are no activations and not counted.

On a machine without CUDA the operators are those of the CPU, except dropout, which is dispatched as CUDA does
(`native_dropout`, a mask of one byte per element); fused attention and the autocast lists of the CPU differ in detail.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from bwsk.errors import BwskError
from bwsk.operators import Role, identify_call, operator_name, output_role, packet_name
from bwsk.rules import RuleSet, Subject, rule_set

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NO_FLOPS = frozenset(
    {"reshape", "identity", "constant", "random", "selection", "widening_cast", "narrowing_cast", "embedding"}
)
_PER_INPUT = frozenset(
    {"reduction", "pooling", "loss", "routing", "softmax", "layer_norm", "rms_norm", "group_norm", "batch_norm"}
)


@dataclass(frozen=True)
class Operation:
    """One dispatched operator. `inputs` are the operations that its activations come from, with the bytes it takes."""

    index: int
    operator: str
    kind: str
    verdict: str
    strict: str
    published: str | None  # None: the publication does not speak about this kind
    residue: str | None
    reason: str
    module: str
    on_data: bool
    flops: int
    bytes: int
    out_bytes: int
    saved_bytes: int
    inputs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Trace:
    """The operators of one training step of `model` in the order they ran (forward), and totals of its backward."""

    model: str
    rules: str
    setting: dict[str, Any]
    operations: tuple[Operation, ...]
    backward: dict[str, Any] | None
    parameter_bytes: int
    _memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def data(self) -> list[Operation]:
        """The operations that activations go through."""
        return self._memo.setdefault("data", [op for op in self.operations if op.on_data])

    def _count(self, verdict: str) -> int:
        return sum(op.verdict == verdict for op in self.data)

    @property
    def s(self) -> int:
        return self._count("S")

    @property
    def k(self) -> int:
        return self._count("K")

    @property
    def gray(self) -> int:
        return self._count("GRAY")

    @property
    def total(self) -> int:
        return len(self.data)

    @property
    def s_ratio(self) -> float | None:
        return self.s / self.total if self.total else None

    @property
    def k_ratio(self) -> float | None:
        return self.k / self.total if self.total else None

    @property
    def saved_bytes(self) -> int:
        """Bytes of activations that backward keeps."""
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
        """Names of the operators that no rule decides, each once."""
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
    source: Any,
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

    `source` is a module, a config, a Hub id, a directory or a `config.json`. Text models are fed `batch` sequences of
    `input_length` tokens (decoders of encoder-decoder models `target_length`), image models `batch` images of their
    config's size; `inputs` replaces all of that. `autocast` is None, "bf16" or "fp16". Under "published" rules,
    kinds that the publication does not speak about keep their strict verdict. Raises `BwskError` for a model that
    cannot be built, fed or traced without values.
    """
    from bwsk.architecture import load

    if autocast is not None and autocast not in AUTOCAST:
        raise BwskError(f"autocast {autocast!r}: not known; choose from {', '.join(AUTOCAST)} or leave it out")
    for label, size in (("batch", batch), ("input length", input_length), ("target length", target_length)):
        if size < 1:
            raise BwskError(f"{label} {size}: must be at least 1")
    chosen = rule_set(rules)
    model, name = load(source, revision=revision, attn_implementation=attn_implementation)
    if not isinstance(source, nn.Module):
        model.train(training)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("batched_mm")  # runs without values and in any precision
    device = "cuda" if torch.cuda.is_available() else "cpu"
    feed = dict(inputs) if inputs is not None else _feed(model, batch, input_length, target_length)
    recorder = _Recorder(chosen)
    try:
        backward, parameter_bytes = _step(model, feed, recorder, device, autocast)
    except BwskError:
        raise
    except Exception as error:  # anything a model's forward may raise on tensors without values
        text = " ".join(str(error).split())[:160]
        raise BwskError(
            f"{name}: its training step cannot be traced without values: {type(error).__name__}: {text}"
        ) from error
    setting = {
        "mode": "training" if model.training else "eval",
        "device": device,
        "autocast": autocast,
        "inputs": {key: list(value.shape) for key, value in feed.items() if isinstance(value, Tensor)},
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "experts": getattr(getattr(model, "config", None), "_experts_implementation", None),
    }
    return Trace(name, chosen.name, setting, recorder.finish(), backward, parameter_bytes)


def _feed(model: nn.Module, batch: int, length: int, target: int) -> dict[str, Any]:
    """A batch of the right shapes, on the meta device, for a transformers model."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise BwskError(f"{type(model).__name__}: not a transformers model; pass its batch as inputs={{name: tensor}}")
    accepted = inspect.signature(model.forward).parameters
    ids = lambda n: torch.zeros(batch, n, dtype=torch.long, device="meta")  # noqa: E731
    feed: dict[str, Any] = {}
    per_sample = "Classification" in type(model).__name__ and "Token" not in type(model).__name__
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        feed["pixel_values"] = torch.zeros(batch, getattr(config, "num_channels", 3), height, width, device="meta")
    elif main == "input_ids":
        limit = getattr(config, "max_position_embeddings", None)
        if isinstance(limit, int) and length > limit > 0:
            raise BwskError(
                f"input length {length}: {type(model).__name__} has positions for {limit} tokens; give fewer"
            )
        feed["input_ids"] = ids(length)
        if getattr(config, "is_encoder_decoder", False):
            feed["decoder_input_ids"] = ids(target)
    else:
        raise BwskError(
            f"{type(model).__name__}: takes {main}, which is not text or pixels; pass inputs={{name: tensor}}"
        )
    if "labels" in accepted:
        feed["labels"] = ids(1)[:, 0] if per_sample else ids(target if "decoder_input_ids" in feed else length)
    if "use_cache" in accepted and hasattr(config, "use_cache"):
        feed["use_cache"] = False  # training has no use for the cache of generation
    return feed


def _step(
    model: nn.Module, feed: Mapping[str, Any], recorder: _Recorder, device: str, autocast: str | None
) -> tuple[dict[str, Any] | None, int]:
    """Forward and backward under the recorder; totals of backward, and the parameters' bytes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def fake(t: Tensor) -> Tensor:
        made = torch.empty(t.shape, dtype=t.dtype, device=device)
        return nn.Parameter(made, t.requires_grad) if isinstance(t, nn.Parameter) else made

    lower = torch.autocast(device, AUTOCAST[autocast]) if autocast else nullcontext()
    with ExitStack() as stack:
        log = logging.getLogger("torch._subclasses.fake_tensor")  # what fails is told in one line, not here
        stack.callback(log.setLevel, log.level)
        log.setLevel(logging.CRITICAL)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        state = {n: fake(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
        given = tree_map_only(Tensor, fake, dict(feed))
        recorder.start(state.values(), [t for t in tree_leaves(given) if isinstance(t, Tensor)])
        stack.enter_context(recorder.paths(model))
        with torch.enable_grad(), recorder, _CudaDropout(), recorder.saving(), lower:
            out = torch.func.functional_call(model, state, (), given)
        loss = _loss(out)
        backward = None
        if loss is not None and loss.requires_grad:
            totals = _BackwardTotals()
            with totals:
                loss.backward()
            backward = totals.result()
        parameter_bytes = sum(t.nbytes for t in state.values() if isinstance(t, nn.Parameter))
    return backward, parameter_bytes


def _loss(out: Any) -> Tensor | None:
    """The loss that the model returned, else the sum of its first floating-point output."""
    loss = getattr(out, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    tensors = [t for t in tree_leaves(dict(out) if isinstance(out, Mapping) else out) if isinstance(t, Tensor)]
    return next((t.sum() for t in tensors if t.is_floating_point()), None)


class _CudaDropout(TorchFunctionMode):
    """Dropout as CUDA dispatches it, one operator with a mask of bytes, instead of the CPU's four."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            bound = inspect.signature(F.dropout).bind(*args, **kwargs)
            bound.apply_defaults()
            p, training, inplace = (bound.arguments[n] for n in ("p", "training", "inplace"))
            if training and 0 < p < 1 and not inplace:
                return torch.native_dropout(bound.arguments["input"], p, True)[0]
        return func(*args, **kwargs)


def _flops(func: Any, args: Any, kwargs: Any, out: Any, kind: str, inputs: list[Tensor], outs: list[Tensor]) -> int:
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(func.overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    if kind == "attention" and len(inputs) >= 3:  # fused attention without a registered formula: QK' and PV
        q, k, v = inputs[:3]
        return 2 * q.numel() * k.shape[-2] + 2 * q.shape[:-1].numel() * k.shape[-2] * v.shape[-1]
    if kind in _NO_FLOPS:
        return 0
    sizes = [t.numel() for t in (inputs if kind in _PER_INPUT else outs)]
    return max(sizes, default=0)


class _BackwardTotals(TorchDispatchMode):
    """Number, FLOPs and bytes of the operators that backward dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: Counter[str] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outs = _tensors((args, kwargs)), _tensors(out)
        view = func.is_view
        flops = 0 if view else _flops(func, args, kwargs, out, "", inputs, outs)
        self.sums.update(operations=1, flops=flops, bytes=0 if view else sum(t.nbytes for t in inputs + outs))
        self.names[operator_name(func)] += 1
        return out

    def result(self) -> dict[str, Any]:
        return dict(self.sums) | {"by_operator": dict(self.names.most_common())}


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class _Recorder(TorchDispatchMode):
    """Writes down every operator of the forward pass, and follows where activations come from."""

    def __init__(self, rules: RuleSet) -> None:
        super().__init__()
        self.rules = rules
        self.rows: list[dict[str, Any]] = []
        self.path: list[str] = []
        self.roles: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.made_by: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.storage_role: dict[int, Role] = {}
        self.writer: dict[int, int] = {}  # storage -> operation that wrote it last
        self.birth: dict[int, int] = {}  # storage -> operation that allocated it
        self.parameters: set[int] = set()
        self.given: set[int] = set()
        self.kept: dict[int, set[int]] = {}  # operation -> storages already counted as saved

    def start(self, state: Any, inputs: list[Tensor]) -> None:
        """Parameters and buffers are fixed, the batch is data."""
        for t in state:
            self.parameters.add(_key(t))
        for t in inputs:
            self.storage_role[_key(t)] = Role.DATA
            self.given.add(_key(t))

    @contextmanager
    def paths(self, model: nn.Module) -> Iterator[None]:
        """Keep the path of the module that is running."""

        def enter(name: str) -> Callable[..., None]:
            return lambda module, args: self.path.append(name)

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self.path.pop()

        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def saving(self) -> Any:
        """Count the storages that autograd keeps."""

        def pack(t: Tensor) -> Tensor:
            key = _key(t)
            if key not in self.parameters and key not in self.given and key in self.birth:
                born = self.birth[key]
                if key not in self.kept.setdefault(born, set()):
                    self.kept[born].add(key)
                    self.rows[born]["saved_bytes"] += t.untyped_storage().nbytes()
            return t

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)

    def _role(self, t: Tensor) -> Role:
        return self.roles.get(t, self.storage_role.get(_key(t), Role.FIXED))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.startswith("prim::"):  # a question about a tensor, such as its device
            return func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        roles = [self._role(t) for t in inputs]
        known = {id(t): role for t, role in zip(inputs, roles, strict=True)}
        sources = self._sources(inputs, roles)
        keys = {_key(t) for t in inputs}
        out = func(*args, **kwargs)
        outs = _tensors(out)
        if packet_name(func) in ("detach", "alias", "lift_fresh"):  # autograd's own bookkeeping: the same tensor
            self._follow(outs, max(roles, default=Role.FIXED), sources[0][0] if sources else None, keys)
            return out
        subject = identify_call(func, args, kwargs, out, lambda t: known.get(id(t), Role.FIXED))
        role = output_role(subject, packet_name(func), roles)
        view = func.is_view or (bool(outs) and all(_key(t) in keys for t in outs) and not func._schema.is_mutable)
        index = len(self.rows)
        self.rows.append({
            "index": index,
            "operator": operator_name(func),
            "subject": subject,
            "module": self.path[-1] if self.path else "",
            "on_data": Role.DATA in roles and subject.kind not in ("constant", "random"),
            "flops": 0 if view else _flops(func, args, kwargs, out, subject.kind, inputs, outs),
            "bytes": 0 if view else sum(t.nbytes for t in inputs + outs),
            "out_bytes": sum(t.nbytes for t in outs),
            "saved_bytes": 0,
            "inputs": tuple(sources),
        })  # fmt: skip
        self._follow(outs, role, index, keys)
        return out

    def _sources(self, inputs: list[Tensor], roles: list[Role]) -> list[tuple[int, int]]:
        """Operations that the data inputs come from, with their bytes; what comes from the batch has none."""
        found: dict[int, int] = {}
        for t, role in zip(inputs, roles, strict=True):
            if role is Role.FIXED:
                continue
            made = self.made_by.get(t)
            if made is None:
                made = self.writer.get(_key(t))
            if made is not None:
                found[made] = max(found.get(made, 0), t.nbytes)
        return sorted(found.items())

    def _follow(self, outs: list[Tensor], role: Role, index: int | None, input_keys: set[int]) -> None:
        for t in outs:
            key = _key(t)
            if key not in input_keys:
                self.storage_role[key] = role
                if index is not None:
                    self.birth[key] = self.writer[key] = index
                else:
                    self.birth.pop(key, None)
                    self.writer.pop(key, None)
            elif role > self.storage_role.get(key, Role.FIXED):
                self.storage_role[key] = role  # data written in place into what was a constant
            self.roles[t] = role
            if index is not None:
                self.made_by[t] = index

    def finish(self) -> tuple[Operation, ...]:
        """The operations with their verdicts. Decided here, where no mode is active: rules run their witnesses."""
        decided: dict[Any, dict[str, Any]] = {}
        operations = []
        for row in self.rows:
            subject: Subject = row.pop("subject")
            key = (subject.kind, row["operator"], tuple(sorted((k, str(v)) for k, v in subject.facts.items())))
            if key not in decided:
                decided[key] = _verdicts(self.rules, subject, row["operator"])
            operations.append(Operation(kind=subject.kind, **row, **decided[key]))
        return tuple(operations)


def _verdicts(rules: RuleSet, subject: Subject, operator: str) -> dict[str, Any]:
    """What the chosen rules say, or else the strict ones, beside what both built-in sets say."""
    strict, published = (rule_set(name).decide(subject, operator) for name in ("strict", "published"))
    rule = rules.decide(subject, operator) or strict
    return {
        "verdict": str(rule.verdict) if rule else "GRAY",
        "strict": str(strict.verdict) if strict else "GRAY",
        "published": str(published.verdict) if published else None,
        "residue": str(rule.residue) if rule else None,
        "reason": rule.reason if rule else "no rule for this operator",
    }
