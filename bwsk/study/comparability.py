"""How a study differs from the published one, by its parameters and by the records of its steps.

Each difference belongs to an aspect (model, data, recipe, device). A published claim can be judged if the study matches
the publication in every aspect that the claim depends on. Local copies of the published inputs count as the published
ones if their sizes match: rows of the corpus, training blocks, parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from bwsk.study import publication
from bwsk.study.params import (
    DirectoryBase,
    DirectoryCorpus,
    DirectoryTokenizer,
    HubBase,
    HubCorpus,
    HubTokenizer,
    Params,
)

Aspect = Literal["model", "data", "recipe", "device"]
Results = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One difference between a study and the published one."""

    aspect: Aspect
    text: str


def differences(params: Params, results: Results) -> list[Difference]:
    """All differences between the study and the published one; empty if there are none."""
    return [*_model_differences(params, results), *_data_differences(params, results), *_recipe(params, results)]


def _model_differences(params: Params, results: Results) -> Iterator[Difference]:
    wanted = f"{publication.BASE_ID} at {publication.BASE_REVISION[:8]}"
    match params.base:
        case HubBase(id=name, revision=revision):
            if (name, revision) != (publication.BASE_ID, publication.BASE_REVISION):
                yield Difference("model", f"base is {name} at {revision[:8]}, published {wanted}")
        case DirectoryBase(id=name):
            # A local copy counts if it is declared to be the published model and has its size.
            if name != publication.BASE_ID:
                yield Difference("model", f"base is {params.base_name}, published {wanted}")
        case _:
            yield Difference("model", f"base is {params.base_name}, published {wanted}")
    if (count := results["base"]["parameters"]) != publication.PARAMETERS:
        yield Difference("model", f"the model has {count:,} parameters, published {publication.PARAMETERS:,}")


def _data_differences(params: Params, results: Results) -> Iterator[Difference]:
    tokens = results["tokens"]["splits"]
    rows = {split: figures["rows"] for split, figures in results["corpus"]["splits"].items()}
    # The number of training blocks checks text and tokenizer at once, local copies included.
    same_blocks = tokens["train"]["n_blocks"] in publication.TRAIN_BLOCKS
    wanted = f"{publication.DATASET_ID} {publication.DATASET_CONFIG} at {publication.DATASET_REVISION[:8]}"
    match params.corpus:
        case HubCorpus(id=name, config=config, revision=revision):
            published = (publication.DATASET_ID, publication.DATASET_CONFIG, publication.DATASET_REVISION)
            if (name, config, revision) != published:
                yield Difference("data", f"corpus is {name} {config or ''} at {revision[:8]}, published {wanted}")
        case DirectoryCorpus():
            if rows != dict(publication.ROWS):
                found = " / ".join(f"{count:,}" for count in rows.values())
                yield Difference("data", f"corpus has {found} rows, published {wanted}: 36,718 / 3,760 / 4,358")
        case _:
            yield Difference("data", f"corpus is {params.corpus.source}, published {wanted}")
    match params.tokenizer:
        case HubTokenizer(id=name, revision=revision):
            if (name, revision) != (publication.BASE_ID, publication.BASE_REVISION):
                yield Difference("data", f"tokenizer is {name} at {revision[:8]}, published {publication.BASE_ID}")
        case DirectoryTokenizer():
            pass  # judged by the number of blocks that it gives, below
        case _:
            yield Difference("data", f"tokenizer is trained here, published that of {publication.BASE_ID}")
    if not same_blocks:
        found, blocks = tokens["train"]["n_blocks"], publication.TRAIN_BLOCKS
        yield Difference("data", f"the train split has {found:,} blocks, published {blocks[0]:,} to {blocks[-1]:,}")


def _recipe(params: Params, results: Results) -> Iterator[Difference]:
    sections = params.model_dump()
    for key, accepted in publication.PROTOCOL.items():
        section, _, name = key.partition(".")
        if (found := sections[section][name]) not in accepted:
            yield Difference("recipe", f"{key} is {found!r}, published {accepted[0]!r}")
    on_cpu = [name for name, figures in results["variants"].items() if figures["provenance"]["device"] == "cpu"]
    if on_cpu:
        yield Difference("device", f"{len(on_cpu)} of {len(results['variants'])} variants were trained on the CPU")
