"""The CPU's settings: products as exact as before, modes still the same bits, freed memory kept but not without bound.

They last as long as a process, so each test has one of its own.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
GLIBC = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "malloc" in os.environ.get("LD_PRELOAD", ""),
    reason="the allocator is not glibc's",
)
ONEDNN = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this PyTorch has no oneDNN",
)


def answer(code: str) -> Any:
    """What `code` leaves in `found`, run by a new Python without settings of the allocator."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    program = f"import json, torch\n{code}\nprint(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=env, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# Which library computes a product can be told by its operator alone: some processors give both the same bits.
COUNT = """
from torch.autograd.profiler import profile
def by_onednn(work):
    with profile() as profiled:
        result = work()
    return result, sum(event.name == "mkldnn::_linear_pointwise" for event in profiled.function_events)
"""


@ONEDNN
def test_large_products_go_to_onednn_as_exact_and_small_ones_are_unchanged() -> None:
    found = answer(f"""
{COUNT}
from bwsk.study.cpu_tuning import WORTH_IT, multiply_by_onednn
torch.manual_seed(0)
def products(rows, inner, columns):
    x, w, g = torch.randn(rows, inner), torch.randn(columns, inner), torch.randn(rows, columns)
    pairs = [(x, w.t()), (g, w), (g.t(), x), (x[:, ::2], w[:, ::2].t())]  # forward, both backwards, strided
    return pairs, [a.mm(b) for a, b in pairs]
large, before = products(200, 300, 400)
small, small_before = products(20, 30, 40)
assert 200 * 150 * 400 >= WORTH_IT > 20 * 30 * 40
assert multiply_by_onednn() and multiply_by_onednn()
def error(results):
    exact = [a.double().mm(b.double()) for a, b in large]
    return max(float((r - e).abs().max() / e.abs().max()) for r, e in zip(results, exact))
after, by = by_onednn(lambda: [a.mm(b) for a, b in large])
small_after, small_by = by_onednn(lambda: [a.mm(b) for a, b in small])
found = {{
    "by onednn": (by, small_by) == (4, 0),
    "error": [error(before), error(after)],
    "contiguous": all(r.is_contiguous() for r in after),
    "again": all(torch.equal(a.mm(b), r) for (a, b), r in zip(large, after)),
    "small": all(map(torch.equal, small_after, small_before)),
    "empty": list(torch.empty(0, 8).mm(torch.empty(8, 4)).shape),
    "double": error([a.double().mm(b.double()) for a, b in large]) == 0,
    "not finite": bool(torch.full((200, 300), torch.inf).mm(torch.ones(300, 400)).isinf().all()),
}}
""")
    before, after = found.pop("error")
    assert after < 1e-5 > before  # bfloat16 or TF32 in between would cost 1e-3 or more
    assert found.pop("empty") == [0, 4]
    assert all(found.values()), found


@ONEDNN
@pytest.mark.parametrize("budget", ["fast", "max"])
def test_the_reversible_engine_has_the_stock_bits_with_them(budget: str) -> None:
    """Products above the limit, and one below."""
    by, equal, count = answer(f"""
{COUNT}
import copy
from transformers import T5Config, T5ForConditionalGeneration
from bwsk import make_reversible
from bwsk.study.cpu_tuning import multiply_by_onednn
torch.manual_seed(0)
config = T5Config(d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, vocab_size=300, decoder_start_token_id=0)
config._attn_implementation = "eager"
stock = T5ForConditionalGeneration(config).train()
tokens = torch.randint(1, 300, (4, 128))
batch = {{"input_ids": tokens[:, :64], "labels": tokens[:, 64:].contiguous(), "use_cache": False}}
def steps(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    torch.manual_seed(1)
    kept = []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        kept += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    return kept
reversible = copy.deepcopy(stock)
_, without = by_onednn(lambda: steps(copy.deepcopy(stock)))
multiply_by_onednn()
one, conventional = by_onednn(lambda: steps(stock))
make_reversible(reversible, "{budget}", batch=4, input_length=64, target_length=64)
other, again = by_onednn(lambda: steps(reversible))
found = [[without, conventional, again], sum(map(torch.equal, one, other)), len(one)]
""")
    without, conventional, again = by
    assert without == 0
    assert again >= conventional > 90
    assert equal == count > 90


# By what is resident, for the faults that fetch a page cannot be counted on where pages are huge. The bounds are wide:
# the system's own count of resident pages is approximate on a machine of many cores.


@GLIBC
def test_the_heap_keeps_what_was_freed() -> None:
    """MiB that stay after each round of 141 MiB in blocks: glibc alone gives all back, to ask for it again."""
    code = """
from bwsk.memory.available import resident_memory
{settings}
def work():
    blocks = [torch.ones(mib << 18) for mib in (100, 1, 40)]
    while blocks:
        blocks.pop()
    return resident_memory()[0]
start = resident_memory()[0]
found = [work() - start for _ in range(20)]
"""
    kept = "from bwsk.study.cpu_tuning import keep_freed_memory\nassert keep_freed_memory()"
    rounds = answer(code.format(settings=kept))
    assert rounds[0] > 100
    assert rounds[-1] - rounds[9] < 50  # the holes fit by then: what is kept is used
    assert max(answer(code.format(settings=""))) < 50


@GLIBC
def test_a_process_that_can_have_little_more_keeps_nothing() -> None:
    """At its peak it has half of all that it can have, so that a heap full of holes could be too much."""
    keeps, kept = answer("""
import resource
from bwsk.memory.available import resident_memory
from bwsk.study.cpu_tuning import keep_freed_memory
def work():
    torch.ones(200 << 18)
def limit(mib):
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + mib * 2**20, resource.RLIM_INFINITY))
work()
keeps = []
now, most = resident_memory()
for mib in (2 * most - now + 50, 2 * most - now - 50, 2 * most - now + 50, 2 * most - now - 50):
    limit(int(mib))
    keeps.append(keep_freed_memory())
before = resident_memory()[0]
work()
found = [keeps, resident_memory()[0] - before]
""")
    assert keeps == [True, False, True, False]
    assert kept < 50


@GLIBC
def test_holes_in_the_heap_are_given_back() -> None:
    """Large blocks that are freed between small ones that stay."""
    start, kept, after = answer("""
from bwsk.memory.available import resident_memory
from bwsk.study.cpu_tuning import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
found = [resident_memory()[0]]
blocks = [torch.ones(mib << 18) for _ in range(10) for mib in (40, 1)]
del blocks[::2]
found.append(resident_memory()[0])
give_back_freed_memory()
found.append(resident_memory()[0])
""")
    assert kept > start + 350
    assert after < start + 100
