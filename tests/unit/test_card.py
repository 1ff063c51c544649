"""The model card: all sections of the published page, a header that the Hub reads, and nothing that is not known."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from bwsk.errors import BwskError
from bwsk.study.card import check_header, escaped, html, render, write_card
from bwsk.study.formats import duration
from bwsk.study.params import Params
from bwsk.study.repository import PLOTS
from bwsk.study.results import read_results
from tests.unit.published_results import ROOT, published_params, published_results, with_claims

PARAMS = published_params()
RESULTS = with_claims(PARAMS, published_results(PARAMS))
SECTIONS = [
    "What is BWSK?",
    "Model Overview",
    "S/K Classification",
    "Fine-tune Results",
    "From Scratch Results",
    "Published claims",
    "Repository Structure",
    "Usage",
    "Training Configuration",
    "Links",
    "Citation",
    "License",
]


def header(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_published_study_s_card_has_the_page_s_sections_and_numbers() -> None:
    text = render(PARAMS, RESULTS)
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == SECTIONS
    assert "not the published study" not in text
    assert "28 published claims: 26 reproduced, 2 not reproduced.\n\n| Published claim |" in text
    for row in (
        "| S-type (information-preserving) | 70.5% | 134 of 190 | 64.2% | 122 of 190 |",
        "| K-type (information-erasing) | 29.5% | 56 of 190 | 35.8% | 68 of 190 |",
        "| Conventional | 3.6739 | 31.64 | 30.62 | 2,215 MiB | 13.7m | 32.0 (31.7–32.7) ms | 10 (stopped early) |",
        "| BWSK Reversible | 5.3226 | 231.85 | 230.42 | 1,408 MiB | 16.2m | 40.5 (40.1–41.3) ms | 10 |",
        "| LR (fine-tune) | 5e-05 |",
        "| LR (from-scratch) | 0.0003 |",
        "| Mixed precision | AMP (fp16) |",
    ):
        assert row in text
    assert text.count("Memory savings (reversible vs conventional): **36.4% (measured)**") == 2
    for name in PARAMS.variant_names:
        assert f'AutoModelForSeq2SeqLM.from_pretrained(repository, subfolder="{name}")' in text
    assert 'repository = "tzervas/bwsk-t5-small"' in text
    assert "@software{zervas2026bwsk," in text
    for figure in PLOTS:
        assert f"](figures/{figure})" in text


def test_what_the_publication_says_of_coordination_is_quoted_and_not_claimed() -> None:
    section = render(PARAMS, RESULTS).partition("## What is BWSK?")[2].partition("\n## ")[0]
    quoted = 'The publication calls S-type operations\n"information-preserving, reversible, coordination-free"'
    assert quoted in section
    assert "It does not support the part about coordination." in section
    own = re.sub(r'"[^"]*"', "", section)  # what is left once the quotations are gone
    for claimed in ("needs no", "coordination-free", "synchroni", "can be reversed", "parallel"):
        assert claimed not in own


def test_the_first_screen_says_which_claims_hold_and_on_what_evidence() -> None:
    top = render(PARAMS, RESULTS).partition("\nThe model,")[0].partition("# BWSK T5-small")[2]
    assert len(top.splitlines()) <= 24
    for row in (
        "| S-type share of modules | 70.5 % | 70.5 % (strict 64.2 %) | 3 reproduced | 190 leaf modules;",
        "| Test perplexity, conventional | 30.62 / 234.27 | 30.62 / 234.27 | 12 reproduced | evaluated from the saved",
        "| Peak memory saved, reversible | 36.4 % | 36.4 % (measured) | 4 reproduced, 2 not reproduced | measured by",
        "conventional and bwsk-analyzed run the same step and differ by 0.0 % |",
        "Figures of other runs: one run per variant on an RTX 3090 Ti;",
        "one run per variant on NVIDIA GeForce RTX 3090 Ti. On another processor",
    ):
        assert row in top


def test_times_are_shown_no_more_precisely_than_they_are_known() -> None:
    results = copy.deepcopy(published_results(PARAMS))
    for name, median in (("conventional", 124.2), ("bwsk-analyzed", 66.1), ("bwsk-reversible", 147.3)):
        results["variants"][f"scratch-{name}"] |= {"step_time_ms": median, "step_time_q1_ms": 60.0}
    text = render(PARAMS, with_claims(PARAMS, results))
    assert "Time added to a step: **within noise (±88 %)**." in text
    assert "| Time added to a step, reversible | 26.3 % | 26 % (±88 %)" not in text
    assert "| Time added to a training step of scratch-bwsk-reversible | 26.3 % | within noise (±88 %) |" in text
    assert "18.6" not in text
    assert "differ by 88 %" in text.partition("\nThe model,")[0]


def test_its_header_is_what_the_hub_reads() -> None:
    card = ModelCard(render(PARAMS, RESULTS))
    fields = card.data
    assert fields.license == "mit"
    assert fields.library_name == "transformers"
    assert fields.base_model == "google-t5/t5-small"
    assert fields.datasets == ["Salesforce/wikitext"]
    assert fields.metrics == ["perplexity"]
    assert fields.pipeline_tag == "text-generation"
    found = {result.metric_args["variant"]: result.metric_value for result in fields.eval_results}
    assert found["scratch-bwsk-reversible"] == pytest.approx(230.4225)
    assert list(found) == PARAMS.variant_names
    assert {result.dataset_config for result in fields.eval_results} == {"wikitext-2-raw-v1"}
    # Reading and writing with the Hub's own library loses nothing.
    assert yaml.safe_load(fields.to_yaml()) == header(render(PARAMS, RESULTS))


def test_another_study_says_so_at_the_top_and_names_no_hub_ids(study: Path, params: Params) -> None:
    text = (study / "results/README.md").read_text()
    top = text.split("## What is BWSK?")[0]
    assert "**This is not the published study.**" in top
    assert "base is pretrained, published google-t5/t5-small" in top
    assert "more, listed in `results.json`" in top
    assert "one run per variant on the CPU. On another processor" in top
    assert "train.max_steps is 12, published None" in read_results(study)["differences"]
    assert not {"base_model", "datasets"} & header(text).keys()
    assert header(text)["model-index"][0]["results"][0]["dataset"] == {"name": "text", "type": "text", "split": "test"}
    assert text == render(params, read_results(study))


def test_absent_numbers_are_dashes_with_a_footnote_that_says_why(study: Path) -> None:
    text = (study / "results/README.md").read_text()
    assert "Memory savings (reversible vs conventional): **— ³**" in text
    assert "³ Peak memory is measured on a CUDA device; this study was trained on the CPU." in text
    assert "⁴ This study has no such measurement." in text
    for absent in ("None", "NaN", "nan", "null |", "Undefined"):
        assert absent not in text.replace("is null", "")


def test_predicted_memory_is_marked_as_predicted() -> None:
    results = copy.deepcopy(RESULTS)
    for figures in results["variants"].values():
        figures |= {"predicted_peak_memory_mb": figures["peak_memory_mb"], "peak_memory_mb": None}
    for saving in results["memory_saving"].values():
        saving |= {"predicted": saving["measured"], "measured": None}
    text = render(PARAMS, results)
    assert "| 2,215 MiB (predicted) ³ |" in text
    assert "**36.4% (predicted)**" in text
    assert "Predicted figures are marked." in text


def test_a_part_of_the_variants_makes_a_card_too() -> None:
    params = published_params(variants={"inits": ["scratch"], "modes": ["conventional"]})
    text = render(params, with_claims(params, published_results(params)))
    assert "trained in 1 variant on" in text
    assert "## Fine-tune Results" not in text
    assert "LR (fine-tune)" not in text
    assert len(header(text)["model-index"][0]["results"][0]["metrics"]) == 1


def test_tables_are_tables_and_user_text_cannot_break_them() -> None:
    params = published_params(study={"title": "A | B <script>alert(1)</script>\n# `C` *d*"})
    body = render(params, with_claims(params, published_results(params))).split("---\n", 2)[2]
    page = MarkdownIt("commonmark").enable("table").render(body)
    assert "<script>" not in page
    assert page.startswith("<h1>A | B &lt;script&gt;alert(1)&lt;/script&gt; # `C` *d*</h1>")
    assert page.count("<table>") == 9
    for line in (line for line in body.splitlines() if line.startswith("|") and not line.startswith("|--")):
        cells = re.split(r"(?<!\\)\|", line)
        assert len(cells) >= 4, line
    assert escaped("a|b\nc_d") == r"a\|b c\_d"


def test_the_page_is_self_contained(study: Path) -> None:
    page = html(study / "results/README.md")
    assert page.count("data:image/png;base64,") == 3
    assert 'src="figures/' not in page
    assert "model-index" not in page


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("license: mit\n", "", "header lacks license"),
        ("library_name: transformers\n", "library_name: null\n", "header lacks library_name"),
        ("base_model: google-t5/t5-small", "base_model: a b", "'a b', which is not a Hub id"),
        ("- Salesforce/wikitext\n", "- ../x\n", "which is not a Hub id"),
        ("value: 30.6208", "value: .nan", "header has nan at model-index"),
        ("value: 30.6208", "value: 29.9", "model-index says 29.9 for finetune-conventional"),
        ("name: Test perplexity, finetune-conventional", "name: null", "header has None at model-index"),
        ("model-index:", "model-indices:", "header lacks model-index"),
        ("---\nbase_model", "base_model", "has no YAML header"),
        ("license: mit", "license: [mit", "header is not YAML"),
        ("      type: text-generation\n", "", "model-index is invalid"),
    ],
)
def test_a_header_that_the_hub_would_refuse_is_refused_here(old: str, new: str, says: str) -> None:
    text = render(PARAMS, RESULTS)
    path = Path("README.md")
    assert check_header(text, RESULTS, path)["license"] == "mit"
    assert old in text
    with pytest.raises(BwskError, match=re.escape(says)):
        check_header(text.replace(old, new, 1), RESULTS, path)


def test_a_bad_template_is_one_line_and_leaves_the_card(editable: Path, params: Params, tmp_path: Path) -> None:
    results = read_results(editable)
    folder = editable / "results"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    template = tmp_path / "card.md.j2"
    for text, says in (("{% if %}", "line 1"), ("{{ nothing.there }}", "'nothing' is undefined")):
        template.write_text(text)
        with pytest.raises(BwskError, match=re.escape(says)):
            write_card(params, results, {}, editable, template)
    with pytest.raises(BwskError, match="cannot be read"):
        write_card(params, results, {}, editable, tmp_path / "none.j2")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_durations_are_printed_as_published() -> None:
    assert [duration(seconds) for seconds in (6.44, 824.06, 974.9, 7_200.0)] == ["6.4s", "13.7m", "16.2m", "2.0h"]


def test_the_root_study_s_card_shows_no_number_that_is_not_finite() -> None:
    values = [metric["value"] for metric in header(render(PARAMS, RESULTS))["model-index"][0]["results"][0]["metrics"]]
    assert len(values) == 6
    assert all(math.isfinite(value) for value in values)
    assert (ROOT / "workflow/templates/model_card.md.j2").is_file()
