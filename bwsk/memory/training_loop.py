"""What the code around a model adds to its training step: nothing in a plain loop, copies of the logits in a Trainer.

`transformers.Trainer` with label smoothing takes the labels out of the model's call and computes the loss itself from
the logits. Under autocast accelerate, which the Trainer runs on, copies what a model returns to float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bwsk._compat import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, LabelSmoother, tree_map_only
from bwsk.errors import BwskError
from bwsk.units import Precision, to_precision


@dataclass(frozen=True)
class TrainingLoop:
    """The loop that a step is part of. `label_smoothing`: the Trainer's; `widens`: outputs are copied to float32."""

    label_smoothing: float = 0.0
    widens: bool = False

    @classmethod
    def of(cls, training_args: Any) -> TrainingLoop:
        """The loop of `transformers.TrainingArguments`, or a plain one for None."""
        from transformers import TrainingArguments

        if training_args is None:
            return PLAIN
        if not isinstance(training_args, TrainingArguments):
            raise BwskError(f"training_args: found {type(training_args).__name__}; give transformers.TrainingArguments")
        if training_args.gradient_checkpointing:
            raise BwskError("training_args: gradient_checkpointing is on, which recomputes every block; leave it off")
        return cls(float(training_args.label_smoothing_factor), _precision_of(training_args) != "fp32")

    def take_labels(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        """Take the labels out of the inputs where the loop computes the loss of them, in place.

        Decoders of encoder-decoder models then need their input ids, as transformers' collators make them.
        """
        if not self.label_smoothing or "labels" not in inputs:
            return None
        labels: Tensor = inputs.pop("labels")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and labels.dim() > 1:
            inputs.setdefault("decoder_input_ids", torch.zeros_like(labels))
        return labels

    def received(self, outputs: Any) -> Any:
        """The model's outputs as the loop gets them."""
        if not self.widens:
            return outputs
        return tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, outputs)

    def loss(self, model: nn.Module, outputs: Any, labels: Tensor) -> Tensor:
        """The Trainer's smoothed loss of what it received."""
        shift = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        loss: Tensor = LabelSmoother(self.label_smoothing)(outputs, labels, shift_labels=shift)
        return loss


PLAIN = TrainingLoop()


def precision_in(training_args: Any, precision: str | None) -> Precision:
    """The precision of a step: as given, or else the Trainer's, or float32.

    Raises `BwskError` for an unknown one, and where the Trainer's is another one.
    """
    given = None if precision is None else to_precision(precision)
    if training_args is None:
        return given or "fp32"
    TrainingLoop.of(training_args)
    found = _precision_of(training_args)
    if given not in (None, found):
        raise BwskError(f"precision: found {precision!r}, but the Trainer's arguments say {found}; give one of them")
    return found


def _precision_of(training_args: Any) -> Precision:
    return "bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "fp32"
