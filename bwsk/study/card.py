"""The model card: `results/README.md`, rendered from results.json by `workflow/templates/model_card.md.j2`.

The YAML header is built as `ModelCardData`, so that the Hub understands it, and checked here without the Hub. Absent
numbers are printed as a dash with a footnote that gives the reason. They never appear in the header.
"""

from __future__ import annotations

import base64
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bwsk.errors import BwskError
from bwsk.files import write_text
from bwsk.study import publication
from bwsk.study.evidence import devices, evidence, verdicts
from bwsk.study.formats import ABSENT, added_time, compact, duration, number, per_cent, percent, spread
from bwsk.study.params import DirectoryBase, HubBase, HubCorpus, Params
from bwsk.study.repository import CARD, PLOTS, TEMPLATE

LICENSE = "mit"
INITS = {"finetune": "Fine-tune", "scratch": "From Scratch"}
MODES = {"conventional": "Conventional", "bwsk-analyzed": "BWSK Analyzed", "bwsk-reversible": "BWSK Reversible"}
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_PRECISIONS = {"fp16": "AMP (fp16)", "bf16": "AMP (bf16)", "fp32": "none (fp32)"}


@dataclass(frozen=True)
class CardRow:
    """A line of a result table, as text."""

    variant: str
    mode: str
    loss: str
    val: str
    test: str
    memory: str
    time: str
    step: str
    epochs: str


@dataclass(frozen=True)
class CardTable:
    """The result table of one initialisation; below it, what the reversible mode saves in memory and adds in time."""

    title: str
    rows: list[CardRow]
    saving: str
    added: str


def write_card(
    params: Params,
    results: dict[str, Any],
    trainings: dict[str, dict[str, Any]],
    study: Path,
    template: Path = TEMPLATE,
) -> Path:
    """Write the card of the study in `study`, `results/README.md`, and its plots; returns the card's path.

    `trainings` are the training_results.json by variant. Raises BwskError, with nothing written, if the template
    cannot be rendered or the rendered card has an invalid header.
    """
    from bwsk.study.plots import draw

    path = study / "results" / CARD
    text = render(params, results, template)
    check_header(text, results, path)
    draw(results, trainings, study / "results" / "figures")
    write_text(path, text)
    return path


def render(params: Params, results: dict[str, Any], template: Path = TEMPLATE) -> str:
    """The card as Markdown with its YAML header; a pure function of its arguments. BwskError on a bad template."""
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"md": escaped, "num": number, "percent": percent, "commas": lambda count: f"{count:,}"}
    try:
        source = template.read_text(encoding="utf-8")
        body = environment.from_string(source).render(_context(params, results))
    except OSError as error:
        raise BwskError(f"{template}: cannot be read ({error.strerror}); it comes with the checkout") from None
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise BwskError(f"{template}{f', line {line}' if line else ''}: {' '.join(str(error).split())}") from None
    return f"---\n{header(params, results)}---\n\n{body.strip()}\n"


def header(params: Params, results: dict[str, Any]) -> str:
    """The card's YAML header as the Hub reads it, without the dashes around it."""
    from huggingface_hub import EvalResult, ModelCardData

    hub_corpus = params.corpus if isinstance(params.corpus, HubCorpus) else None
    base_model = _base_model(params)
    data = ModelCardData(
        language="en",
        license=LICENSE,
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model,
        datasets=[hub_corpus.id] if hub_corpus else None,
        metrics=["perplexity"],
        tags=["bwsk", "t5", "text2text-generation", "reversible-backpropagation", "memory-efficient-training"],
        model_name=params.study.repository.partition("/")[2],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                task_name="Text continuation",
                dataset_type=hub_corpus.id if hub_corpus else _slug(results["corpus"]["name"]),
                dataset_name=_dataset_name(params, results),
                dataset_config=hub_corpus.config if hub_corpus else None,
                dataset_revision=hub_corpus.revision if hub_corpus else None,
                dataset_split="test",
                metric_type="perplexity",
                metric_name=f"Test perplexity, {name}",
                metric_args={"variant": name},
                metric_value=round(figures["evaluation"]["test"]["published_perplexity"], 4),
            )
            for name, figures in results["variants"].items()
        ],
    )
    fields = {key: value for key, value in data.to_dict().items() if value is not None}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)


