"""The engine for the T5 family (T5, flan-T5, v1.1, mT5): stock modules get a forward of their own (`forwards`).

Modules, parameters, names and classes stay the stock ones. `forward` is set on the instance, and undo deletes it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, cast

from torch import nn

from bwsk._compat import T5_STACKS
from bwsk.architecture import model_class
from bwsk.errors import BwskError
from bwsk.memory.fake_step import stock_peak
from bwsk.memory.training_loop import PLAIN, TrainingLoop
from bwsk.reversible.budget import parse_budget
from bwsk.reversible.patching import Owner, hooked, patch_forward, require_stock_forward, unpatch, whole_model
from bwsk.reversible.plan import Level, Plan, require_within_budget, solve
from bwsk.reversible.stock import altered, altered_functional, library_class
from bwsk.reversible.t5 import costs
from bwsk.reversible.t5.forwards import (
    block,
    conditional,
    cross_attention,
    drop,
    feed_forward,
    lookup,
    norm,
    projection,
    self_attention,
)
from bwsk.reversible.t5.loop_head import in_loop
from bwsk.reversible.t5.policy import Part, Policy, parts_of
from bwsk.reversible.t5.tied_embedding import TiedTable
from bwsk.units import Precision

FAMILY = ("t5", "mt5")
HEADS = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration")


def covers(model: Any) -> bool:
    """Whether a model or config is of the family."""
    return getattr(getattr(model, "config", model), "model_type", None) in FAMILY


def _require_stacks(model: nn.Module) -> None:
    """Raise `BwskError` unless the stacks and their blocks are where the config says: plans are made of it."""
    parts, config = costs.Parts.of(library_class(type(model))), cast(Any, model.config)
    expected = {"encoder": config.num_layers}
    if parts.decoder:
        expected["decoder"] = config.num_decoder_layers
    names = {id(m): n for n, m in model.named_modules()}
    stacks = {names[id(stack)].rpartition(".")[2]: stack for stack in _stacks(model)}
    for name, layers in expected.items():
        if name not in stacks:
            raise BwskError(f"make_reversible: the {name} is not transformers' own T5 stack; not supported")
        found = len({id(item) for item in stacks[name].block})
        if found != layers:
            raise BwskError(
                f"make_reversible: the {name} has {found} blocks of its own where its config says {layers}; "
                "not supported, set the config to what the model is"
            )


def _require_own_weights(model: nn.Module) -> None:
    """Raise `BwskError` if two sublayers of the stacks share a weight or a module.

    Under autocast stock would add the gradients of both in half precision (`autocast_region`).
    """
    stacks = _stacks(model)
    inside = tuple(f"{name}.block.".lstrip(".") for name, module in model.named_modules() if module in stacks)
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other != name and (name.startswith(inside) or other.startswith(inside)):
            raise BwskError(
                f"make_reversible: {other} and {name} are one weight; not supported, give each a weight of its own"
            )


def _require_stock(model: nn.Module) -> None:
    """Raise `BwskError` if a class of the model, or a function that it calls, is not transformers' or PyTorch's own."""
    kinds = {type(module): None for stack in _stacks(model) for module in stack.modules()}
    for kind in (library_class(type(model)), *kinds):
        if reason := altered(kind):
            raise BwskError(
                f"make_reversible: {kind.__name__} {reason}, which the engine would not run; "
                "take the change back, or leave make_reversible out"
            )
    if reason := altered_functional():
        raise BwskError(f"make_reversible: {reason}, which the engine would not call; take the change back")


def _stacks(model: nn.Module) -> list[Any]:
    """The T5Stack modules of the model: encoder, decoder or both."""
    return [m for m in model.modules() if type(m).__name__ in T5_STACKS and _is_stock(m)]


def _is_stock(module: nn.Module) -> bool:
    home = type(module).__module__
    here = vars(sys.modules[home]).get(type(module).__name__) if home in sys.modules else None
    return home.startswith("transformers.models.") and here is type(module)


def prefix(model: nn.Module) -> str:
    """The prefix of the stacks' module names: "" or, under a classification head, "transformer."."""
    names = {id(m): n for n, m in model.named_modules()}
    return min(names[id(stack)] for stack in _stacks(model)).removesuffix("encoder").removesuffix("decoder")


