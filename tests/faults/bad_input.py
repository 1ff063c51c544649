"""The table of malformed inputs: to add one, add a line.

A case names what is broken (`break_it` changes a copy of the tiny study, which is the working directory), the command
that meets it, and what its one line must say. `PARAMS` and `COMMANDS` are shorter still: a key and its value, or a
command line, and what must be said.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.tiny import PARAMS as TINY

CORPUS = "corpus --out build/corpus"
TOKENIZER = "tokenizer --out build/new-tokenizer"
TOKENS = "tokens"
BASE = "base --out build/new-base"
TRAIN = (
    "train finetune-bwsk-analyzed --out results/v --curves build/curves/v --gpus 0 --memory build/analysis/memory.json"
)
SCRATCH = "train scratch-conventional --out results/v --gpus 0"
EVALUATE = "evaluate results/finetune-conventional --params params.yaml --gpus 0 --json build/new.json"
RESULTS, CARD, CHECK = "results", "card", "check"


@dataclass(frozen=True)
class Bad:
    """`status` is the exit status that is due; `limit` caps the size of files, as a full disk would."""

    name: str
    break_it: Callable[[], Any]
    command: str
    says: str
    status: int = 1
    limit: int | None = None


# key, value, what the line says besides the key
PARAMS: list[tuple[str, Any, str]] = [
    ("seed", -1, "greater than or equal to 0"),
    ("seed", "zero", "must be a"),
    ("seed", 2**40, "less than or equal"),
    ("seed", 1.5, "must be a valid integer"),
    ("seed", None, "must be a valid integer"),
    ("seed", True, "must be a valid integer"),
    ("sead", 1, "unknown key"),
    ("study", None, "must be"),
    ("study.title", "", "must have at least 1 character"),
    ("study.repository", "../../etc/passwd", "must match"),
    ("study.repository", "no-slash", "must match"),
    ("study.published", "t5-large", "must be 't5-small'"),
    ("corpus.source", "ftp", "must be 'hub', 'directory', 'embedded'"),
    ("corpus.path", "", "must be a path"),
    ("corpus.path", "a\0b", "must be a path"),
    ("corpus.path", 7, "must be a valid string"),
    ("tokenizer.vocab_size", 10, "greater than or equal to 256"),
    ("tokenizer.vocab_size", "300", "must be a number|must be a valid integer"),
    ("tokens.block", 31, "must be even"),
    ("tokens.block", 16, "must be at most block"),
    ("tokens.block", 0, "greater than or equal"),
    ("tokens.block", 10**26, "less than or equal"),
    ("tokens.stride", 64, "must be at most window"),
    ("tokens.stride", -16, "greater than or equal"),
    ("base.steps", 0, "greater than or equal to 1"),
    ("base.lr", 0.0, "greater than 0"),
    ("base.noise_density", 1.0, "less than 1"),
    ("base.architecture", [], "must be a valid dictionary"),
    ("train.batch_size", 0, "greater than or equal to 1"),
    ("train.warmup", 1.5, "less than 1"),
    ("train.warmup", "10%", "must be a number"),
    ("train.lr_scratch", "3e-4", "write|3.0e-4"),
    ("train.lr_scratch", float("nan"), "must be a finite number"),
    ("train.lr_scratch", float("inf"), "must be a finite number"),
    ("train.betas", [0.9], "at least 2 items"),
    ("train.betas", [0.9, 1.0], "less than 1"),
    ("train.precision", "float64", "must be 'fp32', 'bf16' or 'fp16'"),
    ("train.max_grad_norm", 0, "greater than 0"),
    ("train.deterministic", "yes", "must be a valid boolean"),
    ("train.epochs", [1], "must be a valid integer"),
    ("train.threads", 100_000, "less than or equal to 1024"),
    ("evaluate.max_windows", 0, "greater than or equal to 1"),
    ("variants.modes", [], "at least 1 item"),
    ("variants.modes", ["conventional", "conventional"], "must not repeat"),
    ("variants.inits", ["pretrained"], "must be 'finetune' or 'scratch'"),
]


def set_param(key: str, value: Any) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    *sections, last = key.split(".")
    part = params
    for name in sections:
        part = part.setdefault(name, {})
    part[last] = value
    Path("params.yaml").write_text(yaml.safe_dump(params))


def put(path: str, content: bytes | str) -> Callable[[], Any]:
    data = content.encode() if isinstance(content, str) else content
    return lambda: Path(path).write_bytes(data)


def put_file(path: str, text: str) -> Callable[[], Any]:
    """A file where a folder should be, or one in a folder that is not there yet."""

    def act() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)

    return act


def remove(path: str) -> Callable[[], Any]:
    return lambda: Path(path).unlink()


def folder(path: str) -> Callable[[], Any]:
    """A folder in place of a file."""

    def act() -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).mkdir(parents=True)

    return act


def pipe(path: str) -> Callable[[], Any]:
    """A named pipe in place of a file: who reads it waits for a writer."""

    def act() -> None:
        Path(path).unlink()
        os.mkfifo(path)

    return act


def cut(path: str, share: float = 0.5) -> Callable[[], Any]:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[: int(Path(path).stat().st_size * share)])


def flip(path: str, position: int = -9) -> Callable[[], Any]:
    def act() -> None:
        content = bytearray(Path(path).read_bytes())
        content[position] ^= 4
        Path(path).write_bytes(content)

    return act


def change(path: str, **values: Any) -> Callable[[], Any]:
    """Set keys of a JSON file, `a__b=…` for nested ones; `...` removes the key."""

    def act() -> None:
        content = json.loads(Path(path).read_text())
        for key, value in values.items():
            *sections, last = key.split("__")
            part = content
            for name in sections:
                part = part[name]
            if value is ...:
                del part[last]
            else:
                part[last] = value
        Path(path).write_text(json.dumps(content))

    return act


def param(key: str, value: Any) -> Callable[[], Any]:
    return lambda: set_param(key, value)


def both(*acts: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: [act() for act in acts]


def tensors(path: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    """Write a safetensors file again after `edit` of its tensors."""

    def act() -> None:
        from safetensors.torch import load_file, save_file

        content = load_file(path)
        edit(content)
        save_file(content, path, metadata={"format": "pt"})

    return act


def header(path: str, value: Any, size: int | None = None) -> Callable[[], Any]:
    """A safetensors file with this header; `size` lies about the header's length."""
    text = json.dumps(value).encode()
    return put(path, struct.pack("<Q", len(text) if size is None else size) + text + bytes(64))


