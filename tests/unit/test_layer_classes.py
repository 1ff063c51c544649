"""Every norm, position and embedding class of the installed transformers is told by what it computes."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models
from torch import Tensor, nn
from torch.nn import functional as F

from bwsk import classify
from bwsk.classification.identify import identify

# What stays GRAY under the published rules, and why.
GRAY = {
    "two activations are multiplied, of which the published table does not speak (strictly K)": """
        BailingHybridRMSNormGated BambaRMSNormGated FalconH1RMSNormGated Glm5NextTextRMSNormGated
        GraniteMoeHybridRMSNormGated KimiLinearRMSNormGated LaraMiniRMSNormGated MambaRMSNormGated NemotronHRMSNormGated
        OlmoHybridRMSNormGated Qwen3NextRMSNormGated Qwen3_5MoeRMSNormGated Qwen3_5RMSNormGated Qwen4ExpTextRMSNormGated
        Zamba2RMSNormGated PeAudioMaskedGroupNorm PeAudioVideoMaskedGroupNorm PeVideoMaskedGroupNorm""",
    "no norm: returns one over the scale, and not the row": "HYV4UnweightedRMSNorm HYV4VLUnweightedRMSNorm",
    "no norm of a row: mean and scale are those of all steps so far": "Gemma3nAudioCumulativeGroupNorm",
    "two norms, each with an input of its own": "ZayaQKNorm",
    "takes rows by head and returns them joined": "xLSTMMultiHeadLayerNorm",
    "no code of places: a function of coordinates or times that are data": """
        BrosPositionalEmbedding1D EdgeTamPositionalEmbedding EdgeTamVideoPositionalEmbedding SamHQPositionalEmbedding
        SamPositionalEmbedding Sam2PositionalEmbedding Sam2VideoPositionalEmbedding Sam3TrackerPositionalEmbedding
        Sam3TrackerVideoPositionalEmbedding DabDetrSinePositionEmbedding EsmFold2RotaryEmbedding
        MusicFlamingoRotaryEmbedding SinusPositionEmbedding""",
    "no table of its own: resizes one that it is given (in transformers 5.17 the second too)": """
        InterpolateInitialPositionEmbeddings InterpolateMidPositionEmbeddings""",
    "a table interpolated to grids that it is given, added to the activation": "Kimi_K25VisionPositionEmbeddings",
    "buckets of two positions and two segments": "CpmAntSegmentPositionEmbedding",
    "computed sines, for inputs of its model only (an image with a mask, a grid of numbers)": """
        DFineSinePositionEmbedding Deimv2SinePositionEmbedding GroundingDinoSinePositionEmbedding
        MMGroundingDinoSinePositionEmbedding PPDocLayoutV2SinePositionEmbedding PPDocLayoutV3SinePositionEmbedding
        PPDocLayoutV4SinePositionEmbedding RTDetrSinePositionEmbedding RTDetrV2SinePositionEmbedding
        TableTransformerSinePositionEmbedding PerceiverFourierPositionEncoding DINOv3ViTRopePositionEmbedding
        EomtDinov3RotaryEmbedding Sapiens2RopePositionEmbedding""",
    "rotations in sections that the default config leaves out": """
        Glm4vMoeTextRotaryEmbedding Glm4vTextRotaryEmbedding GlmImageTextRotaryEmbedding HunYuanVLRotaryEmbedding""",
    "computed sines, no parameter or buffer, so that a meta device holds none": "TrOCRSinusoidalPositionalEmbedding",
    "computed sines in a buffer too large to stand in for": "Wav2Vec2BertRelPositionalEmbedding",
}
UNBUILT = {  # no config of defaults makes one; the last three in transformers 5.17 alone
    "CohereCompassRotaryEmbedding", "DbrxNormAttentionNorm", "FastSpeech2ConformerRelPositionalEncoding",
    "TimesFm2_5PositionalEmbedding",
    "EsmFoldRelativePosition", "PeAudioVideoEncoderRotaryEmbedding", "PeVideoEncoderRotaryEmbedding",
}  # fmt: skip
ARGUMENTS: dict[str, dict[str, Any]] = {  # where numbers of 8 will not do
    "BitGroupNormActivation": {"num_channels": 32},
    "ChameleonLayerNorm": {"hidden_size": (4, 8)},
    "Data2VecVisionRelativePositionBias": {"window_size": (3, 3)},
    "DINOv3ConvNextLayerNorm": {"normalized_shape": 8},
    "Emu3VQVAEGroupNorm": {"num_groups": 2, "num_channels": 8},
    "Emu3VQVAESpatialNorm": {"in_channels": 32, "out_channels": 32},
    "Gemma3nAudioCumulativeGroupNorm": {"feature_dims": (3,)},
    "OmniASRLayerNormConvLayer": {"layer_id": 1},
    "SwinRelativePositionBias": {"window_size": (3, 3)},
}
NAMED = re.compile(r"Norm(?!alEstimation)|Position|Rotary")
NOT_LAYERS = re.compile(r"PreTrained|RobertaPreLayerNorm|^RelativePositionBias")


def _classes() -> Iterator[type[nn.Module]]:
    for file in sorted(Path(transformers.models.__file__).parent.glob("*/modeling_*.py")):
        name = f"transformers.models.{file.parent.name}.{file.stem}"
        try:
            module = importlib.import_module(name)
        except ImportError:  # needs a package of its own (torchaudio)
            continue
        for cls in vars(module).values():
            if not (inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == name):
                continue
            named = NAMED.search(cls.__name__) and not NOT_LAYERS.search(cls.__name__)
            if (named or issubclass(cls, nn.Embedding)) and not inspect.isabstract(cls):
                yield cls


def _configs(cls: type[nn.Module], annotation: Any) -> Iterator[Any]:
    """Default configs: the one that the class names, then all that its file knows, with those inside of them."""
    known = vars(sys.modules[cls.__module__])
    named = re.findall(r"\w+Config", str(annotation))
    for name in [*named, *(n for n in known if n.endswith("Config") and n.lower() != "pretrainedconfig")]:
        try:
            config = known[name]()
        except Exception:  # a config without defaults, or of parts
            continue
        yield config
        yield from (getattr(config, part, None) for part in getattr(config, "sub_configs", ()))


def _value(name: str) -> Any:
    values = {"padding_idx": 1, "eps": 1e-6, "scale": 2.0, "dropout": 0.1, "groups": 2}
    sized = re.search("max_pos|num_embed|num_pos", name)
    return next((value for part, value in values.items() if part in name), 16 if sized else 8)


def _built(cls: type[nn.Module]) -> nn.Module:
    parameters = inspect.signature(cls.__init__).parameters
    own = ARGUMENTS.get(cls.__name__, {})
    given, configs = dict(own), []
    for name, parameter in itertools.islice(parameters.items(), 1, None):
        if name in own or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name.endswith("config"):
            configs.append((name, list(_configs(cls, parameter.annotation))))
        elif parameter.default is parameter.empty or name in ("padding_idx", "hidden_size", "dim"):
            given[name] = _value(name)
    problem: Exception = LookupError("no config")
    for combination in itertools.product(*([(name, c) for c in found] for name, found in configs)):
        try:
            with torch.device("meta"):
                return cls(**given, **dict(combination))
        except Exception as error:
            problem = error
    raise problem


def test_every_class_is_told_or_said_why_not() -> None:
    gray, unbuilt, kinds = {}, set(), Counter()
    for cls in _classes():
        try:
            layer = _built(cls)
        except Exception:
            unbuilt.add(cls.__name__)
            continue
        if [*layer.children()]:  # its parts are the leaves
            continue
        (row,) = classify(layer).rows
        kinds[row.kind] += 1
        if row.verdict == "GRAY":
            gray[cls.__name__] = row.kind
    expected = {name for names in GRAY.values() for name in names.split()}
    # Sets differ with the installed version, so a class that it lacks is no fault.
    assert gray.keys() <= expected, {name: kind for name, kind in gray.items() if name not in expected}
    assert unbuilt <= UNBUILT
    assert all(kinds[kind] > 20 for kind in ("rms_norm", "layer_norm", "position", "embedding"))


# --- what is not what its name says ----------------------------------------------------------------------------------


class LearnedPositionalEmbedding(nn.Embedding):
    """A table fed a mask, as OPT's; `change` is what becomes of the positions."""

    def __init__(self, rows: int, width: int, change: Callable[[Tensor], Tensor] = lambda p: p) -> None:
        super().__init__(rows, width)
        self.change = change

    def forward(self, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(1) * mask - 1).long()
        return super().forward(self.change(positions) + 2)


