"""What one module of a T5 saves while it trains, and whether a call of it can run that way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bwsk._compat import cache_argument, globally_hooked
from bwsk.reversible.patching import PatchedForward, hooked, state_of
from bwsk.reversible.t5.float16 import OutOfFloat16
from bwsk.reversible.t5.tied_embedding import TiedTable

CACHE = cache_argument()


class Part(NamedTuple):
    """A module inside a sublayer: its owner and name there, and what it was when the policy was made."""

    owner: nn.Module
    name: str
    module: nn.Module
    kind: type[nn.Module]


@dataclass
class Policy:
    """What one module saves, and the modules inside it that its stock forward would have called."""

    level: str
    parts: tuple[Part, ...] = ()
    tied: TiedTable | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # the stock modules that the forward reads, by role


def policy_of(module: nn.Module) -> Policy:
    """The policy that the engine attached to the module."""
    return state_of(module)


def parts_of(owner: nn.Module, *names: str) -> tuple[Part, ...]:
    """The modules of these names in `owner`, as they are now."""
    found = ((name, owner.get_submodule(name)) for name in names)
    return tuple(Part(owner, name, module, type(module)) for name, module in found)


def changed(policy: Policy) -> bool:
    """Whether a module of the policy differs from when the policy was made: hooks, adapters, …"""
    return globally_hooked() or any(
        owner._modules.get(name) is not module
        or type(module) is not kind
        or module._parameters.get("bias") is not None
        or hooked(module)
        or ("forward" in module.__dict__ and not isinstance(module.__dict__["forward"], (PatchedForward, OutOfFloat16)))
        for owner, name, module, kind in policy.parts
    )


def engaged(module: nn.Module, x: Tensor, states: Tensor | None, *masks: Tensor | None, **kwargs: Any) -> bool:
    """Whether this call is a training step that the policy covers; if not, the stock forward runs.

    Hidden states that are not contiguous are multiplied by other kernels if they need a gradient.
    """
    if not module.training or not torch.is_grad_enabled():
        return False
    if kwargs.get(CACHE) is not None or kwargs.get("output_attentions"):
        return False
    if any(mask is not None and mask.requires_grad for mask in masks):
        return False
    if not x.is_contiguous() or (states is not None and not states.is_contiguous()):
        return False
    policy = policy_of(module)
    owner = policy.facts.get("owner")
    if owner is not None and owner.checkpointing:
        return False
    attention = policy.facts.get("attention")
    if attention is not None and (
        attention.gradient_checkpointing or getattr(attention.config, "output_attentions", False)
    ):
        return False
    if x.dtype is not torch.float32 and torch.is_autocast_enabled(x.device.type):
        return False
    return not changed(policy)
