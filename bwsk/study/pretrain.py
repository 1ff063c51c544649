"""Pretraining a small T5 by span corruption, as a base checkpoint for studies without network access.

Raffel et al. 2020, section 3.1.4 (https://jmlr.org/papers/v21/20-074.html): spans of a text, noise_density of its
tokens in spans of mean_span_length on average, are replaced by sentinels in the encoder's input, and the decoder
predicts the missing text, each span after its sentinel:

    input   = kept₀ <extra_id_0> kept₁ <extra_id_1> … </s>
    target  = <extra_id_0> span₀ <extra_id_1> span₁ … </s>

Number and total length of the spans are fixed, their places random, so every example has the same shape and nothing
is padded. Dropout is off, as in the pretraining of T5 1.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from bwsk.errors import BwskError
from bwsk.study.model import move
from bwsk.study.params import PretrainedBase
from bwsk.study.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WARMUP = 0.1
LOG_POINTS = 100


@dataclass(frozen=True)
class Corruption:
    """Shapes of span corruption, in tokens: `raw` tokens of text, `noise` of them in `spans` spans."""

    raw: int
    noise: int
    spans: int

    @property
    def input_length(self) -> int:
        """Kept tokens, a sentinel per span, end of sequence."""
        return self.raw - self.noise + self.spans + 1

    @property
    def target_length(self) -> int:
        """Noise tokens, a sentinel per span, end of sequence."""
        return self.noise + self.spans + 1


def corruption(input_length: int, noise_density: float, mean_span_length: float) -> Corruption:
    """The longest raw text that becomes at most `input_length` encoder tokens."""

    def of(raw: int) -> Corruption:
        noise = min(max(round(raw * noise_density), 1), raw - 1)
        # Each span needs a noise token in it and a kept token before it.
        return Corruption(raw, noise, min(max(round(noise / mean_span_length), 1), noise, raw - noise))

    shape = of(2)
    while (longer := of(shape.raw + 1)).input_length <= input_length:
        shape = longer
    return shape


def corrupt(
    text: np.ndarray, shape: Corruption, sentinels: np.ndarray, eos: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One example: `text` (raw,) to encoder input (input_length,) and decoder target (target_length,)."""
    kept = _partition(shape.raw - shape.noise, shape.spans, generator)
    noise = _partition(shape.noise, shape.spans, generator)
    # Kept and noise segments alternate, the first is kept.
    bounds = np.cumsum(np.stack([kept, noise], axis=1).ravel())[:-1]
    segments = np.split(text, bounds)
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    for span in range(shape.spans):
        sentinel = sentinels[span : span + 1]
        inputs += [segments[2 * span], sentinel]
        targets += [sentinel, segments[2 * span + 1]]
    return np.concatenate([*inputs, [eos]]), np.concatenate([*targets, [eos]])


def _partition(total: int, parts: int, generator: np.random.Generator) -> np.ndarray:
    """`total` as a sum of `parts` positive integers (parts,), each such sum equally likely."""
    cuts = np.sort(generator.choice(total - 1, size=parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def pretrain(
    model: PreTrainedModel,
    tokens: np.ndarray,
    base: PretrainedBase,
    sentinels: list[int],
    seed: int,
    device: torch.device,
) -> list[tuple[int, float]]:
    """Train `model` in place on the stream `tokens` (n_tokens,); returns (step, loss) of about a hundred steps.

    The same seed, device kind, threads and versions give bit-identical weights. BwskError if the stream is too short
    for one example or the tokenizer has too few sentinels.
    """
    shape = corruption(base.input_length, base.noise_density, base.mean_span_length)
    if shape.spans > len(sentinels):
        raise BwskError(
            f"base.input_length: {base.input_length} makes {shape.spans} spans, the tokenizer has {len(sentinels)} "
            "sentinels (<extra_id_0>, …); set it lower or base.mean_span_length higher"
        )
    if len(tokens) < shape.raw:
        raise BwskError(
            f"corpus, train: {len(tokens)} tokens, pretraining reads {shape.raw} at once; "
            "use a longer text or set base.input_length lower"
        )
    generator = np.random.default_rng(seed)
    marks, eos = np.array(sentinels), int(model.config.eos_token_id)
    move(model, device)
    model.eval()  # turns dropout off, but not gradients
    optimizer = torch.optim.AdamW(model.parameters(), lr=base.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, base.steps))
    curve: list[tuple[int, float]] = []
    every = max(base.steps // LOG_POINTS, 1)
    with progress(base.steps, "base: span corruption") as bar:
        for step in range(1, base.steps + 1):
            starts = generator.integers(0, len(tokens) - shape.raw + 1, size=base.batch_size)
            examples = [
                corrupt(np.asarray(tokens[start : start + shape.raw], dtype=np.int64), shape, marks, eos, generator)
                for start in starts
            ]
            inputs, targets = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*examples, strict=True))
            loss = model(input_ids=inputs, labels=targets).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % every == 0 or step == base.steps:
                curve.append((step, loss.item()))
                if not np.isfinite(curve[-1][1]):
                    raise BwskError(f"base.lr: the loss is not finite at step {step} of pretraining; set it lower")
                bar.advance(step - bar.done, loss=curve[-1][1])
    return curve


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero, as a share of the full learning rate."""
    warmup = max(int(WARMUP * steps), 1)
    return min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
