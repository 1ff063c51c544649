"""Censuses of real architectures: the published figures, other families, and modules told by what they compute."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BertConfig,
    ConvNextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    ResNetConfig,
    T5Config,
    ViTConfig,
)

from bwsk import classify
from bwsk.architecture import build
from bwsk.classification.census import Census
from bwsk.classification.identify import identify
from bwsk.classification.rules.rule import RuleSet
from bwsk.classification.rules.sets import rule_set
from bwsk.errors import BwskError

T5_SMALL = T5Config(d_model=512, d_ff=2048, d_kv=64, num_layers=6, num_heads=8, vocab_size=32128)
PUBLISHED = {  # model: S, K (model card, PROTOCOL)
    "T5ForConditionalGeneration": (T5_SMALL, 134, 56),
    "BertForMaskedLM": (BertConfig(), 103, 50),
    "GPT2LMHeadModel": (GPT2Config(), 76, 49),
}


def _counts(census: Census) -> tuple[int, int, int]:
    return census.s, census.k, census.gray


def _verdicts(census: Census, kind: str) -> set[str]:
    return {row.verdict for row in census.rows if row.kind == kind}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures_come_out_exactly(name):
    config, s, k = PUBLISHED[name]
    census = classify(config)
    assert census.model == name
    assert _counts(census) == (s, k, 0)
    assert census.total == s + k


def test_published_shares():
    shares = [classify(PUBLISHED[name][0]) for name in PUBLISHED]
    assert [f"{100 * c.s_ratio:.1f} {100 * c.k_ratio:.1f}" for c in shares] == ["70.5 29.5", "67.3 32.7", "60.8 39.2"]


def test_every_published_rule_in_use_is_needed_for_the_figures():
    """Deleting any published rule that these models touch changes a published figure."""
    models = [build(config) for config, _, _ in PUBLISHED.values()]
    before = [_counts(classify(model)) for model in models]
    used = {row.kind for model in models for row in classify(model).rows}
    assert used == {"linear", "embedding", "layer_norm", "rms_norm", "relu", "gelu", "dropout"}
    for kind in used:
        mutant = RuleSet("published", opinion=True)
        mutant.rules = {k: cases for k, cases in rule_set("published").rules.items() if k != kind}
        assert [_counts(classify(model, mutant)) for model in models] != before


def test_t5_small_strict_differs_by_its_contracting_projections_only():
    published, strict = classify(T5_SMALL), classify(T5_SMALL, "strict")
    assert _counts(strict) == (122, 68, 0)
    (difference,) = published.differences(strict)
    assert (difference["kind"], difference["count"], difference["published"], difference["strict"]) == (
        "linear",
        12,
        "S",
        "K",
    )
    changed = [row.name for row in strict.rows if row.kind == "linear" and row.verdict == "K"]
    assert len(changed) == 12
    assert all(name.endswith("DenseReluDense.wo") for name in changed)


def test_strict_dropout_passes_through_in_eval():
    assert _counts(classify(T5_SMALL, "strict", training=False)) == (166, 24, 0)
    assert _counts(classify(T5_SMALL, "published", training=False)) == (134, 56, 0)


def test_batch_norm_depends_on_the_mode_in_the_published_rules():
    config = ResNetConfig()
    training, evaluation = classify(config), classify(config, training=False)
    assert _verdicts(training, "batch_norm") == {"K"}
    assert _verdicts(evaluation, "batch_norm") == {"S"}
    assert evaluation.s - training.s == sum(row.kind == "batch_norm" for row in training.rows) == 53


def test_strides():
    published = classify(ResNetConfig())
    strided = [row for row in published.rows if row.kind == "convolution" and row.verdict == "K"]
    assert len(strided) == 7
    assert all(set(row.facts["stride"]) == {2} for row in strided)
    patches = [row for row in classify(ViTConfig(), "strict").rows if row.kind == "convolution"]
    assert [row.verdict for row in patches] == ["S"]  # 768 channels hold a patch of 3 x 16 x 16
    narrow = ViTConfig(hidden_size=192, num_attention_heads=3)
    assert _verdicts(classify(narrow, "strict"), "convolution") == {"K"}  # 192 do not


def test_state_space_models_do_have_k_type_operations():
    """The publication's table misses transformers' SiLUActivation and reports none."""
    census = classify(MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=64))
    activations = [row for row in census.rows if row.cls == "SiLUActivation"]
    assert len(activations) == 2
    assert {row.kind for row in activations} == {"silu"}
    assert census.k == 2
    assert any("A_log" in name for name in census.outside)


def test_mixture_of_experts_routers_are_k_and_expert_weights_are_said_to_be_unseen():
    config = MixtralConfig(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    for rules in ("published", "strict"):
        census = classify(config, rules)
        assert _verdicts(census, "routing") == {"K"}
        assert sum(row.kind == "routing" for row in census.rows) == 2
        assert census.gray == 0
        assert any("experts" in name for name in census.outside)


def test_norms_and_drop_paths_of_other_families_are_told_by_behaviour():
    llama = LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=64)
    kinds = {row.cls: row.kind for row in classify(llama).rows}
    assert kinds["LlamaRMSNorm"] == "rms_norm"
    assert kinds["LlamaRotaryEmbedding"] == "position"
    census = classify(ConvNextConfig(drop_path_rate=0.5))
    kinds = {row.cls: row.kind for row in census.rows}
    assert kinds["ConvNextLayerNorm"] == "layer_norm"
    assert any(row.cls == "ConvNextDropPath" and row.kind == "dropout" for row in census.rows)


# --- what a module computes, not what it is called -----------------------------------------------------------------


class Relu(nn.Module):  # named like one thing ...
    def forward(self, x):
        return F.silu(x)  # ... and computing another


class Impostor(nn.Linear):
    """A linear layer by class, an absolute value by behaviour."""

    def forward(self, x):
        return x.abs()


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt() * self.gamma


class Noise(nn.Module):
    def forward(self, x):
        return x * (torch.rand_like(x) > 0.3) / 0.7


class Opaque(nn.Module):
    def forward(self, x, y, z):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (Relu(), "silu"),
        (Impostor(4, 4), "erasing_elementwise"),
        (Scale(6), "rms_norm"),
        (Noise(), "dropout"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.Mish(), "erasing_elementwise"),
        (nn.ELU(), "injective_elementwise"),
        (nn.PReLU(), "injective_elementwise"),
        (nn.Softmax(-1), "softmax"),
        (nn.LogSoftmax(-1), "softmax"),
        (nn.GELU("tanh"), "gelu"),
        (nn.Tanhshrink(), "injective_elementwise"),
        (Opaque(), "unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_kind(module, kind):
    assert identify(module).kind == kind


class Of(nn.Module):
    """A leaf that computes a given function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def _written(x):
    buffer = torch.zeros_like(x)
    buffer[...] = x
    return buffer.flip(-1).abs()