class ScaledWordEmbedding(nn.Embedding):
    """A table of which one row is put elsewhere; `change` is what becomes of the tokens."""

    def __init__(self, rows: int, width: int, change: Callable[[Tensor], Tensor] = lambda p: p) -> None:
        super().__init__(rows, width)
        self.change, self.extra = change, nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor) -> Tensor:
        rows = super().forward(self.change(tokens)) * 3
        rows[tokens == 7] = self.extra
        return rows


class RotaryEmbedding(nn.Module):
    """Cosines and sines of an activation, or of no position at all."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = self.function(x, positions[..., None].double()).expand(*positions.shape, 8)
        return angles.cos(), angles.sin()


class GatedNorm(nn.Module):
    """An RMS norm that may be given a gate."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * F.silu(gate)
        return x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()


class HeadNorm(nn.Module):
    """Layer norm of each head, with a scale for each feature of each head."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * self.weight


class PartsNorm(nn.Module):
    """Each half of a row over a root mean square of its own (`other`: over that of the other half)."""

    def __init__(self, other: bool = False) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.ones(8)), other

    def forward(self, x: Tensor) -> Tensor:
        halves = x.unflatten(-1, (2, 4))
        scale = halves.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
        return (halves / (scale.flip(-2) if self.other else scale)).flatten(-2) * self.weight


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (lambda: LearnedPositionalEmbedding(2050, 1024), "position"),
        (lambda: LearnedPositionalEmbedding(2050, 16384), "position"),  # more numbers than are stood in for
        (lambda: LearnedPositionalEmbedding(32, 8, lambda p: p // 2), "composite"),  # one row for two places
        (lambda: LearnedPositionalEmbedding(32, 8, lambda p: 0 * p), "composite"),
        (lambda: ScaledWordEmbedding(32, 8), "embedding"),
        (lambda: ScaledWordEmbedding(32000, 2048), "embedding"),
        (lambda: ScaledWordEmbedding(32, 8, lambda t: t.clamp(max=30)), "composite"),  # one row for two tokens
        (lambda: ScaledWordEmbedding(32, 8, lambda t: t.sort(-1).values), "composite"),
        (lambda: RotaryEmbedding(lambda x, p: p), "position"),
        (lambda: RotaryEmbedding(lambda x, p: p + x.mean()), "unknown"),
        (lambda: RotaryEmbedding(lambda x, p: p + 0 * x.mean()), "unknown"),  # reads the activation, to no effect
        (lambda: RotaryEmbedding(lambda x, p: 0 * p), "unknown"),
        (lambda: RotaryEmbedding(lambda x, p: p + torch.rand(())), "unknown"),
        (GatedNorm, "merge"),
        (lambda: HeadNorm(4, 8), "layer_norm"),
        (PartsNorm, "rms_norm"),
        (lambda: PartsNorm(other=True), "composite"),
    ],
)
def test_a_name_tells_nothing(layer: Callable[[], nn.Module], kind: str) -> None:
    with torch.device("meta"):
        module = layer()
    assert identify(module).kind == kind
