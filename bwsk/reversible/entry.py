"""What a block whose forward is recomputed must find as it was: the generation cache, and states on its modules.

transformers gives a cache to every forward by default, in training too, and the layout of the keys in it affects
rounding. A block's forward fills its layer of the cache. Its recomputation must find that layer as it was before, in a
cache of the same kind, without holding what other blocks have put into theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache

from bwsk._compat import DynamicLayer, DynamicSlidingWindowLayer, tree_leaves

# Layers that replace their tensors by longer ones, so that a shallow copy stays as it is. Others write into theirs.
_REPLACING = (DynamicLayer, DynamicSlidingWindowLayer)


class CacheAtEntry:
    """A cache as a block finds it: the first `take` returns the very cache, later ones return copies."""

    def __init__(self, cache: Cache, layers: list[Any]) -> None:
        self._live: Cache | None = cache
        self._shell = copy.copy(cache)
        self._shell.layers = layers

    def take(self) -> Cache:
        """The cache for the next time that the block runs."""
        if self._live is not None:
            live, self._live = self._live, None
            return live
        again = copy.copy(self._shell)
        # A layer that would be written into holds no tensors here, so a deep copy costs nothing.
        again.layers = [copy.copy(x) if type(x) in _REPLACING else copy.deepcopy(x) for x in self._shell.layers]
        return again

    def left(self, cache: Any) -> None:
        """Forget the layers that the block's first run has not changed."""
        for index, (then, now) in enumerate(zip(self._shell.layers, cache.layers, strict=False)):
            if isinstance(then, _REPLACING) and isinstance(now, _REPLACING) and then.keys is now.keys:
                self._shell.layers[index] = DynamicLayer()


class CachesAtEntry:
    """The same for the two caches of a decoder with cross-attention."""

    def __init__(self, cache: EncoderDecoderCache, own: CacheAtEntry, cross: CacheAtEntry) -> None:
        self._live: EncoderDecoderCache | None = cache
        self._parts = own, cross
        self._updated = dict(cache.is_updated)

    def take(self) -> EncoderDecoderCache:
        """The cache for the next time that the block runs."""
        parts = [part.take() for part in self._parts]
        if self._live is not None:
            live, self._live = self._live, None
            return live
        again = EncoderDecoderCache(*parts)
        again.is_updated = dict(self._updated)
        return again

    def left(self, cache: Any) -> None:
        """Forget the layers that the block's first run has not changed."""
        for part, now in zip(self._parts, (cache.self_attention_cache, cache.cross_attention_cache), strict=True):
            part.left(now)


class OwnStates:
    """Tensors that a block's modules keep on themselves from step to step, such as a recurrent state."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._before = self._now()
        self._changed: dict[tuple[nn.Module, str], Any] = {}

    def _now(self) -> dict[tuple[nn.Module, str], Any]:
        return {
            (module, name): value
            for module in self._block.modules()
            for name, value in vars(module).items()
            if value is None or isinstance(value, Tensor)
        }

    def left(self) -> None:
        """Remember, after the block's first run, the values before it of what has changed."""
        now = self._now()
        self._changed = {key: value for key, value in self._before.items() if key in now and now[key] is not value}
        self._before = {}

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """The states that the block found, within a `with` block."""
        now = {(module, name): vars(module)[name] for module, name in self._changed}
        try:
            _set(self._changed)
            yield
        finally:
            _set(now)


def _set(states: dict[tuple[nn.Module, str], Any]) -> None:
    for (module, name), value in states.items():
        vars(module)[name] = value


def at_entry(block: nn.Module, cache: Cache) -> CacheAtEntry | CachesAtEntry | None:
    """A cache as `block` finds it; None where a copy could not be the same.

    That is so for other kinds of caches, and for a layer that is written into: if it holds something before the block
    runs, or if the block does not say which layer is its own.
    """
    own = _layer_of(block)
    if type(cache) is DynamicCache:
        return _entered(cache, own)
    if type(cache) is EncoderDecoderCache and own is not None and not cache.is_updated.get(own):
        parts = [
            _entered(part, own) if type(part) is DynamicCache else None
            for part in (cache.self_attention_cache, cache.cross_attention_cache)
        ]
        if parts[0] is not None and parts[1] is not None:
            return CachesAtEntry(cache, parts[0], parts[1])
    return None


def _entered(cache: DynamicCache, own: int | None) -> CacheAtEntry | None:
    layers: list[Any] = []
    for index, layer in enumerate(cache.layers):
        if type(layer) in _REPLACING:
            layers.append(copy.copy(layer))
        elif not _holds_states(layer):
            layers.append(copy.deepcopy(layer))
        elif own is None or own == index:
            return None
        else:
            layers.append(DynamicLayer())
    return CacheAtEntry(cache, layers)


def _holds_states(layer: Any) -> bool:
    """Whether a cache's layer holds tensors of more than one number (a window's size is a tensor too)."""
    return any(isinstance(leaf, Tensor) and leaf.ndim for value in vars(layer).values() for leaf in tree_leaves(value))


def _layer_of(block: nn.Module) -> int | None:
    """The layer of a cache that a block says is its own."""
    named = (getattr(module, name, None) for module in block.modules() for name in ("layer_idx", "layer_id"))
    return next((index for index in named if isinstance(index, int)), None)