def _coupling(x, function=torch.tanh):
    a, b = x.chunk(2, -1)
    return torch.cat([a, b + function(a)], -1)


@pytest.mark.parametrize(
    ("module", "kind", "verdict"),
    [
        # rows that look normalised, and are not
        (Of(lambda x: x.argsort(-1).argsort(-1).double()), "composite", "K"),
        (Of(lambda x: (x > x.mean(-1, keepdim=True)).double()), "composite", "K"),
        (Of(lambda x: F.normalize(x.abs(), dim=-1)), "composite", "GRAY"),
        (Of(lambda x: F.normalize(x.relu(), dim=-1)), "composite", "K"),
        (Of(lambda x: F.normalize(x, dim=-1)), "rms_norm", "S"),
        (Of(lambda x: F.one_hot(x.argmax(-1), x.shape[-1]).double()), "routing", "K"),
        (nn.Softmin(-1), "softmax", "S"),
        (nn.Softmax2d(), "softmax", "S"),
        # each operator preserves, and a part is left out
        (Of(lambda x: x.chunk(2, -1)[0].exp()), "composite", "K"),
        (Of(lambda x: x.sort(-1).values), "composite", "GRAY"),
        (Of(lambda x: x.sort(-1)), "composite", "S"),
        # an operator erases, and there is a way around it
        (Of(lambda x: torch.cat([x, x.relu()], -1)), "composite", "S"),
        (Of(lambda x: x - x.mean(-1, keepdim=True)), "composite", "S"),
        (Of(lambda x: x.mean(-1, keepdim=True).expand_as(x)), "composite", "K"),
        (Of(_written), "composite", "GRAY"),
        (Of(lambda x: (x + torch.randn_like(x)).flip(0)), "composite", "S"),
        # neither a way around what erases, nor evidence that anything is gone: a rotation by halves is a bijection
        (Of(lambda x: torch.cat([x[..., 1:], x[..., :1]], -1)), "composite", "GRAY"),
        (Of(lambda x: x.exp().flip(-1).relu()), "composite", "GRAY"),
        (Of(lambda x: x.flip(-1) + x), "composite", "K"),
        (Of(_coupling), "composite", "S"),
        (Of(lambda x: _coupling(x, lambda a: F.dropout(a, 0.5))), "composite", "GRAY"),
        # what follows depends on the data
        (Of(lambda x: float(x.sum()) * x), "unknown", "GRAY"),
        (Of(lambda x: x.flip(-1) if x.sum() > 0 else x), "unknown", "GRAY"),
        (Of(lambda x: torch.round(x * 1000) / 1000), "erasing_elementwise", "K"),
        # looks like something else between -8 and 8
        (nn.Hardtanh(-10, 10), "erasing_elementwise", "K"),
        (Of(lambda x: F.leaky_relu(x, 0.1).clamp(-50, 50)), "erasing_elementwise", "K"),
        (nn.LeakyReLU(-1.0), "erasing_elementwise", "K"),
        (nn.Softplus(1, 1), "erasing_elementwise", "K"),
        (nn.Tanhshrink(), "injective_elementwise", "S"),
        (nn.RReLU(), "composite", "GRAY"),  # random, and no dropout
        # shapes
        (nn.ZeroPad2d((0, 0, 1, -1)), "composite", "K"),
        (nn.ZeroPad2d((-4, 5, 0, 0)), "composite", "K"),
        (nn.ZeroPad2d((1, 2, 0, 0)), "composite", "S"),
        (nn.Upsample(scale_factor=0.5), "upsample", "K"),
        (nn.Upsample(scale_factor=1.1), "upsample", "GRAY"),
        (nn.Upsample(size=4), "upsample", "GRAY"),
        (nn.Upsample(scale_factor=2), "upsample", "S"),
        (nn.AvgPool2d(1), "identity", "S"),
        (nn.MaxPool2d(1, 2), "pooling", "K"),
        (nn.AvgPool2d(3, 1, 1), "pooling", "GRAY"),
        (nn.Conv1d(1, 512, 10, stride=5), "convolution", "S"),
        (nn.Conv1d(1, 2, 2, stride=2, padding=1, dilation=2), "convolution", "K"),
        (nn.Conv1d(1, 1, 2, padding=1, dilation=2), "convolution", "GRAY"),
        (nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1), "transposed_convolution", "S"),
    ],
)
def test_strict_verdict_of_a_leaf(module, kind, verdict):
    (row,) = classify(module, "strict").rows
    assert (row.kind, row.verdict) == (kind, verdict)


