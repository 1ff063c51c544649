"""Recognise positions and embeddings by behaviour: a distinct code per position, or a row per index (for `probe`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bwsk._compat import tree_leaves
from bwsk.classification.dataflow import Flow, dispatched
from bwsk.classification.operators import OpInfo
from bwsk.classification.stand_in import Probe, is_real

_PLACES = 5


def position(probe: Probe) -> OpInfo | None:
    """A distinct code for each position that no activation enters: rotary, sinusoidal and learned positions."""
    for given in _places(probe):
        try:
            codes, again = _codes(probe(*given)), _codes(probe(*given))
            reads = is_real(given[0]) and flow_of(probe, given, given[0]).reads
        except Exception:
            continue
        if codes is None or again is None or not torch.equal(codes, again) or reads:  # random, or computed from data
            continue
        views = (codes.flatten(0, -2), *((codes.flatten(1).T,) if codes.dim() > 2 else ()))
        for rows in views:  # the code lies in the last dimension or, of an image, in the first
            if len(rows) >= _PLACES and len(rows.unique(dim=0)) == len(rows):
                return OpInfo("position", {}, "behaviour")
    return None


def flow_of(probe: Probe, inputs: tuple[Any, ...], data: Tensor) -> Flow:
    """Dataflow of `probe(*inputs)`, with `data` as the value that is followed."""
    return dispatched(lambda _: probe(*inputs), data)


def _places(probe: Probe) -> Iterator[tuple[Any, ...]]:
    """Inputs of position modules: activations, a mask, a shape or a length, which are alike for all positions.

    Or the positions themselves beside an activation, with a layer type where the module has several.
    """
    where = torch.arange(_PLACES).reshape(1, _PLACES)
    padding = getattr(probe.module, "padding_idx", None)
    mask = torch.full_like(where, 2 if padding == 1 else 1)  # or tokens, and none of them padding
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(_PLACES))
    config = getattr(probe.module, "config", None)
    layers = getattr(probe.module, "layer_types", None) or getattr(config, "layer_types", None) or ()
    for width in probe.widths or [8]:
        x = torch.randn(1, _PLACES, width, dtype=probe.dtype)
        for positions in (where, where.expand(2, 1, -1), where.expand(3, 1, -1), grid, grid[None]):
            yield x, positions
            for layer in sorted(set(layers)):
                yield x, positions, layer
        yield (x,)
        yield torch.Size((1, width, _PLACES, _PLACES)), x.device, x.dtype
    yield (mask,)
    yield (mask[None],)
    yield (mask.shape,)
    yield mask.shape, mask.device
    yield (_PLACES,)


def _codes(out: Any) -> Tensor | None:
    """The floating point tensors of an output, concatenated and without a batch of one; None if they have no rows."""
    tensors = [torch.view_as_real(t).flatten(-2) if t.is_complex() else t for t in tree_leaves(out) if is_real(t)]
    if not tensors or any(t.shape[:-1] != tensors[0].shape[:-1] for t in tensors):
        return None
    codes = torch.cat([t.double() for t in tensors], -1)
    while codes.dim() > 2 and len(codes) == 1:
        codes = codes[0]
    return codes if codes.dim() >= 2 else None


def lookup(probe: Probe) -> OpInfo | None:
    """A distinct row for each index, whatever its position in the input; inputs that are not indices are refused."""
    count = max((len(t) for t in probe.state.values() if t.dim() == 2), default=_PLACES)
    index = torch.randperm(count).reshape(1, count)
    rows = probe(index)
    if not is_real(rows) or rows.shape[:-1] != index.shape:
        return None
    if not any(len(column.unique()) == count for column in rows[0].T):  # faster than to compare whole rows
        return None
    if not torch.equal(probe(index.flip(1)), rows.flip(1)) or not torch.equal(probe(index[:, :1]), rows[:, :1]):
        return None
    try:
        probe(index.double())
    except Exception:
        return OpInfo("embedding", {"rows": count}, "behaviour")
    return None
