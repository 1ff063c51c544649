"""Is a class still the one that transformers or PyTorch defines, with the functions and globals that it came with?

The engine stands in for functions that it knows. A class is known by what it is, not by its name: a subclass may have
its parent's name, a method may have been replaced, and so may a loss or an activation where the module looks it up.
"""

from __future__ import annotations

import builtins
import contextlib
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
import transformers
from torch import nn

from bwsk.errors import BwskError

# Functions that layers call, by the names under which the engine calls them too.
_FUNCTIONAL = ("dropout", "embedding", "linear", "softmax", "cross_entropy", "relu", "gelu", "silu", "nll_loss")
# Where the libraries lie, and bwsk: a prediction in another thread replaces some of these functions for a while, and
# its replacements call the stock ones (`cuda_rules`).
_ROOTS = (
    *(str(Path(inspect.getfile(package)).parent) for package in (torch, transformers)),
    str(Path(__file__).parents[1]),
)


def altered(cls: type[nn.Module]) -> str | None:
    """Why `cls` is not what its library defines, as half a sentence; None if it is.

    Looks at the class itself, at the methods that it and its parents define, and at the functions and classes that
    those read from their module: losses, attention functions, layers.
    """
    home = sys.modules.get(cls.__module__)
    if not _of_library(home):
        return f"is defined in {cls.__module__}"
    if getattr(home, cls.__qualname__, None) is not cls:
        return f"is not {cls.__module__}.{cls.__qualname__} (another class stands there)"
    for owner in cls.__mro__:
        if owner in (nn.Module, object) or not issubclass(owner, nn.Module):
            continue
        if not _of_library(sys.modules.get(owner.__module__)):
            return f"inherits from {owner.__name__} of {owner.__module__}"
        for name, value in vars(owner).items():
            function = _function(value)
            if function is None:
                if name == "forward":
                    return f"has another {owner.__name__}.forward ({value!r:.60})"
                continue
            if place := _elsewhere(function, owner, name):
                return f"has another {owner.__name__}.{name} ({place})"
            if name == "forward" and owner is _definer(cls, "forward") and (found := _globals_altered(function)):
                return found
    return None


def library_class(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls`, or the class of transformers or PyTorch that it adds something to.

    Raises `BwskError` if a subclass replaces anything that its parent has, other than how it is made.
    """
    base = next((one for one in cls.__mro__ if _of_library(sys.modules.get(one.__module__))), nn.Module)
    for owner in cls.__mro__[: cls.__mro__.index(base)]:
        changed = [
            name
            for name, value in vars(owner).items()
            if not name.startswith("__") and getattr(base, name, value) is not value
        ]
        if changed:
            raise BwskError(
                f"make_reversible: {cls.__name__} of {cls.__module__} has a {changed[0]} of its own, which the engine "
                "would not run; not supported"
            )
    return base


def altered_function(function: Any, module: str, name: str) -> str | None:
    """The same for a function that `module` defines under this name."""
    home = sys.modules.get(module)
    if getattr(home, name, None) is not function or not isinstance(function, FunctionType):
        return f"is not {module}.{name}"
    return _outside(function) or _globals_altered(function)


def altered_functional() -> str | None:
    """Which function of `torch.nn.functional` is not PyTorch's, as a sentence without its end; None if all are."""
    for name in _FUNCTIONAL:
        function = getattr(nn.functional, name)
        if not isinstance(function, BuiltinFunctionType) and (place := _outside(function)):
            return f"torch.nn.functional.{name} has been replaced ({place})"
    return None


def _definer(cls: type, name: str) -> type:
    return next(owner for owner in cls.__mro__ if name in vars(owner))


def _function(value: Any) -> FunctionType | None:
    value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    value = value.fget if isinstance(value, property) else value
    return value if isinstance(value, FunctionType) else None


def _chain(function: Any) -> Iterator[FunctionType]:
    """A function and what its decorators wrap."""
    while isinstance(function, FunctionType):
        yield function
        function = getattr(function, "__wrapped__", None)


def _elsewhere(function: FunctionType, owner: type, name: str) -> str | None:
    """Where a method comes from, unless it is from the class's own file under its own name, decorated or not."""
    if place := _outside(function):
        return place
    innermost = list(_chain(function))[-1]
    if name == "forward" and innermost.__qualname__.rpartition(".")[2] != name:
        return f"{innermost.__module__}.{innermost.__qualname__}"
    if name == "forward" and innermost.__qualname__.partition(".")[0] not in {one.__name__ for one in owner.__mro__}:
        return f"{innermost.__module__}.{innermost.__qualname__}"
    return None


def _outside(function: Any) -> str | None:
    """File and line of the part of a function, or of its decorators, that is not of these libraries."""
    for part in _chain(function):
        if not part.__code__.co_filename.startswith((*_ROOTS, contextlib.__file__, "<")):
            return f"{part.__code__.co_filename}:{part.__code__.co_firstlineno}"
    return None if isinstance(function, FunctionType) else f"{type(function).__name__} {function!r:.60}"


def _globals_altered(function: FunctionType) -> str | None:
    """Which function or class that a function reads from its module does not belong there."""
    innermost = list(_chain(function))[-1]
    space = innermost.__globals__
    for name in sorted(_names(innermost.__code__) & space.keys()):
        value = space[name]
        if isinstance(value, FunctionType):
            if place := _outside(value):
                return f"looks up {name}, which has been replaced ({place})"
        elif isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ != innermost.__module__:
            if value.__name__ != name or not _of_library(sys.modules.get(value.__module__)):
                return f"looks up {name}, which has been replaced ({value.__module__}.{value.__qualname__})"
            if place := _outside(_function(vars(_definer(value, "forward"))["forward"]) or value.forward):
                return f"looks up {name}, whose forward has been replaced ({place})"
    return None


@cache
def _names(code: CodeType) -> frozenset[str]:
    inner = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return frozenset(code.co_names).union(*inner) - vars(builtins).keys()


def _of_library(module: ModuleType | None) -> bool:
    return (getattr(module, "__file__", None) or "").startswith(_ROOTS[:2])
