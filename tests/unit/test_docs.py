"""README and docs: their code runs, their commands parse, their output and figures are those of a real run or its file.

Every fenced block names its language. `python` blocks run, those of a page one after the other in one namespace
(`NAMES`). Commands in `sh` blocks, and after `$ ` in `console` blocks, are parsed by the program that they call, and
`snakemake` plans them. A `console` block below the comment `<!-- test: run -->` runs, and its output is compared.
`google-t5/t5-small` is a local folder here: tiny weights for Python, the real one's config for commands.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from markdown_it import MarkdownIt
from transformers import AutoTokenizer, Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

import bwsk
from bwsk.cli import GROUPS
from bwsk.cli.app import app
from bwsk.study.params import load_params

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HUB_ID = "google-t5/t5-small"
RUN = "<!-- test: run -->"
# The Trainer refuses bfloat16 without a GPU unless it is told to use the CPU.
ON_CPU = ("bf16=True", "bf16=True, use_cpu=True")
# What the shell itself, git and the system do is not ours to test.
SYSTEM = {"cd", "cp", "git", "mkdir", "sed"}


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text, and whether its commands are to be run."""

    page: Path
    line: int
    language: str
    text: str
    runs: bool

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """All blocks of the pages in these languages; of any, if none is given."""
    found = []
    for page in PAGES:
        tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
        for before, token in pairwise([tokens[0], *tokens]):
            if token.type == "fence":
                runs = before.type == "html_block" and before.content.strip() == RUN
                found.append(Block(page, token.map[0] + 1, token.info, token.content, runs))
    return [block for block in found if not languages or block.language in languages]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Place and words of each command of all blocks; comments are gone, `a && b` are two, lines end without `\\`."""
    for block in blocks("sh", "console"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if block.language == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                elif words:
                    yield block.place, words
                    words = []


def inline(program: str) -> Iterator[tuple[str, list[str]]]:
    """Place and words of each piece of code within a sentence or table that begins with `program`."""
    for page in PAGES:
        for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
            for child in token.children or []:
                if child.type == "code_inline" and child.content.startswith(f"{program} "):
                    yield f"{page.relative_to(ROOT)}:{token.map[0] + 1}", child.content.split()[1:]


@pytest.fixture(scope="module")
def verbs() -> dict[str, Any]:
    for group in GROUPS:
        import_module(f"bwsk.cli.{group}")
    return typer.main.get_command(app).commands


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A working directory where the id of T5-small is a local folder with a tiny T5 and a tokenizer."""
    root = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(root / HUB_ID)
    tokenizer.save_pretrained(root / HUB_ID)
    return root


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory where the id of T5-small is a local folder with its config: transformers' default is its."""
    root = tmp_path_factory.mktemp("configs")
    config = T5Config(architectures=["T5ForConditionalGeneration"], decoder_start_token_id=0)
    config.save_pretrained(root / HUB_ID)
    return root


def examples(n: int = 8) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(2, 100, (n, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens]


def names() -> dict[str, Any]:
    """What blocks take as given: the objects that a reader has."""
    dataset = examples()
    batch = {key: torch.stack([row[key] for row in dataset[:4]]) for key in dataset[0]}
    return {"device": "cpu", "loader": [batch, batch], "train_dataset": dataset, "model_or_config_or_path": HUB_ID}


def test_every_block_names_a_language_that_is_tested() -> None:
    others = {block.place: block.language for block in blocks()}
    assert set(others.values()) <= {"python", "sh", "console", "yaml", "text"}, others
    assert len(blocks("python")) >= 5
    assert len(list(commands())) >= 30
    assert [block for block in blocks("console") if block.runs]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hub)
    namespace = names()
    for block in blocks("python"):
        if block.page == page:
            exec(compile("\n" * block.line + block.text.replace(*ON_CPU), str(page), "exec"), namespace)
    if page == PAGES[0]:  # the loop and the Trainer really trained
        stock = T5ForConditionalGeneration.from_pretrained(HUB_ID)
        assert namespace["trainer"].state.global_step > 0
        assert not torch.equal(namespace["model"].shared.weight, stock.shared.weight)