def test_what_was_found_for_one_leaf_does_not_pass_to_another_with_other_functions():
    kinds = [row.kind for row in classify(nn.Sequential(Of(F.relu), Of(torch.exp), Of(F.relu))).rows]
    assert kinds == ["relu", "injective_elementwise", "relu"]


def test_a_parametrised_layer_is_one_leaf():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3, padding=1))
    (row,) = classify(nn.Sequential(layer), "strict").rows
    assert (row.name, row.kind, row.verdict, row.parameters) == ("0", "convolution", "S", 4 * 4 * 3 + 4 + 4)


def test_a_layer_without_shapes_is_refused():
    with pytest.raises(BwskError, match=r"0\.weight has no shape yet"):
        classify(nn.Sequential(nn.LazyLinear(3)))


def test_tables_with_a_forward_of_their_own_are_told_at_any_size():
    tiny = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
    for config in (BartConfig(**tiny), BartConfig(**tiny | {"d_model": 256}, scale_embedding=True)):  # 13 M numbers
        census = classify(config)
        assert census.gray == 0
        kinds = {(row.cls, row.kind) for row in census.rows}
        assert {("BartScaledWordEmbedding", "embedding"), ("BartLearnedPositionalEmbedding", "position")} <= kinds


class Wide(nn.Linear):
    """A linear layer with a forward of its own and more numbers than are probed."""

    def forward(self, x):
        return F.linear(x, self.weight) + self.bias


