"""The files of a finished model repository: `results/` of a study, as published, plus the plots of its card."""

from __future__ import annotations

from pathlib import Path

RESULTS = "results.json"
CARD = "README.md"
PLOTS = ("loss.png", "perplexity.png", "memory_and_time.png")  # in figures/
WEIGHTS = "model.safetensors"
SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
VARIANT = (WEIGHTS, *SETTINGS, "training_results.json")
# Beside the package, not in it: rules, schemas and templates belong to the workflow and come with the checkout.
WORKFLOW = Path(__file__).resolve().parents[2] / "workflow"
TEMPLATE = WORKFLOW / "templates" / "model_card.md.j2"


def repository_files(variants: list[str]) -> set[Path]:
    """All files of the repository of a study with these variants, relative to `results/`."""
    shared = {Path(RESULTS), Path(CARD), *(Path("figures") / name for name in PLOTS)}
    return shared | {Path(variant) / name for variant in variants for name in VARIANT}
