"""Patch `forward` on individual modules: install, recognise and remove our own patches.

A module keeps its class; `forward` is set on the instance, where PyTorch looks first. A wrapper that others put around
that forward still calls it after undo, when it runs the stock forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

from bwsk._compat import REPLICATE, collects_outputs
from bwsk.errors import BwskError

# What frameworks read of a forward: its name in messages, its annotations, and `torch.export` its code. Not `__func__`,
# which accelerate would call in place of the patch.
_OF_STOCK = (
    *("__name__", "__qualname__", "__wrapped__", "__annotations__", "__globals__"),
    *("__code__", "__defaults__", "__kwdefaults__"),
)


class PatchedForward:
    """The forward of one module while it is reversible. An object, so that models can be copied and pickled.

    What torch.export and torch.compile trace is the stock forward. While the module trains, torch.compile runs the
    patch eagerly, since it would reorder the operators that bit-identity depends on.
    """

    def __init__(self, method: Callable[..., Any], module: nn.Module) -> None:
        self.method, self.module = method, module
        self.__doc__, self.__module__ = type(module).forward.__doc__, type(module).forward.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if args and args[0] is module:  # accelerate's unwrap_model binds the forward to its module once more
            args = args[1:]
        if not is_patched(module) or (torch.compiler.is_compiling() and not module.training):
            return type(module).forward(module, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():  # asked first: within it, torch 2.11 is always exporting
            return _eagerly(self.method, module, *args, **kwargs)
        if torch.compiler.is_exporting():
            return type(module).forward(module, *args, **kwargs)
        return self.method(module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(stock_forward(self.module))

    def __getattr__(self, name: str) -> Any:
        if name in _OF_STOCK:
            return getattr(type(self.module).forward, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@torch.compiler.disable(
    reason="make_reversible: training steps run eagerly, to be bit-identical; "
    "leave out fullgraph=True, or call bwsk.undo(model) before torch.compile"
)
def _eagerly(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)


def whole_model(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The stock forward, for a model of which only parts are patched.

    As a patch it keeps torch.compile from the parts in between while the model trains.
    """
    return stock_forward(self)(*args, **kwargs)


class Owner:
    """A module around the one whose state this is; None in a copy of the inner module alone."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        return Owner(memo.get(id(self.module)))

    @property
    def checkpointing(self) -> bool:
        """Whether the framework's gradient checkpointing is on for the module."""
        return bool(getattr(self.module, "gradient_checkpointing", False))


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
    """Attach `state` to a module that `make_reversible` changes, for `state_of`; for None an object without meaning."""
    vars(module)["_bwsk"] = object() if state is None else state


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
    if _patch_of(module) is not None:
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


def _patch_of(module: nn.Module) -> PatchedForward | None:
    """The patch that is the module's forward, if it is one."""
    forward = module.__dict__.get("forward")
    forward = forward.__func__ if isinstance(forward, MethodType) else forward
    return forward if isinstance(forward, PatchedForward) else None


def patched_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that `make_reversible` has changed; of a shallow copy also its original, whose parts it shares."""
    for module in list(model.modules()):
        patch = _patch_of(module)
        if patch is not None and patch.module is not module:
            yield patch.module
        if is_patched(module):
            yield module


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
