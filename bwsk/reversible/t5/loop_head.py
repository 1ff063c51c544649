"""The loss head of a T5 whose loss the loop around it computes: measured on fake tensors, for it is the loop's code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bwsk._compat import FakeTensorMode
from bwsk.memory.allocation_log import Tracker
from bwsk.memory.cuda_rules import cuda_rules
from bwsk.memory.training_loop import TrainingLoop
from bwsk.reversible.plan import Head
from bwsk.reversible.t5.costs import Shape
from bwsk.reversible.t5.tied_embedding import ProjectionNode
from bwsk.units import Precision, dtype_of


def in_loop(head: Head, config: Any, shape: Shape, precision: Precision, loop: TrainingLoop) -> Head:
    """The head as the loop makes it: with its smoothed loss, or with a float32 copy of the logits at the forward's end.

    A head without a projection onto the vocabulary stays as it is.
    """
    if head.kind == "none":
        return head
    if loop.label_smoothing:
        return _smoothed(head, config, shape, precision, loop)
    copied = 4 * shape.batch * shape.target_length * config.vocab_size if loop.widens else 0
    return replace(head, peak=max(head.peak, copied))


def _smoothed(head: Head, config: Any, shape: Shape, precision: Precision, loop: TrainingLoop) -> Head:
    """Projection and loss in one step: bytes that stay until the backward, and the most above them."""
    with FakeTensorMode(), cuda_rules():
        hidden = torch.empty(shape.batch, shape.target_length, config.d_model, requires_grad=True)  # (B, T, d)
        table = nn.Parameter(torch.empty(config.vocab_size, config.d_model))  # (V, d)
        labels = torch.zeros(shape.batch, shape.target_length, dtype=torch.long)  # (B, T)
        tracker = Tracker()
        with tracker:
            for tensor in (hidden, table, labels):
                tracker.adopt(tensor)
            start = len(tracker.log.events)
            with torch.autocast("cpu", dtype=dtype_of(precision), enabled=precision != "fp32"):
                outputs = {"logits": ProjectionNode.apply(hidden, table)}  # (B, T, V)
            outputs = loop.received(outputs)
            loss = loop.loss(nn.Identity(), outputs, labels)
            del outputs
            begin = len(tracker.log.events)
            torch.autograd.backward(loss)
            tracker.stop()
    timeline = [0]
    for _, size in tracker.log.events:
        timeline.append(timeline[-1] + size)
    saved = timeline[begin] - timeline[start]
    outs = 2 * 4 * hidden.numel()  # the last stack's output, before and after its last norm
    return replace(head, saved=saved + outs, peak=max(timeline[start:]) - timeline[start] - saved)