def check_header(text: str, results: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check a card's YAML as the Hub would, but offline; returns the header. BwskError names the field.

    The header must parse, have the required fields, no null or NaN anywhere, only well-formed Hub ids, and a
    model-index that huggingface_hub reads back as one perplexity per variant, equal to that of results.json.
    """
    from huggingface_hub import ModelCardData
    from huggingface_hub.repocard_data import model_index_to_eval_results

    match = re.match(r"^---\n(.*?\n)---\n", text, re.DOTALL)
    if not match:
        raise BwskError(f"{path}: has no YAML header; write it again: bwsk card")
    try:
        fields = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise BwskError(f"{path}: header is not YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(fields, dict):
        raise BwskError(f"{path}: header is not a mapping; write it again: bwsk card")
    required = ("license", "library_name", "pipeline_tag", "metrics", "tags", "model-index")
    for key in required:
        if not fields.get(key):
            raise BwskError(f"{path}: header lacks {key}; write it again: bwsk card")
    for key, value in _leaves(fields):
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            raise BwskError(f"{path}: header has {value} at {key}; a number or nothing belongs there")
    ids = [fields.get("base_model"), *(fields.get("datasets") or [])]
    for name in ids:
        if name is not None and not (isinstance(name, str) and _HUB_ID.match(name)):
            raise BwskError(f"{path}: header names {name!r}, which is not a Hub id")
    try:
        _, evaluations = model_index_to_eval_results(fields["model-index"])
        ModelCardData(**fields)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise BwskError(f"{path}: model-index is invalid ({type(error).__name__}: {error})") from None
    found = {(result.metric_args or {}).get("variant"): result.metric_value for result in evaluations}
    wanted = {
        name: round(figures["evaluation"]["test"]["published_perplexity"], 4)
        for name, figures in results["variants"].items()
    }
    if found != wanted or len(evaluations) != len(wanted):
        name = next(iter({*found, *wanted} - {name for name in wanted if found.get(name) == wanted[name]}), "?")
        raise BwskError(
            f"{path}: model-index says {found.get(name)} for {name}, results.json {wanted.get(name)}; "
            "write it again: bwsk card"
        )
    return fields


def html(card: Path) -> str:
    """The card as one self-contained HTML page, plots included: for a browser and for the workflow's report."""
    from markdown_it import MarkdownIt

    body = re.sub(r"^---\n.*?\n---\n", "", card.read_text(encoding="utf-8"), count=1, flags=re.DOTALL)
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    for name in PLOTS:
        data = base64.b64encode((card.parent / "figures" / name).read_bytes()).decode()
        page = page.replace(f'src="figures/{name}"', f'src="data:image/png;base64,{data}"')
    return _PAGE.replace("BODY", page)


def escaped(text: str) -> str:
    """A user's text, escaped so that it appears literally in a line or table cell of Markdown."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text)


def _context(params: Params, results: dict[str, Any]) -> dict[str, Any]:
    """The variables of the template: the parameters, the results, and tables of text."""
    variants = results["variants"]
    peaks = [figures[key] for figures in variants.values() for key in ("peak_memory_mb", "predicted_peak_memory_mb")]
    return {
        "params": params,
        "results": results,
        "tables": [_table(results, init) for init in params.variants.inits],
        "modes": MODES,
        "dataset": _dataset_name(params, results),
        "corpus_url": f"https://huggingface.co/datasets/{params.corpus.id}"
        if isinstance(params.corpus, HubCorpus)
        else None,
        "base_url": f"https://huggingface.co/{_base_model(params)}" if _base_model(params) else None,
        "publication": publication,
        "plots": PLOTS,
        "devices": devices(results),
        "evidence": evidence(results),
        "published_run": publication.ONE_RUN,
        "precision": _PRECISIONS[params.train.precision],
        "versions": next(iter(variants.values()))["provenance"]["versions"],
        "memory_absent": any(figures["peak_memory_mb"] is None for figures in variants.values()),
        "memory_predicted": any(peak is not None for peak in peaks[1::2]),
        "verdicts": verdicts,
        "reasons": sorted({claim["reason"] for claim in results["claims"]}),
        "value": _claim_value,
        "ours": _own_value,
    }


def _table(results: dict[str, Any], init: str) -> CardTable:
    rows = [
        CardRow(
            variant=name,
            mode=MODES[figures["mode"]],
            loss=number(figures["final_train_loss"], 4),
            val=number(figures["evaluation"]["validation"]["published_perplexity"]),
            test=number(figures["evaluation"]["test"]["published_perplexity"]),
            memory=_memory(figures),
            time=duration(figures["wall_time_s"]),
            step=f"{spread(*(figures[f'step_time_{point}ms'] for point in ('q1_', '', 'q3_')))} ms",
            epochs=f"{figures['epochs_completed']}{' (stopped early)' if figures['early_stopped'] else ''}",
        )
        for name, figures in results["variants"].items()
        if figures["init"] == init
    ]
    saving = results["memory_saving"][init]
    kind = next((kind for kind in ("measured", "predicted") if saving[kind] is not None), None)
    step_time = next(claim for claim in results["claims"] if claim["id"] == f"step-time-overhead-{init}")
    return CardTable(
        INITS[init], rows, f"{percent(saving[kind])} ({kind})" if kind else f"{ABSENT} ³", _own_value(step_time)
    )


def _memory(figures: dict[str, Any]) -> str:
    if figures["peak_memory_mb"] is not None:
        return f"{compact(figures['peak_memory_mb'])} MiB"
    if figures["predicted_peak_memory_mb"] is not None:
        return f"{compact(figures['predicted_peak_memory_mb'])} MiB (predicted) ³"
    return f"{ABSENT} ³"


def _own_value(claim: dict[str, Any]) -> str:
    """The study's own value of a claim; times have no more digits than their noise justifies."""
    if claim["topic"] == "time":
        return added_time(claim["ours"], claim["noise"])
    return _claim_value(claim["ours"], claim["unit"])


def _claim_value(value: float | None, unit: str) -> str:
    if value is None:
        return ABSENT
    match unit:
        case "%":
            return per_cent(value)
        case "MiB":
            return f"{compact(value)} MiB"
        case "M":
            return f"{value:.1f} M"
        case "×":
            return f"{value:.2f} ×"
        case _:
            return f"{value:,.2f}"


def _dataset_name(params: Params, results: dict[str, Any]) -> str:
    match params.corpus:
        case HubCorpus(id=publication.DATASET_ID, config=publication.DATASET_CONFIG):
            return "WikiText-2"
        case HubCorpus(id=name, config=config):
            return f"{name} ({config})" if config else name
        case _:
            return str(results["corpus"]["name"])


def _base_model(params: Params) -> str | None:
    """The base model's Hub id, if it has one."""
    match params.base:
        case HubBase(id=name):
            return name
        case DirectoryBase(id=name) if name and _HUB_ID.match(name):
            return name
        case _:
            return None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "local"


def _leaves(value: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for name, part in value.items() for leaf in _leaves(part, f"{key}.{name}" if key else str(name))]
    if isinstance(value, list):
        return [leaf for index, part in enumerate(value) for leaf in _leaves(part, f"{key}[{index}]")]
    return [(key, value)]


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Model card</title>
<style>
body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; font-size: 90%; }
th, td { border: 1px solid #d0d7de; padding: .35rem .7rem; text-align: left; font-variant-numeric: tabular-nums; }
body > table td:first-child, td[style*="right"] { white-space: nowrap; } tr:nth-child(2n) { background: #f6f8fa; }
pre { background: #f6f8fa; padding: .8rem; overflow-x: auto; } code { font-size: 85%; } img { max-width: 100%; }
blockquote { border-left: .25rem solid #d29922; margin: 1rem 0; padding: .1rem 1rem; background: #fff8e5; }
</style>
<body>
BODY
</body></html>
"""
