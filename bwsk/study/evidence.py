"""Which published claims hold in a study, and on what evidence: a row per topic, for the top of the card and of `show`.

A topic has several claims (twelve perplexities, the memory saved from either initialisation). Its row shows
representative values and counts the verdicts of all its claims. Two values are those of fine-tuning and of training
from scratch, in this order.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from bwsk.study.formats import ABSENT, added_time, number, per_cent

_INITS = {"finetune": "fine-tuned", "scratch": "from scratch"}
Results = dict[str, Any]


@dataclass(frozen=True)
class Evidence:
    """A row: the claim, the published and the study's own value, the verdicts, and the evidence for them."""

    claim: str
    published: str
    ours: str
    verdict: str
    basis: str


def evidence(results: Results) -> list[Evidence]:
    """The rows of a study's `results.json`, in the order of the claims."""
    inits = [init for init in _INITS if any(figures["init"] == init for figures in results["variants"].values())]
    claims = {claim["id"]: claim for claim in results["claims"]}
    perplexity, modes, memory, corrected, time = (
        [claims[f"{name}-{init}{mode}"] for init in inits]
        for name, mode in (
            ("test-perplexity", "-conventional"),
            ("modes-equal", ""),
            ("memory-saving", ""),
            ("memory-saving-corrected", ""),
            ("step-time-overhead", ""),
        )
    )
    shares, advantage = claims["s-ratio"], claims["pretraining-advantage"]
    saving, kind = _saving(results, inits)
    return [
        Evidence(
            "S-type share of modules",
            per_cent(shares["published"]),
            f"{per_cent(shares['ours'])} (strict {per_cent(100 * results['census']['strict']['s_ratio'])})",
            verdicts(results, "classification"),
            f"{results['census']['total']} leaf modules; the strict share is the one that witnesses fully support",
        ),
        Evidence(
            "Test perplexity, conventional",
            _both(number(claim["published"]) for claim in perplexity),
            _both(number(claim["ours"]) for claim in perplexity),
            verdicts(results, "perplexity"),
            f"evaluated from the saved weights, one run per variant, seed {results['parameters']['seed']}",
        ),
        Evidence(
            "Spread of perplexity over modes",
            _both(per_cent(claim["published"]) for claim in modes),
            _both(per_cent(claim["ours"]) for claim in modes),
            verdicts(results, "modes"),
            _sameness(results, inits),
        ),
        Evidence(
            "Perplexity from scratch over fine-tuned",
            f"{number(advantage['published'])} ×",
            ABSENT if advantage["ours"] is None else f"{number(advantage['ours'])} ×",
            verdicts(results, "pretraining"),
            "test perplexities of the conventional variants, one run each",
        ),
        Evidence(
            "Peak memory saved, reversible",
            _both(per_cent(claim["published"]) for claim in memory),
            saving,
            verdicts(results, "memory"),
            f"{_MEMORY[kind].format(devices=devices(results))}; published less its leaked copy of the model: "
            f"{_both(per_cent(claim['published']) for claim in corrected)}",
        ),
        Evidence(
            "Time added to a step, reversible",
            _both(per_cent(claim["published"]) for claim in time),
            _added(time),
            verdicts(results, "time"),
            _noise(time[0]["noise"]),
        ),
    ]


def verdicts(results: Results, topic: str | None = None) -> str:
    """The number of claims per verdict, of one topic or of all: `26 reproduced, 2 not reproduced`."""
    counts = Counter(claim["verdict"] for claim in results["claims"] if topic in (None, claim["topic"]))
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def devices(results: Results) -> str:
    """The devices that the variants were trained on."""
    found = sorted({figures["provenance"]["device"] for figures in results["variants"].values()})
    return ", ".join("the CPU" if device == "cpu" else device for device in found)


_MEMORY = {
    "measured": "measured by CUDA's allocator on {devices}",
    "predicted": "predicted for CUDA, not measured: trained on {devices}",
    None: "neither measured nor predicted: trained on {devices}",
}


def _saving(results: Results, inits: list[str]) -> tuple[str, str | None]:
    """The share of memory saved as text, and whether it is measured or predicted; None if it is neither."""
    savings = [results["memory_saving"][init] for init in inits]
    kind = next((kind for kind in _MEMORY if kind and all(saving[kind] is not None for saving in savings)), None)
    if kind is None:
        return ABSENT, None
    return f"{_both(per_cent(100 * saving[kind]) for saving in savings)} ({kind})", kind


def _sameness(results: Results, inits: list[str]) -> str:
    """Whether the modes of each initialisation ended with the same weights, by their sha256."""
    weights = [
        [figures["provenance"]["weights_sha256"] for figures in results["variants"].values() if figures["init"] == init]
        for init in inits
    ]
    if all(len(found) < 2 for found in weights):
        return "one mode alone: nothing to compare"
    same = [len(set(found)) == 1 for found in weights]
    if all(same):
        return "the modes end with bit-identical weights (sha256)"
    differing = " and ".join(_INITS[init] for init, equal in zip(inits, same, strict=True) if not equal)
    return f"the modes end with different weights ({differing})"


def _added(claims: list[dict[str, Any]]) -> str:
    """The time added from each initialisation, and once the noise that they share: `14 % / within noise (±9.1 %)`."""
    texts = [added_time(claim["ours"], claim["noise"]) for claim in claims]
    *_, noise = texts[-1].partition(" (")
    return _both(text.removesuffix(f" ({noise}") for text in texts) + (f" ({noise}" if noise else "")


def _noise(noise: float | None) -> str:
    if noise is None:
        return "medians of step times; the noise is unknown without conventional and bwsk-analyzed"
    by = per_cent(noise, 1 if noise < 10 else 0)
    return f"medians of step times; conventional and bwsk-analyzed run the same step and differ by {by}"


def _both(texts: Any) -> str:
    """The values of the initialisations; once if they are the same."""
    return " / ".join(dict.fromkeys(texts))
