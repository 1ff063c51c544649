"""What make_reversible promises beside gradients: undo, untouched files and evaluation, refusals, planning."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from bwsk import BwskError, make_reversible
from bwsk.memory.cuda_rules import cuda_accounting
from bwsk.reversible.dropout import dropout_backward, dropout_forward, dropout_replay, pack_bits, unpack_bits
from bwsk.reversible.t5.tied_embedding import touched_rows
from bwsk.units import MIB
from tests.unit.test_reversible_gradients import batch, differences, pair, train

T5_SMALL = {
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "vocab_size": 32128,
    "decoder_start_token_id": 0,
}


def test_undo_gives_the_stock_model_back():
    stock, ours = pair()
    handle = make_reversible(ours, "max")
    assert repr(handle).startswith("<Reversible T5ForConditionalGeneration, <Plan max: ")
    assert len(repr(handle)) < 200
    assert any("forward" in module.__dict__ for module in ours.modules())
    assert handle.undo() is ours
    assert not any("forward" in m.__dict__ or hasattr(m, "_bwsk") for m in ours.modules())
    handle.undo()
    assert differences(train(stock), train(ours)) == []
    make_reversible(ours, "fast")


def test_files_evaluation_and_generation_are_untouched(tmp_path):
    stock, ours = pair(num_decoder_layers=2)
    make_reversible(ours, "max")
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    names = sorted(os.listdir(tmp_path / "stock"))
    assert names == sorted(os.listdir(tmp_path / "ours"))
    for name in names:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    assert list(stock.state_dict()) == list(ours.state_dict())
    tokens = batch(1)["input_ids"]
    for model in (stock, ours):
        model.eval()
    with torch.no_grad():
        assert torch.equal(stock(**batch(1)).logits, ours(**batch(1)).logits)
    assert torch.equal(stock.generate(tokens, max_new_tokens=5), ours.generate(tokens, max_new_tokens=5))


def test_a_deep_copy_trains_itself():
    stock, ours = pair()
    make_reversible(ours, "fast")
    twin = copy.deepcopy(ours)
    for parameter in ours.parameters():
        parameter.data.zero_()
    assert differences(train(stock), train(twin)) == []


def test_training_without_gradients_runs_the_stock_forward():
    stock, ours = pair()
    make_reversible(ours, "balanced")
    with torch.no_grad():
        torch.manual_seed(0)
        one = stock.train()(**batch(1))
        torch.manual_seed(0)
        other = ours.train()(**batch(1))
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.logits, other.logits)


def test_forward_hooks_inside_a_sublayer_fire_once():
    stock, ours = pair()
    make_reversible(ours, "max")
    calls = {id(stock): 0, id(ours): 0}
    for model in (stock, ours):
        module = model.encoder.block[1].layer[1].DenseReluDense.wi

        def count(module, inputs, output, model=model):
            calls[id(model)] += 1

        module.register_forward_hook(count)
    assert differences(train(stock), train(ours)) == []
    assert calls[id(stock)] == calls[id(ours)] == 3


def test_a_replaced_forward_inside_a_sublayer_is_respected():
    stock, ours = pair()
    make_reversible(ours, "max")
    for model in (stock, ours):
        layer = model.decoder.block[1].layer[2].DenseReluDense.wo
        layer.forward = lambda x, layer=layer: 2.0 * nn.functional.linear(x, layer.weight)
    assert differences(train(stock), train(ours)) == []


def test_attentions_are_still_returned():
    _, ours = pair()
    make_reversible(ours, "fast")
    out = ours.train()(**batch(1), output_attentions=True)
    assert len(out.encoder_attentions) == 2
    assert out.encoder_attentions[0].shape == (3, 4, 11, 11)


def test_second_derivatives_are_refused():
    _, ours = pair()
    make_reversible(ours, "fast")
    with pytest.raises(BwskError, match="create_graph"):
        ours.train()(**batch(1)).loss.backward(create_graph=True)


def test_a_second_backward_never_passes_silently():
    """retain_graph: the second pass would meet the overwritten logits."""
    _, ours = pair()
    make_reversible(ours, "fast")
    loss = ours.train()(**batch(1)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(BwskError, match=r"second backward.*outputs\.logits"):
        loss.backward()


def test_a_second_backward_is_right_where_the_logits_are_held():
    stock, ours = pair()
    make_reversible(ours, "fast")
    found = []
    for model in (stock, ours):
        torch.manual_seed(1)
        out = model.train()(**batch(1))
        out.loss.backward(retain_graph=True)
        out.loss.backward()
        found.append([{n: p.grad for n, p in model.named_parameters()}])
    assert differences(*found) == []


def test_weights_changed_before_the_backward_are_reported():
    _, ours = pair()
    make_reversible(ours, "fast")
    loss = ours.train()(**batch(1)).loss
    with torch.no_grad():
        ours.encoder.block[0].layer[1].DenseReluDense.wo.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refusals_name_the_thing():
    _, ours = pair()
    for value, words in (
        ("quick", "fast, balanced, max"),
        (2.0, "fraction"),
        (True, "fraction"),
        (0, "fraction"),
    ):
        with pytest.raises(BwskError, match=words):
            make_reversible(ours, value, batch=2, input_length=8)
    with pytest.raises(BwskError, match="batch="):
        make_reversible(ours, "900MiB")
    with pytest.raises(BwskError, match="cannot go below"):
        make_reversible(ours, "1kB", batch=2, input_length=8)
    with pytest.raises(BwskError, match="Linear"):
        make_reversible(nn.Linear(2, 2))
    ours.encoder.block[0].layer[1].DenseReluDense.wi = nn.Linear(32, 64, bias=True)
    with pytest.raises(BwskError, match=r"block\.0\.layer\.1"):
        make_reversible(ours)
    assert not any("forward" in module.__dict__ for module in ours.modules())
    _, ours = pair()
    handle = make_reversible(ours)
    with pytest.raises(BwskError, match="already"):
        make_reversible(ours)
    handle.undo()
    ours.gradient_checkpointing_enable()
    with pytest.raises(BwskError, match="checkpointing is on"):
        make_reversible(ours)


def test_a_size_is_met_with_the_least_recomputation():
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**T5_SMALL))
    overheads = []
    for size in (1150, 1050, 980):
        handle = make_reversible(model, f"{size}MiB", batch=4, input_length=256, target_length=256)
        assert size - 30 < handle.plan.peak / MIB <= size
        overheads.append(handle.plan.overhead)
        handle.undo()
    assert overheads == sorted(overheads)
    assert 0.02 < overheads[0] < 0.05


def test_masks_survive_packing():
    generator = torch.Generator().manual_seed(0)
    for count in (1, 7, 8, 9, 64, 1000):
        mask = torch.rand(count, generator=generator) < 0.5
        bits = pack_bits(mask)
        assert bits.numel() == -(-count // 8)
        assert torch.equal(unpack_bits(bits, mask.shape), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.37, 1.0])
def test_dropout_again_is_the_same_dropout(p, dtype):
    x = torch.randn(33, 17, dtype=dtype, requires_grad=True)
    torch.manual_seed(4)
    y = nn.functional.dropout(x, p, True)
    g = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, g)
    torch.manual_seed(4)
    ours, bits = dropout_forward(x.detach(), p)
    assert torch.equal(ours, y)
    assert torch.equal(dropout_replay(x.detach(), bits, p), y)
    assert torch.equal(dropout_backward(g, bits, p), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True])
def test_the_operators_of_cuda_agree_with_its_own_backward(dtype, own):
    """CUDA's dropout operators also run on the CPU; the steps taken for them here round alike."""
    with cuda_accounting():
        x = torch.randn(64, 33, dtype=dtype)
        x[x == 0] = 1  # zeros, which torch 2.11 draws in bfloat16, would look like dropped elements
        y, bits = dropout_forward(x, 0.37)
        assert torch.equal(dropout_replay(x, bits, 0.37) != 0, y != 0)
        g = torch.randn_like(x)
        expected = torch.ops.aten.native_dropout_backward(g, y != 0, 1 / (1 - 0.37))
        assert torch.equal(dropout_backward(g.clone(), bits, 0.37, own=own), expected)


