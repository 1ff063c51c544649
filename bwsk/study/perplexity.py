"""Perplexity of a model on a stream of tokens, by the published protocol and by the plain one.

A window of w tokens is split in the middle: the encoder reads the first w/2, the last w/2 are the labels y. With
L(s) = -sum_i log p(y_i | y_<i, first half), the negative log likelihood (NLL) of the window that starts at s:

    published perplexity  exp( mean over s of L(s) / (w/2) ),   s = 0, stride, 2 stride, … < n - w   (they overlap)
    token perplexity      exp( sum of L(s) / number of labels ), s = 0, w, 2 w, … < n - w
    bits per byte         (sum of L(s) / number of labels) * (n tokens / n bytes) / ln 2

The protocol is that of the published runs, with windows in batches. In float32 the result does not depend on the
batch size beyond rounding (1e-5 relative).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bwsk.errors import BwskError
from bwsk.study.cpu_tuning import keep_freed_memory
from bwsk.study.device import autocast
from bwsk.study.model import split_block

if TYPE_CHECKING:
    from bwsk.study.params import EvaluateParams

# Number of labels whose logits exist at once. For a batch of 32 windows logits take 1 GiB, and so does their softmax.
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Perplexity:
    """Figures of one split. Perplexities are per token; `nll_per_token` is in nats."""

    published_perplexity: float
    token_perplexity: float
    bits_per_byte: float
    nll_per_token: float
    n_windows: int
    n_target_tokens: int


def perplexity(
    model: torch.nn.Module,
    tokens: np.ndarray,
    n_bytes: int,
    *,
    window: int,
    stride: int,
    params: EvaluateParams,
    on_batch: Callable[[int], None] = lambda n_windows: None,
) -> Perplexity:
    """Both perplexities of `tokens` (n,), the stream of a text of `n_bytes` UTF-8 bytes.

    The model is evaluated where its weights are, and left in the mode (train or eval) that it was in.
    """
    published, plain = evaluation_starts(len(tokens), window, stride, params.max_windows)
    # One pass over the union: usually the plain windows are among the published ones.
    starts = np.union1d(published, plain)
    nll = window_nll(model, tokens, starts, window, params, on_batch)
    n_labels = window // 2
    published_mean = nll[np.isin(starts, published)].mean() / n_labels
    plain_nll = nll[np.isin(starts, plain)]
    per_token = plain_nll.sum() / (len(plain_nll) * n_labels)
    return Perplexity(
        published_perplexity=_exp(published_mean),
        token_perplexity=_exp(per_token),
        bits_per_byte=float(per_token) * len(tokens) / n_bytes / math.log(2),
        nll_per_token=float(per_token),
        n_windows=len(published),
        n_target_tokens=len(plain_nll) * n_labels,
    )


def published_perplexity(
    model: torch.nn.Module,
    tokens: np.ndarray,
    *,
    window: int,
    stride: int,
    params: EvaluateParams,
    on_batch: Callable[[int], None] = lambda n_windows: None,
) -> float:
    """The published perplexity alone: what validation during training needs."""
    starts, _ = evaluation_starts(len(tokens), window, stride, params.max_windows)
    return _exp(window_nll(model, tokens, starts, window, params, on_batch).mean() / (window // 2))


def evaluation_starts(
    n_tokens: int, window: int, stride: int, max_windows: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Starts of the published (overlapping) and of the plain windows, each cut to the first `max_windows`."""
    from bwsk.study.tokens import windows  # imports pydantic, which a bare GPU machine may lack

    return windows(n_tokens, window, stride)[:max_windows], windows(n_tokens, window, window)[:max_windows]


def window_nll(
    model: torch.nn.Module,
    tokens: np.ndarray,
    starts: np.ndarray,
    window: int,
    params: EvaluateParams,
    on_batch: Callable[[int], None] = lambda n_windows: None,
) -> np.ndarray:
    """NLL in nats of each window's labels, (n_windows,) float64; `on_batch` gets each batch's number of windows."""
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
    offsets = np.arange(window)
    was_training = model.training
    model.eval()
    sums: list[Tensor] = []
    try:
        # Not inference_mode, in which autocast would cast every weight again at each use.
        with torch.no_grad(), autocast(device, params.precision):
            for first in range(0, len(starts), params.batch_size):
                batch_starts = starts[first : first + params.batch_size]
                batch = split_block(tokens[batch_starts[:, None] + offsets], device)
                with _head_apart(model) as head:
                    states = model(**_without_loss(model, batch), use_cache=False).logits
                together = max(1, ROWS_AT_ONCE // batch["labels"].shape[1])
                for part, labels in zip(states.split(together), batch["labels"].split(together), strict=True):
                    sums.append(_nll(head(part), labels))
                on_batch(len(batch_starts))
    finally:
        model.train(was_training)
    nll = torch.cat(sums).cpu().numpy()
    if not np.isfinite(nll).all():
        start = starts[int(np.flatnonzero(~np.isfinite(nll))[0])]
        raise BwskError(f"evaluation: the loss is not finite on the window at token {start}; the weights are broken")
    return nll


def _without_loss(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The labels as decoder input, shifted right as the model does it, so that it does not compute a loss as well."""
    shifted = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return {"input_ids": batch["input_ids"], "decoder_input_ids": shifted}


@contextmanager
def _head_apart(model: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within it, a T5 returns the input of its output projection (its last operation) as "logits".

    Yields the projection, to be called afterwards. For other models it yields the identity.
    """
    if model.config.model_type not in ("t5", "mt5"):
        yield lambda logits: logits
        return
    head = model.get_output_embeddings()
    own = head.__dict__.get("forward")  # the reversible engine sets one
    head.forward = lambda states: states
    try:
        yield head
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    """NLL per window, (windows,) float64, from logits (windows, length, vocabulary) and labels (windows, length)."""
    log_probabilities = torch.log_softmax(logits, -1, dtype=torch.float32)
    return -log_probabilities.gather(-1, labels[..., None]).double().sum((1, 2))


def _exp(nll: float) -> float:
    """exp, capped where a diverged model's perplexity would overflow, because JSON has no infinity."""
    return math.exp(min(float(nll), 700.0))