def test_a_layer_too_large_to_run_is_told_by_its_operators():
    with torch.device("meta"):
        layers = nn.Sequential(Wide(4096, 8192), Wide(8192, 4096))
    assert [(row.kind, row.verdict) for row in classify(layers, "strict").rows] == [("linear", "S"), ("linear", "K")]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_probing_changes_nothing(device):
    module = Scale(6).to(device)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    weight = module.gamma
    identify(module)
    assert torch.equal(before, torch.get_rng_state())
    assert module.gamma is weight
    assert identify(nn.Sequential(Noise())[0]).kind == "dropout"
    assert torch.equal(before, torch.get_rng_state())


class Counting(nn.Module):
    """Counts its calls and keeps a mask of the last input's shape, as attention layers do."""

    def __init__(self):
        super().__init__()
        self.calls, self.mask = [], None
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.calls.append(x.shape)
        self.mask = torch.ones_like(x)
        self.register_buffer("last", x)
        self.seen += 1
        return 2 * x.exp()


def test_probing_leaves_no_trace_in_the_module():
    module, called = Counting(), []
    module.register_forward_hook(lambda *_: called.append(1))
    assert identify(module).kind == "injective_elementwise"
    assert (module.calls, module.mask, called, list(dict(module.named_buffers()))) == ([], None, [], ["seen"])
    assert module.seen == 0


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (42, "int: not a model"),
        (None, "NoneType: not a model"),
        pytest.param(
            nn.Sequential(nn.GELU()),
            "TorchScript",
            marks=pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
        ),
    ],
)
def test_what_is_no_model_is_one_line(source, what):
    if what == "TorchScript":
        source = torch.jit.script(source)
    with pytest.raises(BwskError, match=what):
        classify(source)


def test_a_weight_that_is_not_finite_has_no_rank():
    layer = nn.Linear(4, 4)
    layer.weight.data[0, 0] = torch.nan
    with pytest.raises(BwskError, match="0: its weight is not finite"):
        classify(nn.Sequential(layer), "strict", ranks=True)


def test_unknown_modules_are_gray_and_named():
    census = classify(nn.Sequential(nn.Linear(2, 2), Opaque()))
    assert _counts(census) == (1, 0, 1)
    assert census.unknown() == ["1 (Opaque)"]
    assert census.rows[1].residue is None


def test_containers_without_children_are_no_operations():
    assert classify(nn.Sequential(nn.Linear(2, 2), nn.ModuleList())).total == 1
    empty = classify(nn.ModuleList())
    assert empty.total == 0
    assert empty.s_ratio is None


def test_measured_ranks_overrule_the_assumption():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight[0] = layer.weight[1]
    assert classify(layer, "strict").k == 0
    assert classify(layer, "strict", ranks=True).k == 1
    assert classify(nn.Linear(4, 4), "strict", ranks=True).k == 0


def test_the_mode_of_a_module_is_its_own():
    module = nn.Dropout(0.1)
    assert classify(module, "strict").k == 1
    assert classify(module.eval(), "strict").k == 0
    with pytest.raises(BwskError, match="eval mode"):
        classify(module, training=True)


def test_the_census_is_strict_json_and_complete(tmp_path):
    T5Config(**{"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}).save_pretrained(tmp_path)
    census = classify(tmp_path / "config.json")
    value = json.loads(json.dumps(census.to_dict(), allow_nan=False))
    assert value["s"] + value["k"] + value["gray"] == value["total"] == len(value["rows"])
    assert {"name", "class", "kind", "verdict", "reason"} <= set(value["rows"][0])
    assert sum(group["count"] for group in value["by_kind"]) == value["total"]
    assert value["rules"] == "published"


def test_unknown_rule_set_is_refused():
    with pytest.raises(BwskError, match="no such rule set"):
        classify(nn.Linear(1, 1), "lenient")


def test_the_families_of_the_docs_are_what_the_rules_give():
    """docs/classification.md holds the table that bench/classify.py prints."""
    root = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location("bench_classify", root / "bench" / "classify.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    text = (root / "docs" / "classification.md").read_text(encoding="utf-8")
    for row in bench.table():
        published, strict = (" / ".join(map(str, row[key])) for key in ("published", "strict"))
        share = f"{100 * row['strict_eval'][0] / row['modules']:.1f} % |"
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['family']} | {row['class']} |")]
        assert f"| {row['modules']} | {published} |" in line
        assert f"| {strict} |" in line
        assert line.endswith(share)