def sublayers(model: nn.Module) -> dict[str, nn.Module]:
    """The sublayers of every stack by module name, in forward order."""
    names = {id(m): n for n, m in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for stack in _stacks(model):
        for item in stack.block:
            for layer in item.layer:
                found[names[id(layer)]] = layer
    return found


def _check_linear(name: str, module: nn.Module) -> None:
    if type(module) is not nn.Linear or module.bias is not None or "weight" not in module._parameters:
        raise BwskError(
            f"make_reversible: {name} is {type(module).__name__}, not a plain nn.Linear without bias; "
            "apply make_reversible before adapters, quantisation or parametrisations, or leave them out"
        )


def _check_parts(layer_name: str, parts: tuple[Part, ...], linears: tuple[str, ...]) -> None:
    for _, name, module, kind in parts:
        if hooked(module):
            raise BwskError(
                f"make_reversible: a hook on {layer_name}.{name} would not fire inside the engine; remove it, or "
                "register it after make_reversible, whereupon that sublayer runs its stock forward"
            )
        if name in linears:
            _check_linear(f"{layer_name}.{name}", module)
        elif not kind.__module__.startswith(("transformers.", "torch.nn.")) or (
            name == "dropout" and kind is not nn.Dropout
        ):
            raise BwskError(f"make_reversible: {layer_name}.{name} is {kind.__name__}, not the stock module")
        elif name == "act" and any(True for _ in module.parameters()):
            raise BwskError(
                f"make_reversible: {layer_name}.{name} is {kind.__name__}, an activation with weights; not supported"
            )


def _attention_policy(name: str, layer: Any, level: str, tied: TiedTable | None) -> Policy:
    crossed = hasattr(layer, "EncDecAttention")
    inside = "EncDecAttention" if crossed else "SelfAttention"
    attention = getattr(layer, inside)
    names = ("q", "k", "v", "o") + (("relative_attention_bias",) if attention.has_relative_attention_bias else ())
    parts = parts_of(layer, "layer_norm", "dropout", inside) + parts_of(attention, *names)
    _check_parts(name, parts, ("q", "k", "v", "o"))
    facts = {"attention": attention, "norm": layer.layer_norm, "dropout": layer.dropout, "crossed": crossed}
    return Policy(level, parts, tied, facts)


def _feed_forward_policy(name: str, layer: Any, level: str) -> Policy:
    dense = layer.DenseReluDense
    gated = hasattr(dense, "wi_0")
    linears = ("wi_0", "wi_1", "wo") if gated else ("wi", "wo")
    parts = parts_of(layer, "layer_norm", "dropout", "DenseReluDense") + parts_of(dense, "act", "dropout", *linears)
    _check_parts(name, parts, linears)
    rectified = not gated and type(dense.act) is nn.ReLU
    facts = {"dense": dense, "norm": layer.layer_norm, "dropout": layer.dropout, "rectified": rectified}
    return Policy(level, parts, facts=facts)


def plan(
    model: Any, budget: Any, shape: tuple[int, int, int], precision: Precision = "fp32", loop: TrainingLoop = PLAIN
) -> Plan:
    """The plan for a model or config: `shape` is (batch, input tokens, target tokens)."""
    config = getattr(model, "config", model)
    sizes = costs.Shape(*shape, element=4 if precision == "fp32" else 2)
    if isinstance(model, nn.Module):
        _require_stacks(model)
        parts = replace(costs.Parts.of(library_class(type(model))), prefix=prefix(model))
    else:
        parts = costs.Parts.of(model_class(config))
    parameters = costs.parameters(config, parts)
    weights = trained = 4 * parameters
    if isinstance(model, nn.Module):  # as it is: frozen, or in another dtype
        weights, trained = _bytes(model, trained=False), _bytes(model)
    base = weights + 2 * trained

    asked = parse_budget(budget, lambda: stock_peak(model, shape, precision, loop=loop))
    kind = asked.head if precision == "fp32" and not loop.label_smoothing else "exact"
    head = in_loop(costs.head(config, sizes, kind, parts), config, sizes, precision, loop)
    units = costs.units(config, sizes, parts)
    if isinstance(model, nn.Module):
        blocks = [model.get_submodule(unit.name) for unit in units]
        frozen = [_bytes(block, trained=False) - _bytes(block) for block in blocks]
        units = [replace(u, gradients=max(0, u.gradients - size)) for u, size in zip(units, frozen, strict=True)]
        if not cast(Any, model).get_input_embeddings().weight.requires_grad:
            head = replace(head, gradient=0)
    found = Plan(
        asked,
        units,
        [0] * len(units),
        head,
        base,
        "bit-identical" if head.kind != "chunked" else "loss head as exact as the stock one, not bit-identical",
        (config, sizes, parts.prefix),
    )
    return require_within_budget(solve(found, asked.cap, asked.flops), weights + 3 * trained)


def _bytes(module: nn.Module, *, trained: bool = True) -> int:
    """Bytes of the module's weights, of those alone that are trained unless `trained` is False."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not trained)


def install(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Set the forwards of a plan; returns the modules changed."""
    require_stock_forward("", model)
    touched = install_levels(model, plan.levels, plan.head.kind)
    if model in touched:
        return touched
    patch_forward(model, whole_model, None)
    return [*touched, model]


def install_levels(model: nn.Module, levels: dict[str, str], head: str) -> list[nn.Module]:
    """Set the forwards. `levels`: sublayer or block name to level; `head`: "exact", "chunked" or "stock".

    Returns the modules changed. Raises `BwskError`, before changing anything, if a module is not a stock one.
    """
    todo: list[tuple[nn.Module, Any, Policy]] = []
    method: Any
    names = {id(m): n for n, m in model.named_modules()}
    tied = TiedTable()
    for stack in _stacks(model):
        for item in stack.block:
            as_block = levels.get(names[id(item)]) == Level.CHECKPOINT_BLOCK
            parts: tuple[Part, ...] = parts_of(item, "layer")
            facts: dict[str, Any] = {}
            for index, layer in enumerate(item.layer):
                name = names[id(layer)]
                level = Level.SAVE_INPUT if as_block else levels.get(name, Level.SAVE_CONTEXT)
                if level == "stock":
                    continue
                own = parts_of(item.layer, str(index))
                _check_parts(f"{names[id(item)]}.layer", own, ())
                parts += own
                if hasattr(layer, "DenseReluDense"):
                    policy, method = _feed_forward_policy(name, layer, level), feed_forward
                    policy.facts["owner"] = Owner(item)
                else:
                    policy = _attention_policy(name, layer, level, tied if stack.is_decoder else None)
                    method = cross_attention if policy.facts["crossed"] else self_attention
                    facts = {"attention": policy.facts["attention"]}
                parts += policy.parts
                todo.append((layer, method, policy))
            if as_block:
                todo.append((item, block, Policy(Level.CHECKPOINT_BLOCK, parts, facts=facts)))
        todo.append((stack.final_layer_norm, norm, Policy(Level.SAVE_CONTEXT)))
        todo.append((stack.dropout, drop, Policy(Level.SAVE_CONTEXT)))
    if library_class(type(model)).__name__ in HEADS and head != "stock":
        todo += _head_policies(model, head, tied)
    for module, _, _ in todo:
        require_stock_forward(names[id(module)], module)
    _require_stock(model)
    _require_own_weights(model)
    for module, method, policy in todo:
        patch_forward(module, method, policy)
    return [module for module, _, _ in todo]


def _head_policies(model: Any, head: str, tied: TiedTable) -> list[tuple[nn.Module, Any, Policy]]:
    """The forwards of the lookups, the output projection and the model itself, which computes the loss."""
    _check_linear("lm_head", model.lm_head)
    lookups = {id(stack.embed_tokens): stack.embed_tokens for stack in (model.encoder, model.decoder)}
    for table in lookups.values():
        if type(table) is not nn.Embedding or table.max_norm is not None or table.sparse or table.scale_grad_by_freq:
            raise BwskError(
                f"make_reversible: embed_tokens is {type(table).__name__} with options that T5 does not use; "
                "use a plain nn.Embedding"
            )
    found: list[tuple[nn.Module, Any, Policy]] = [
        (table, lookup, Policy(Level.SAVE_CONTEXT, tied=tied)) for table in lookups.values()
    ]
    found.append((model.lm_head, projection, Policy(Level.SAVE_CONTEXT, tied=tied)))
    found.append((model, conditional, Policy(head, parts_of(model, "lm_head"), tied=tied)))
    return found


def uninstall(modules: list[nn.Module]) -> None:
    """Remove the forwards."""
    for module in modules:
        unpatch(module)
