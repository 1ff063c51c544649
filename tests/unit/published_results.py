"""A results.json as the published study would have it, with the published figures as ours; for rules and for layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bwsk.study import publication
from bwsk.study.claims import judge
from bwsk.study.comparability import differences
from bwsk.study.params import Params, load_params
from bwsk.study.results import COLUMNS

ROOT = Path(__file__).parents[2]
SHA = "0" * 64
GPU = "NVIDIA GeForce RTX 3090 Ti"


def published_params(**sections: dict[str, Any]) -> Params:
    """The root params.yaml, with changes by section."""
    values = load_params(ROOT / "params.yaml").model_dump()
    for section, changed in sections.items():
        values[section] = {**values[section], **changed}
    return Params.model_validate(values)


def published_results(params: Params) -> dict[str, Any]:
    """Without the claims; see `with_claims`."""
    counts = {"train": 2_838_000, "validation": 297_000, "test": 340_000}
    tokens = {
        split: {
            "rows": rows,
            "bytes": 4 * counts[split],
            "n_tokens": counts[split],
            "n_blocks": 5_542 if split == "train" else counts[split] // 512,
            "n_windows": (counts[split] - 512) // 128,
            "sha256": SHA,
            "unigram_perplexity": None if split == "train" else 1_000.0,
        }
        for split, rows in publication.ROWS.items()
    }
    return {
        "study": params.study.model_dump(),
        "comparable": True,
        "differences": [],
        "parameters": params.model_dump(mode="json"),
        "census": {
            "rules": "published",
            "s": publication.S_MODULES,
            "k": publication.K_MODULES,
            "gray": 0,
            "total": publication.LEAF_MODULES,
            "s_ratio": publication.S_MODULES / publication.LEAF_MODULES,
            "k_ratio": publication.K_MODULES / publication.LEAF_MODULES,
            "strict": {"s": 122, "k": 68, "gray": 0, "total": 190, "s_ratio": 122 / 190, "k_ratio": 68 / 190},
        },
        "corpus": {
            "name": publication.DATASET_ID,
            "source": "hub",
            "splits": {
                split: {key: figures[key] for key in ("rows", "bytes", "sha256")} for split, figures in tokens.items()
            },
        },
        "tokens": {
            "dtype": "uint16",
            "vocab_size": 32_100,
            "tokenizer_sha256": SHA,
            "splits": tokens,
        },
        "base": {
            "name": publication.BASE_ID,
            "source": "hub",
            "sha256": SHA,
            "config_sha256": SHA,
            "parameters": publication.PARAMETERS,
        },
        "variants": {name: _variant(name) for name in params.variant_names},
        "memory_saving": {init: _saving(init) for init in params.variants.inits},
    }


def with_claims(params: Params, results: dict[str, Any]) -> dict[str, Any]:
    """As `bwsk.study.results` completes what it has gathered."""
    differing = [difference.text for difference in differences(params, results)]
    comparable = params.study.published is not None and not differing
    return {**results, "comparable": comparable, "differences": differing, "claims": judge(params, results)}


def _variant(name: str) -> dict[str, Any]:
    published = publication.VARIANTS[name]
    init, _, mode = name.partition("-")
    steps = publication.STEPS_ONLY_S["bwsk-reversible" if mode == "bwsk-reversible" else "conventional"]
    figures = {**dict.fromkeys(COLUMNS), **vars(published)}
    median = steps / 300 * 1000
    figures |= {"step_time_ms": median, "step_time_q1_ms": 0.99 * median, "step_time_q3_ms": 1.02 * median}
    figures |= {"early_stopped": published.total_steps < 13_860, "nan_count": 0}
    evaluation = {
        split: {
            "published_perplexity": value,
            "token_perplexity": value,
            "bits_per_byte": 1.2,
            "nll_per_token": 3.4,
            "n_windows": 2_000,
            "n_target_tokens": 148_000,
        }
        for split, value in (("validation", published.best_val_metric), ("test", published.test_metric))
    }
    versions = {"python": "3.11", "torch": "2.10", "transformers": "5.5"}
    provenance = {"seed": 0, "precision": "fp16", "device": GPU, "versions": versions, "weights_sha256": SHA}
    return {"init": init, "mode": mode, **figures, "evaluation": evaluation, "provenance": provenance}


def _saving(init: str) -> dict[str, float | None]:
    full, reduced = (
        publication.VARIANTS[f"{init}-{mode}"].peak_memory_mb for mode in ("conventional", "bwsk-reversible")
    )
    return {"measured": 1 - reduced / full, "predicted": None}
