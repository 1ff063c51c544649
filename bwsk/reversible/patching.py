"""Patch `forward` on individual modules: install, recognise and remove our own patches.

A module keeps its class; `forward` is set on the instance, where PyTorch looks first. A wrapper that others put around
that forward still calls it after undo, when it runs the stock forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bwsk._compat import REPLICATE, collects_outputs
from bwsk.errors import BwskError


class PatchedForward:
    """The forward of one module while it is reversible. An object, so that models can be copied and pickled."""

    def __init__(self, method: Callable[..., Any], module: nn.Module) -> None:
        self.method, self.module = method, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.method if is_patched(self.module) else type(self.module).forward
        return run(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(stock_forward(self.module))


class StockReplica:
    """How `nn.DataParallel` makes a replica of a patched module: with the stock forward.

    A replica is a module of its own, with weights of its own. The patch on the original knows only the original.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        replica = getattr(type(self.module), REPLICATE)(self.module)
        for name in ("forward", "_bwsk", "_bwsk_watch", REPLICATE):
            replica.__dict__.pop(name, None)
        return replica


def stock_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of the module's class, bound to it."""
    return type(module).forward.__get__(module)


def is_patched(module: nn.Module) -> bool:
    """Whether `make_reversible` has changed this module."""
    return "_bwsk" in module.__dict__


def require_stock_forward(name: str, module: nn.Module) -> None:
    """Raise `BwskError` if somebody else has set a forward on the module, which ours would replace."""
    if "forward" in module.__dict__:
        raise BwskError(
            f"make_reversible: the forward of {name or 'the model'} has been replaced; "
            "call make_reversible before what replaces it, such as accelerate's prepare or a device map"
        )


def set_state(module: nn.Module, state: Any) -> None:
    """Attach `state` to a module that `make_reversible` changes, for `state_of`."""
    module._bwsk = state


def state_of(module: nn.Module) -> Any:
    """The state that `set_state` attached."""
    return module._bwsk


def patch_forward(module: nn.Module, method: Callable[..., Any], state: Any) -> None:
    """Set `method` as the module's forward and attach `state` for it."""
    set_state(module, state)
    module.forward = PatchedForward(method, module)
    setattr(module, REPLICATE, StockReplica(module))


def unpatch(module: nn.Module) -> Any:
    """Undo `patch_forward` and return its state; a forward that others have set since then stays."""
    if isinstance(module.__dict__.get("forward"), PatchedForward):
        del module.forward
    module.__dict__.pop(REPLICATE, None)
    module.__dict__.pop("_bwsk_watch", None)
    return module.__dict__.pop("_bwsk", None)


class Observer:
    """A forward hook that only looks at outputs, so that the module need not run its stock forward for it."""

    def __init__(self, see: Callable[[Any], None]) -> None:
        self.see = see

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.see(output)


def _harmless(hook: Any) -> bool:
    """Whether a forward hook is one with which transformers collects hidden states and attentions, or an `Observer`."""
    return isinstance(hook, Observer) or collects_outputs(hook)


def hooked(module: nn.Module) -> bool:
    """Whether the module has hooks, apart from those that only look at its outputs."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return any(not _harmless(hook) for hook in module._forward_hooks.values())


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """A context in which no hook on the model's modules or parameters fires; hooks added meanwhile stay."""
    owners: list[Any] = [*model.modules(), *model.parameters()]
    taken: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for owner in owners:
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            hooks = getattr(owner, name, None)
            if hooks:
                kept = {key: hook for key, hook in hooks.items() if _harmless(hook)}
                taken.append((hooks, dict(hooks)))
                hooks.clear()
                hooks.update(kept)
    try:
        yield
    finally:
        for hooks, before in taken:
            added = {key: hook for key, hook in hooks.items() if key not in before}
            hooks.clear()
            hooks.update({**before, **added})