def array(path: str, make: Callable[[np.ndarray], np.ndarray]) -> Callable[[], Any]:
    return lambda: np.save(path, make(np.load(path)), allow_pickle=True)


NAME = "encoder.block.0.layer.0.SelfAttention.q.weight"
WEIGHTS, CONFIG = "model/model.safetensors", "model/config.json"
ONE = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
STUDY = TINY  # what the copies start from

YAML: list[Bad] = [
    Bad("no params.yaml", remove("params.yaml"), CORPUS, "params.yaml: no such file"),
    Bad("params.yaml is a folder", folder("params.yaml"), CORPUS, "params.yaml: is a directory"),
    Bad("params.yaml empty", put("params.yaml", ""), CORPUS, "params.yaml: found None, must be a mapping"),
    Bad("params.yaml a list", put("params.yaml", "[1, 2]"), CORPUS, "must be a mapping"),
    Bad("params.yaml binary", put("params.yaml", b"\xff\xfe\x00\x01"), CORPUS, "not UTF-8"),
    Bad("params.yaml not YAML", put("params.yaml", "a: [1"), CORPUS, "not valid YAML"),
    Bad("params.yaml with a tab", put("params.yaml", "a:\n\t- 1"), CORPUS, "not valid YAML"),
    Bad("params.yaml runs code", put("params.yaml", "!!python/object/apply:os.system [id]"), CORPUS, "not valid YAML"),
    Bad("params.yaml twice a key", put("params.yaml", "seed: 1\nseed: 2\n"), CORPUS, "'seed' is there twice"),
    Bad("params.yaml deep", put("params.yaml", "[" * 4000), CORPUS, "not valid YAML"),
    Bad("params.yaml two documents", put("params.yaml", "a: 1\n---\nb: 2\n"), CORPUS, "not valid YAML"),
    Bad("octal to YAML 1.1", put("params.yaml", "seed: 010"), CORPUS, "line 1: found 010, which .* differently"),
    Bad("base 60 to YAML 1.1", put("params.yaml", "a:\n  lr: 1:30.5"), CORPUS, "line 2: found 1:30.5, which"),
    Bad("true to YAML 1.1", put("params.yaml", "train: {tf32: on}"), CORPUS, "line 1: found on, which"),
    Bad("half a character", put("params.yaml", r'tokens: {separator: "\ud800"}'), CORPUS, r"line 1: .*\\ud800', which"),
    Bad("control character", put("params.yaml", "seed: 1\a"), CORPUS, "special characters are not allowed"),
]