def test_under_the_trainer_t5_gets_the_weights_that_it_gets_without_us(hub: Path, tmp_path: Path) -> None:
    stock = T5ForConditionalGeneration.from_pretrained(hub / HUB_ID)
    ours = copy.deepcopy(stock)
    bwsk.make_reversible(ours, precision="bf16")
    kept = [trained(model, tmp_path) for model in (stock, ours)]
    weights = [model.state_dict() for model in (stock, ours)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert kept[1] < 0.8 * kept[0], "the engine did not run"


def trained(model: torch.nn.Module, out: Path) -> int:
    """Train by the Trainer as the README does; returns the bytes that a forward saves, weights apart."""
    saved: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    class Trainer(Seq2SeqTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            saved.clear()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return super().compute_loss(*args, **kwargs)

    rows = [{key: value.repeat(8) for key, value in row.items()} for row in examples(16)]
    settings = Seq2SeqTrainingArguments(
        str(out), bf16=True, use_cpu=True, per_device_train_batch_size=4, optim="adamw_torch_fused", max_steps=3,
        report_to=[], disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    Trainer(model=model, args=settings, train_dataset=rows).train()
    return sum(saved.values())


def test_the_example_script_runs(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("a class\tan object\nan error\ta statement\n", encoding="utf-8")
    words = [ROOT / "examples" / "finetune_t5.py", HUB_ID, tmp_path / "pairs.tsv", tmp_path / "out"]
    run(hub, sys.executable, *map(str, words))
    T5ForConditionalGeneration.from_pretrained(tmp_path / "out")


def run(where: Path, *words: str) -> str:
    """Run a command in a folder with this checkout's package; returns standard output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=where, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("block", [block for block in blocks("console") if block.runs], ids=lambda block: block.place)
def test_output_that_is_shown_is_what_the_command_prints(block: Block, configs: Path) -> None:
    first, *shown = block.text.splitlines()
    words = shlex.split(first.removeprefix("$ "))
    assert words[0] == "bwsk"
    printed = run(configs, sys.executable, "-m", *words).rstrip().splitlines()
    assert shown == [line.rstrip() for line in printed]


def test_commands_parse(verbs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    check = Checks(verbs, tmp_path_factory.mktemp("study"))
    failed = [f"{place}: {shlex.join(words)}: {why}" for place, words in commands() if (why := check(words))]
    assert not failed, "\n".join(failed)


def test_commands_in_sentences_exist(verbs: dict[str, Any]) -> None:
    targets = make_targets()
    found = [*inline("bwsk"), *inline("make")]
    assert len(found) >= 20
    for place, (verb, *words) in inline("bwsk"):
        if verb in ("--help", "--version"):
            continue
        assert verb in verbs, f"{place}: bwsk {verb}"
        known = {option for parameter in verbs[verb].params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in words if word.startswith("-") and word not in known]
        assert not unknown, f"{place}: bwsk {verb} {unknown}"
    for place, (target, *_) in inline("make"):
        assert target in targets, f"{place}: make {target}"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


class Checks:
    """Asks each program whether it would take a command; the answer is what is wrong with it, or nothing."""

    def __init__(self, verbs: dict[str, Any], study: Path) -> None:
        self.verbs = verbs
        self.study = study
        self.planned: dict[tuple[str, ...], str] = {}
        programs: list[Callable[[list[str]], str]] = [self.bwsk, self.make, self.python, self.snakemake, self.dvc]
        self.programs = {program.__name__: program for program in programs}

    def __call__(self, words: list[str]) -> str:
        program, rest = words[0], words[1:]
        if program in SYSTEM:
            return ""
        if (ROOT / program).is_file():
            return "" if os.access(ROOT / program, os.X_OK) else "not executable"
        return self.programs[program](rest) if program in self.programs else "no such program"

    def bwsk(self, words: list[str]) -> str:
        if words[0] not in self.verbs:
            return "no such command"
        try:
            self.verbs[words[0]].make_context(words[0], words[1:])
        except typer.BadParameter.__base__ as error:
            return error.format_message()
        return ""

    def make(self, words: list[str]) -> str:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in words:
            variable, assigned, value = word.partition("=")
            if not assigned and word not in make_targets():
                return f"no target {word}"
            if assigned and f"$({variable})" not in makefile:
                return f"no variable {variable}"
            if variable == "BENCH" and (why := self.python(["bench/run.py", *shlex.split(value)])):
                return why
        return ""

    def python(self, words: list[str]) -> str:
        """Scripts have the options that are named (their values are not looked at); `pip install` names our extras."""
        if words[:3] == ["-m", "pip", "install"]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            asked = re.findall(r"\[(.*?)\]", " ".join(words))
            return "" if set(asked) <= set(extras) else f"no such extra among {asked}"
        script = ROOT / words[0]
        if not script.is_file():
            return "no such script"
        known = {
            str(value.value)
            for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
            for value in node.args
            if isinstance(value, ast.Constant)
        }
        return ", ".join(f"no option {word}" for word in words if word.startswith("--") and word not in known)

    def snakemake(self, words: list[str]) -> str:
        """Parse, then plan the published study in a folder of its own; how many cores and GPUs is no part of a plan."""
        from snakemake.cli import get_argument_parser

        try:
            targets = tuple(map(str, get_argument_parser().parse_args(words).targets))
        except SystemExit:
            return "cannot be parsed"
        if targets not in self.planned:
            (self.study / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
            files = ["--directory", str(self.study), "--snakefile", str(ROOT / "Snakefile")]
            command = [sys.executable, "-m", "snakemake", *files, "--cores", "1", "-n", "--quiet", *targets]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            self.planned[targets] = "" if done.returncode == 0 else done.stderr[-500:]
        return self.planned[targets]

    def dvc(self, words: list[str]) -> str:
        from dvc.cli.parser import DvcParserError, get_main_parser

        try:
            get_main_parser().parse_args(words)
        except DvcParserError as error:
            return str(error) or "cannot be parsed"
        return ""


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.place)
def test_parameters_that_are_shown_are_accepted(block: Block, tmp_path: Path) -> None:
    published = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(published | yaml.safe_load(block.text)))
    load_params(tmp_path / "params.yaml")


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if target and "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
        for target, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)]*)\)", page.read_text(encoding="utf-8")):
            text = (page.parent / target if target else page).read_text(encoding="utf-8")
            headings = [re.sub(r"[^\w\- ]", "", line.lstrip("# ")) for line in text.splitlines() if line[:1] == "#"]
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}, f"{page.name}: #{anchor}"


def test_peaks_that_are_called_measured_are_those_of_the_file() -> None:
    """Every row of a table of peaks on the H100, written from docs/benchmarks/h100/memory.json."""
    rows = json.loads((ROOT / "docs/benchmarks/h100/memory.json").read_text())["rows"]
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/reversible.md"))
    fused = [row for row in rows if row["optimizer"] == "fused"]
    stock = {row["case"]: row for row in fused if row["mode"] == "conventional"}
    cases = ("t5-small fp32 4x(256+256)", "t5-small bf16 16x(256+256)")
    peaks = {(row["case"], row["mode"]): row for row in fused}

    def share(row: dict[str, Any]) -> str:
        return f"−{100 - 100 * row['peak_mib'] / stock[row['case']]['peak_mib']:.0f} %"

    for mode in ("checkpoint", "fast"):
        four, sixteen = (peaks[case, mode] for case in cases)
        cells = (f"{row['peak_mib']:.0f} MiB ({share(row)})" for row in (four, sixteen))
        extra = f"+{100 * four['flops'] / stock[cases[0]]['flops'] - 100:.1f} %"
        assert " | ".join((*cells, extra)) in readme.replace("**", ""), mode
    sdpa = [
        round(peaks["t5-small bf16 sdpa 4x(512+512)", mode]["peak_mib"])
        for mode in ("conventional", "fast", "checkpoint")
    ]
    assert "{} MiB stock, {} with `fast`, {} with checkpointing".format(*sdpa) in readme
    savings = [share(row) for row in fused if row["mode"] == "fast"]
    assert f"{min(savings)[1:-2]} to {max(savings)[1:]} less peak" in readme
    for row in rows:
        line = f"{row['peak_mib']:,.0f} | {row['predicted_mib']:,.0f} |"
        assert row["optimizer"] == "foreach" or line in page, f"{row['case']} {row['mode']}: {line}"
