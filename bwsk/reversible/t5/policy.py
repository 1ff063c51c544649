"""What one module of a T5 saves while it trains, and whether a call of it can run that way."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bwsk._compat import cache_argument, globally_hooked
from bwsk.reversible.patching import PatchedForward, hooked, state_of
from bwsk.reversible.status import fell_back
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


def change(policy: Policy) -> str | None:
    """How a module of the policy differs from when the policy was made: hooks, adapters, …; None if none does."""
    if globally_hooked():
        return "there are hooks for all modules"
    for owner, name, module, kind in policy.parts:
        if owner._modules.get(name) is not module or type(module) is not kind:
            return f"its {name} has been replaced"
        if module._parameters.get("bias") is not None:
            return f"its {name} has got a bias"
        if hooked(module):
            return f"its {name} has hooks"
        if not isinstance(module.__dict__.get("forward"), (PatchedForward, OutOfFloat16, NoneType)):
            return f"the forward of its {name} has been replaced"
    return None


def engaged(module: nn.Module, x: Tensor, states: Tensor | None, *masks: Tensor | None, **kwargs: Any) -> bool:
    """Whether this call is a training step that the policy covers; if not, the stock forward runs.

    In training that is counted (`status.fell_back`); in eval mode and without gradients it is what one expects.
    """
    if not module.training or not torch.is_grad_enabled():
        return False
    if reason := _obstacle(module, x, states, *masks, **kwargs):
        fell_back(module, reason)
    return reason is None


def _obstacle(module: nn.Module, x: Tensor, states: Tensor | None, *masks: Tensor | None, **kwargs: Any) -> str | None:
    """Why a training forward has to be the stock one.

    Hidden states that are not contiguous are multiplied by other kernels if they need a gradient.
    """
    if kwargs.get(CACHE) is not None:
        return "it is given a generation cache (pass use_cache=False)"
    if kwargs.get("output_attentions"):
        return "attentions are asked for"
    if any(mask is not None and mask.requires_grad for mask in masks):
        return "a mask needs a gradient"
    if not x.is_contiguous() or (states is not None and not states.is_contiguous()):
        return "its input is not contiguous"
    policy = policy_of(module)
    owner, attention = policy.facts.get("owner"), policy.facts.get("attention")
    if (owner is not None and owner.checkpointing) or (attention is not None and attention.gradient_checkpointing):
        return "gradient checkpointing is on"
    if attention is not None and getattr(attention.config, "output_attentions", False):
        return "attentions are asked for"
    if x.dtype is not torch.float32 and torch.is_autocast_enabled(x.device.type):
        return f"its input is {x.dtype} under autocast".replace("torch.", "")
    return change(policy)
