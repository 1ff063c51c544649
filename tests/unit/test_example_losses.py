"""What a predicted or planned step trains on: the class's own loss, or a mean for a model without a head."""

from __future__ import annotations

import pytest
import torch

from bench.coverage import small_model
from bwsk import BwskError, make_reversible, predict_memory
from bwsk.example_batch import example_batch, label_arguments, loss_of, own_loss_of
from bwsk.memory.fake_step import step_loss

SHAPE = {"batch": 3, "input_length": 12, "target_length": 7}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("BertForPreTraining", {"labels", "next_sentence_label"}),
        ("AlbertForPreTraining", {"labels", "sentence_order_label"}),
        ("BertForQuestionAnswering", {"start_positions", "end_positions"}),
        ("T5ForQuestionAnswering", {"start_positions", "end_positions"}),
        ("BertForTokenClassification", {"labels"}),
        ("PegasusForCausalLM", {"labels"}),
    ],
)
def test_a_class_gets_the_labels_that_its_own_loss_needs(name: str, wanted: set[str]) -> None:
    model = small_model(name)
    batch = example_batch(model, 3, 12, 7)
    assert wanted <= batch.keys()
    outputs = model(**batch)
    assert step_loss(model, batch, "fp32").ndim == 0
    assert own_loss_of(outputs) is outputs.loss is not None


def test_a_step_of_a_class_with_two_losses_is_planned() -> None:
    model = small_model("BertForPreTraining")
    with make_reversible(model, "max", **SHAPE) as handle:
        # The pooled output's head is trained by its own loss alone: with the mean of the first output it had none.
        assert handle.plan.units[-1].gradients > 0
    assert predict_memory(model, batch=3, input_length=12).peak_mib > 0


def test_a_class_whose_loss_needs_more_is_refused_by_name() -> None:
    model = small_model("RoCBertForPreTraining")
    for step in (
        lambda: make_reversible(model, "fast", **SHAPE),
        lambda: predict_memory(model, batch=3, input_length=12),
    ):
        with pytest.raises(BwskError, match=r"^RoCBertForPreTraining: computes no loss .* labels_input_ids,[^\n]*$"):
            step()


@pytest.mark.parametrize("name", ["BertModel", "T5Model"])
def test_a_model_without_a_head_trains_on_the_mean_of_its_first_output(name: str) -> None:
    model = small_model(name).eval()
    assert label_arguments(model) == []
    batch = example_batch(model, 3, 12, 7)
    assert torch.equal(step_loss(model, batch, "fp32"), model(**batch)[0].mean())


def test_a_loss_is_found_in_a_tuple_too() -> None:
    model = small_model("BertForMaskedLM").eval()
    batch = example_batch(model, 3, 12, None)
    loss = model(**batch).loss
    assert torch.equal(loss_of(model(**batch, return_dict=False)), loss)
    model.config.return_dict = False
    assert torch.equal(step_loss(model, batch, "fp32"), loss)