TEXT: list[Bad] = [
    Bad("no folder", param("corpus.path", "nowhere"), CORPUS, "corpus.path: nowhere is not a directory"),
    Bad("path of two lines", param("corpus.path", "no\nwhere"), CORPUS, r"corpus.path: no\\nwhere is not a directory"),
    Bad("path is a file", param("corpus.path", "params.yaml"), CORPUS, "corpus.path: params.yaml is not a directory"),
    Bad("no split", remove("text/test.txt"), CORPUS, "has neither test.txt nor test.parquet"),
    Bad("split twice", put("text/test.parquet", b"PAR1"), CORPUS, "has both test.txt and test.parquet"),
    Bad("split empty", put("text/validation.txt", ""), CORPUS, "validation: empty"),
    Bad("split blank", put("text/validation.txt", " \n\t\n"), CORPUS, "validation: empty"),
    Bad("split a folder", folder("text/test.txt"), CORPUS, "test.txt: cannot be read"),
    Bad("split a pipe", pipe("text/test.txt"), CORPUS, "test.txt: cannot be read"),
    Bad("binary", put("text/train.txt", bytes(range(256)) * 9), CORPUS, "train.txt: not UTF-8|a NUL byte"),
    Bad("invalid UTF-8", put("text/train.txt", b"good\nb\xc3\x28d\n"), CORPUS, r"not UTF-8 at byte 6 \(line 2\)"),
    Bad("NUL bytes", put("text/train.txt", "a\n\0b"), CORPUS, r"a NUL byte at byte 2 \(line 2\)"),
    Bad("UTF-16", put("text/train.txt", "text".encode("utf-16")), CORPUS, "is UTF-16"),
    Bad("latin-1", put("text/train.txt", "Müller\n".encode("latin-1")), CORPUS, "not UTF-8 at byte 1"),
    Bad("gzip", put("text/test.txt", b"\x1f\x8b\x08\x00\x00"), CORPUS, "test.txt: not UTF-8"),
    Bad(
        "parquet garbage",
        both(remove("text/test.txt"), put("text/test.parquet", b"PAR1 no PAR1")),
        CORPUS,
        "test.parquet: not a readable parquet",
    ),
    Bad("out is a file", put_file("taken", "x"), "corpus --out taken", "taken: cannot be written"),
    Bad("out below a file", put_file("taken", "x"), "corpus --out taken/a", "taken.*: cannot be written"),
    Bad("disk full", lambda: None, "corpus --out build/new", "build/new: writing failed", limit=2000),
]