def test_rows_of_repeated_tokens_sum_as_in_the_dense_gradient():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 20, (200,), generator=generator)
    g = torch.randn(200, 8, generator=generator)
    dense = torch.ops.aten.embedding_dense_backward(g, tokens, 50, -1, False)
    rows, names = touched_rows(g, tokens, -1)
    ours = torch.zeros(50, 8).index_add_(0, names, rows)
    assert torch.equal(ours, dense)


def _worker(rank: int, port: int, results, compared) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    found = []
    for budget in (None, "fast"):
        _, model = pair()
        if budget:
            make_reversible(model, budget)
        wrapped = nn.parallel.DistributedDataParallel(model.train())
        torch.manual_seed(rank)
        for step in range(2):
            wrapped.zero_grad(set_to_none=True)
            wrapped(**batch(2 * step + rank)).loss.backward()
        found.append([{n: p.grad.clone() for n, p in model.named_parameters()}])
    results.put((rank, differences(*found)))
    compared.wait()  # a rank that leaves could take from the other what it has not read yet
    # No teardown: PyTorch's may wait for gloo's thread with the interpreter's lock in hand, for which that one waits.
    os._exit(0)


def test_distributed_data_parallel():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results, compared = context.Queue(), context.Event()
    arguments = (port, results, compared)
    workers = [context.Process(target=_worker, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    found = dict(results.get(timeout=120) for _ in workers)
    compared.set()
    for worker in workers:
        worker.join(60)
    assert found == {0: [], 1: []}
