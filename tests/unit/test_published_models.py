"""The published censuses of all 17 models, and where the installed classes differ from those that were counted.

`published_models.json` holds, by model, its config (the fields that shape it, as on the Hub), the published counts
(results files of github.com/tzervas/ai-s-combinator at b6773a7) and what ours differ by, as classes with the rows that
they add or take away. ResNet-50, EfficientNet-B0 and MobileNetV2 were torchvision's.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bwsk import classify
from bwsk.classification.census import Census

HERE = Path(__file__).parent
MODELS = json.loads((HERE / "published_models.json").read_text(encoding="utf-8"))
DOCS = HERE.parents[1] / "docs" / "classification.md"
RESULTS = HERE.parents[2] / "shared" / "published" / "all-models.json"
TORCHVISION = {"efficientnet-b0": "efficientnet_b0", "mobilenetv2": "mobilenet_v2", "resnet50": "resnet50"}


def _census(name: str) -> Census:
    fields = MODELS[name]["config"]
    return classify(CONFIG_MAPPING[fields["model_type"]].from_dict(fields))


def _counts(census: Census) -> Counter[str]:
    return Counter({"S": census.s, "K": census.k, "GRAY": census.gray})


def _cells(counts: dict[str, int]) -> str:
    return f"{counts['S']} / {counts['K']} / {counts['GRAY']}"


@pytest.mark.parametrize("name", MODELS)
def test_counts(name: str) -> None:
    """Ours are the published ones but for the rows of the classes that are named, and the docs say so."""
    published, differences = MODELS[name]["published"], MODELS[name]["difference"]
    census = _census(name)
    expected = Counter(published)
    for change in differences.values():
        expected.update(change)
    assert _counts(census) == expected
    rows = Counter((row.cls, row.verdict) for row in census.rows)
    for cls, change in differences.items():
        assert all(rows[cls, verdict] >= n for verdict, n in change.items())

    (line,) = [row for row in DOCS.read_text(encoding="utf-8").splitlines() if row.startswith(f"| {name} |")]
    _, _, theirs, ours, why, _ = (cell.strip() for cell in line.split("|"))
    assert (theirs, ours) == (_cells(published), _cells(expected))
    assert bool(why) == bool(differences)
    for cls, change in differences.items():
        assert f"`{cls}`" in why
        assert all(str(abs(n)) in why for n in change.values())


def test_most_models_are_as_published() -> None:
    assert len(MODELS) == 17
    assert sum(not model["difference"] for model in MODELS.values()) == 10


@pytest.mark.skipif(not RESULTS.is_file(), reason="needs the publication's figures in ../shared/published")
def test_the_published_figures_are_the_publications() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["models"]
    assert MODELS.keys() == results.keys()
    for name, model in MODELS.items():
        census = dict(results[name]["census"])
        assert census.pop("modules") == sum(model["published"].values())
        assert census == model["published"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_counts_of_torchvisions_classes(name: str) -> None:
    """Those that were counted: as published, but that stochastic depth is dropout, or does nothing at rate 0."""
    models = pytest.importorskip("torchvision.models", reason="needs torchvision, whose models were counted")
    with torch.device("meta"):
        model = getattr(models, TORCHVISION[name])(num_classes=10)
    census = classify(model)
    expected = Counter(MODELS[name]["published"])
    if name == "efficientnet-b0":
        expected.update({"GRAY": -16, "K": 15, "S": 1})
        found = Counter(row.verdict for row in census.rows if row.cls == "StochasticDepth")
        assert found == {"K": 15, "S": 1}
    assert _counts(census) == expected