TOKENIZERS: list[Bad] = [
    Bad("corpus gone", remove("build/corpus/train.parquet"), TOKENS, "train.parquet: no such file"),
    Bad("corpus tampered", cut("build/corpus/train.parquet"), TOKENS, "not a readable parquet"),
    Bad("corpus.json tampered", change("build/corpus/corpus.json", splits__train__sha256="0"), TOKENS, "not the text"),
    Bad("corpus.json a list", put("build/corpus/corpus.json", "[]"), TOKENS, "must be an object"),
    Bad("corpus.json infinite", put("build/corpus/corpus.json", '{"a": 1e999}'), TOKENS, "1e999 is not finite"),
    Bad("corpus.json NaN", put("build/corpus/corpus.json", '{"a": NaN}'), TOKENS, "not strict JSON"),
    Bad("corpus.json no split", change("build/corpus/corpus.json", splits__test=...), TOKENS, "the split 'test'"),
    Bad("tokenizer gone", remove("build/tokenizer/tokenizer.json"), TOKENS, "has neither tokenizer.json nor"),
    Bad("tokenizer cut", cut("build/tokenizer/tokenizer.json"), TOKENS, "cannot be loaded as a tokenizer"),
    Bad("tokenizer not JSON", put("tok/tokenizer.json", "x"), TOKENIZER, "tok: cannot be loaded as a tokenizer"),
    Bad("tokenizer a folder", folder("tok/tokenizer.json"), TOKENIZER, "has neither tokenizer.json nor spiece.model"),
    Bad("tokenizer nowhere", param("tokenizer.path", "../nowhere"), TOKENIZER, "is not a directory"),
    Bad("no pad", change("tok/tokenizer_config.json", pad_token=None), TOKENIZER, "has no pad token"),
    Bad("no eos", change("tok/tokenizer_config.json", eos_token=None), TOKENIZER, "has no eos token"),
    Bad(
        "tokenizer remote code",
        change("tok/tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
        TOKENIZER,
        "asks to run code of the repository",
    ),
    Bad(
        "spiece garbage",
        both(remove("tok/tokenizer.json"), remove("tok/tokenizer_config.json"), put("tok/spiece.model", b"\0\1\2")),
        TOKENIZER,
        "cannot be loaded as a tokenizer",
    ),
    Bad("text too short", both(param("tokens.block", 65536), param("tokens.window", 32)), TOKENS, "one block needs"),
    Bad("tokens disk full", lambda: None, "tokens --out build/new", "build/new: writing failed", limit=3000),
    Bad("tokenizer disk full", lambda: None, TOKENIZER, "writing failed|cannot be", limit=3000),
]

MODELS: list[Bad] = [
    Bad("no model", param("base.path", "nowhere"), BASE, "base.path: nowhere: is not a directory"),
    Bad("no config", remove(CONFIG), BASE, "has no config.json"),
    Bad("no weights", remove(WEIGHTS), BASE, "has no model.safetensors"),
    Bad(
        "pickle instead",
        both(remove(WEIGHTS), put("model/pytorch_model.bin", b"\x80\x04cos\nsystem\n")),
        BASE,
        "pytorch_model.bin is a pickle, which can run code",
    ),
    Bad("pickle as safetensors", put(WEIGHTS, b"\x80\x04cos\nsystem\n" * 20), BASE, "not a complete safetensors"),
    Bad("weights cut", cut(WEIGHTS), BASE, "not a complete safetensors"),
    Bad("weights empty", put(WEIGHTS, b""), BASE, "not a complete safetensors"),
    Bad("weights a folder", folder(WEIGHTS), BASE, "has no model.safetensors"),
    Bad("header too long", header(WEIGHTS, {}, 2**62), BASE, "not a complete safetensors"),
    Bad("header no JSON", put(WEIGHTS, struct.pack("<Q", 4) + b"{{{{"), BASE, "not a complete safetensors"),
    Bad("offsets out", header(WEIGHTS, {"w": {**ONE, "data_offsets": [0, 9999]}}), BASE, "not a complete safetensors"),
    Bad("offsets back", header(WEIGHTS, {"w": {**ONE, "data_offsets": [64, 0]}}), BASE, "not a complete safetensors"),
    Bad("tensors overlap", header(WEIGHTS, {"w": ONE, "v": ONE}), BASE, "not a complete safetensors"),
    Bad("shape too large", header(WEIGHTS, {"w": {**ONE, "shape": [2**40] * 2}}), BASE, "not a complete safetensors"),
    Bad("name climbs out", header(WEIGHTS, {"../../w": ONE}), BASE, "model.safetensors: lacks|has, but"),
    Bad("wrong shape", tensors(WEIGHTS, lambda t: t.update({NAME: t[NAME][:2].clone()})), BASE, "q.weight has shape"),
    Bad("a tensor missing", tensors(WEIGHTS, lambda t: t.pop(NAME)), BASE, "lacks encoder"),
    Bad("a tensor too many", tensors(WEIGHTS, lambda t: t.update(x=t[NAME].clone())), BASE, "does not know, x"),
    Bad("not finite", tensors(WEIGHTS, lambda t: t[NAME].fill_(float("nan"))), BASE, "not finite"),
    Bad("not floats", tensors(WEIGHTS, lambda t: t.update({NAME: t[NAME].int()})), BASE, "q.weight is I32, must be"),
    Bad("config cut", cut(CONFIG), BASE, "config.json: not strict JSON"),
    Bad("config of BERT", change(CONFIG, model_type="bert"), BASE, "model_type is 'bert', must be 't5'"),
    Bad("config without type", change(CONFIG, model_type=...), BASE, "model_type is None"),
    Bad("config runs code", change(CONFIG, auto_map={"AutoModel": "evil.Evil"}), BASE, "asks to run code"),
    Bad("config wrong type", change(CONFIG, d_model="wide"), BASE, "cannot be loaded as a T5"),
    Bad("config negative", change(CONFIG, num_layers=-1), BASE, "base.path: model|lacks|does not know"),
    Bad("config no start", change(CONFIG, decoder_start_token_id=None), BASE, "decoder_start_token_id is not set"),
    Bad("start no id", change(CONFIG, decoder_start_token_id=300), BASE, "is 300, its vocabulary has 300"),
    Bad("config huge", change(CONFIG, d_ff=2**20), BASE, "has shape"),
    Bad(
        "vocabulary too small",
        both(change(CONFIG, vocab_size=250), tensors(WEIGHTS, lambda t: t.update(_embeddings(t, 250)))),
        BASE,
        "its 300 ids do not fit the 250 embeddings",
    ),
    Bad("base disk full", lambda: None, BASE, "build/new-base: writing failed", limit=20_000),
]


def _embeddings(content: dict[str, Any], rows: int) -> dict[str, Any]:
    return {name: content[name][:rows].clone() for name in content if name in ("shared.weight", "lm_head.weight")}


TRAINING: list[Bad] = [
    Bad("another variant", lambda: None, "train finetune-magic --out results/v", "variant: found 'finetune-magic'"),
    Bad("variant climbs out", lambda: None, "train ../../etc --out results/v", "variant: found '../../etc'"),
    Bad("no tokens", remove("build/tokens/test.npy"), TRAIN, "test.npy: cannot be read"),
    Bad("tokens cut", cut("build/tokens/train.npy"), TRAIN, "train.npy: is not the file that its step wrote"),
    Bad("tokens changed", flip("build/tokens/train.npy"), TRAIN, "train.npy: is not the file that its step wrote"),
    Bad("tokens pickled", array("build/tokens/train.npy", lambda a: a.astype(object)), TRAIN, "is not the file"),
    Bad("tokens other type", array("build/tokens/test.npy", lambda a: a.astype(float)), TRAIN, "is not the file"),
    Bad("tokens.json gone", remove("build/tokens/tokens.json"), TRAIN, "tokens.json: no such file"),
    Bad("tokens.json cut", cut("build/tokens/tokens.json"), TRAIN, "tokens.json: not strict JSON"),
    Bad("tokens.json no split", change("build/tokens/tokens.json", splits__test=...), TRAIN, "recorded no sha256"),
    Bad("tokens.json no dtype", change("build/tokens/tokens.json", dtype=...), TRAIN, "does not describe the split"),
    Bad("base.json gone", remove("build/base/base.json"), TRAIN, "base.json: no such file"),
    Bad("base.json no hash", change("build/base/base.json", sha256=...), TRAIN, "recorded no sha256"),
    Bad("base.json a text", put("build/base/base.json", '"x"'), TRAIN, "must be an object"),
    Bad("base weights changed", flip("build/base/model.safetensors"), TRAIN, "model.safetensors: is not the file"),
    Bad("base weights gone", remove("build/base/model.safetensors"), TRAIN, "model.safetensors: cannot be read"),
    Bad("base config changed", change("build/base/config.json", d_ff=32), SCRATCH, "config.json: is not the file"),
    Bad("census gone", remove("build/analysis/census.json"), TRAIN, "census.json: no such file"),
    Bad("census no ratio", change("build/analysis/census.json", k_ratio=...), TRAIN, "found None as k_ratio"),
    Bad("memory a text", change("build/analysis/memory.json", peak_mib="much"), TRAIN, "found 'much' as peak_mib"),
    Bad("tokenizer gone", remove("build/tokenizer/tokenizer_config.json"), TRAIN, "tokenizer_config.json: no such"),
    Bad("float16 on a CPU", param("train.precision", "float16"), TRAIN, "train.precision: found fp16"),
    Bad("out is a file", put_file("results/v", "x"), TRAIN, "results/v: is a file"),
    Bad("curves is a file", put_file("build/curves/v", "x"), TRAIN, "build/curves/v: is a file"),
    Bad("checkpoints is a file", put_file("build/checkpoints", "x"), TRAIN, "checkpoints.*: cannot be written"),
    Bad("checkpoint disk full", lambda: None, SCRATCH, "step-.*: cannot be written .*earlier.*intact", limit=100_000),
]

# Command line, what the line says before it names the help, and the command whose help that is.
COMMANDS: list[tuple[str, str, str]] = [
    ("memory model --batch foo", "'--batch' / '-b': found 'foo', must be a valid integer", " memory"),
    ("train scratch-conventional --outt x", "no such option: --outt (Possible options: --out)", " train"),
    ("trian", "no such command 'trian', did you mean 'train'", ""),
    ("train scratch-conventional --out", "option '--out' requires an argument", " train"),
    ("train scratch-conventional", "missing option '--out'", " train"),
    ("memory", "missing argument 'model'", " memory"),
    ("memory one two three", "got unexpected extra argument(s) (two three)", " memory"),
    ("stages --check=yes", "option '--check' does not take a value", " stages"),
    ("--version=3", "option '--version' does not take a value", ""),
    (f"{SCRATCH} --gpus -1", "'--gpus': found '-1', must be greater than or equal to 0", " train"),
    (f"memory model --batch {'1' * 4999}x", "'--batch' / '-b': found '1111", " memory"),
    ("no-\x1b[31m", "no such command 'no-\\x1b[31m'", ""),
]

VARIANT = "results/finetune-conventional"
PUBLISHING: list[Bad] = [
    Bad("no weights", remove(f"{VARIANT}/model.safetensors"), EVALUATE, "has no model.safetensors"),
    Bad("weights cut", cut(f"{VARIANT}/model.safetensors"), EVALUATE, "cannot be loaded"),
    Bad("no record", remove(f"{VARIANT}/training_results.json"), EVALUATE, "training_results.json: no such file"),
    Bad("record lacks", change(f"{VARIANT}/training_results.json", test_metric=...), EVALUATE, "test_metric"),
    Bad("record lies", change(f"{VARIANT}/training_results.json", test_metric=1.5), EVALUATE, "training recorded 1.5"),
    Bad(
        "other weights",
        tensors(f"{VARIANT}/model.safetensors", lambda t: t["shared.weight"].mul_(0.5)),
        EVALUATE,
        "perplexity of the saved weights is",
    ),
    Bad(
        "variant runs code",
        change(f"{VARIANT}/config.json", auto_map={"AutoModel": "e.E"}),
        CHECK,
        "config.json is not the file that training wrote",
    ),
    Bad("weights changed", flip(f"{VARIANT}/model.safetensors"), RESULTS, "model.safetensors is not the trained file"),
    Bad("weights changed, card", flip(f"{VARIANT}/model.safetensors"), CARD, "is not the trained file"),
    Bad("seed changed", param("seed", 4), RESULTS, "stale, seed was 3, is 4"),
    Bad("lr changed", param("train.lr_scratch", 0.5), RESULTS, "stale, train.lr_scratch was"),
    Bad("tokens swapped", flip("build/tokens/test.npy"), RESULTS, "test.npy: is not the file that its step wrote"),
    Bad("evaluation gone", remove("build/evaluation/finetune-conventional.json"), RESULTS, "missing; make it"),
    Bad(
        "evaluation tampered",
        change("build/evaluation/finetune-conventional.json", weights_sha256="0" * 64),
        RESULTS,
        "made with other weights",
    ),
    Bad("results.json cut", cut("results/results.json"), CARD, "results.json: not strict JSON"),
    Bad("results.json tampered", change("results/results.json", seed="x"), CARD, "results.json: "),
    Bad("card edited", put("results/README.md", "# Mine\n"), CHECK, "README.md: "),
    Bad("a stranger's file", put("results/evil.bin", "x"), CHECK, "evil.bin: no part of a model repository"),
    Bad("a figure is text", put("results/figures/loss.png", "x"), CHECK, "loss.png: not a PNG"),
    Bad("a link", lambda: Path("results/link").symlink_to("/"), CHECK, "is a link"),
    Bad("for everybody", lambda: Path("results/README.md").chmod(0o666), CHECK, "is writable by everybody"),
    Bad("executable", lambda: Path(f"{VARIANT}/config.json").chmod(0o755), CHECK, "must be readable and not executabl"),
    Bad("results disk full", lambda: None, RESULTS, "results: writing failed", limit=2000),
    Bad("compare with nothing", lambda: None, "compare . nowhere", "nowhere"),
    Bad("classify a text", put("c.json", "x"), "classify c.json", "c.json"),
    Bad("classify nowhere", lambda: None, "classify ./nowhere", "nowhere"),
    Bad("memory of no batch", lambda: None, "memory build/base/config.json --batch 0", "batch: must be"),
    Bad("plan of no batch", lambda: None, "plan build/base/config.json --batch -1", "batch: must be"),
    Bad("plan of no target", lambda: None, "plan build/base/config.json --target 0", "target_length: must be"),
    Bad("budget unknown", lambda: None, "plan build/base/config.json --budget tiny", "budget: found 'tiny'"),
    Bad("evaluate no text", lambda: None, "evaluate results/finetune-conventional --text no.txt --gpus 0", "no.txt"),
]
