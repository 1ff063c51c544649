"""Parameters: what is accepted, and one line that names key, value and rule for everything else."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bwsk.errors import BwskError
from bwsk.study.params import Params, json_schema, load_params

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "params.yaml"
DEMO = ROOT / "demo" / "params.yaml"


def values(path: Path = DEMO) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def message(tmp_path: Path, text: str | bytes) -> str:
    """The error of a params.yaml with this text; it must be one."""
    path = tmp_path / "params.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BwskError) as caught:
        load_params(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}")
    return line.removeprefix(f"{path}").removeprefix(": ")


def replaced(key: str, value: Any) -> dict[str, Any]:
    """The demo's values with `section.key` set, or removed if the value is `...`."""
    changed = copy.deepcopy(values())
    *path, last = key.split(".")
    place = changed
    for part in path:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return changed


def test_the_published_study_is_as_published() -> None:
    params = load_params(PUBLISHED)
    assert params.corpus.model_dump() == {
        "source": "hub",
        "id": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "revision": "b08601e04326c79dfdd32d625aee71d232d685c3",
        "column": "text",
    }
    assert params.tokenizer.id == params.base.id == "google-t5/t5-small"  # type: ignore[union-attr]
    revision = "df1b051c49625cf57a3d0d8d3863ed4d13564fe4"
    assert params.tokenizer.revision == params.base.revision == revision  # type: ignore[union-attr]
    assert params.tokens.model_dump() == {"separator": "\n\n", "block": 512, "window": 512, "stride": 128}
    train = params.train
    assert (train.batch_size, train.epochs, train.max_steps) == (4, 10, None)
    assert (train.lr_finetune, train.lr_scratch) == (5e-5, 3e-4)
    assert (train.warmup, train.warmup_start, train.max_grad_norm) == (0.1, 0.1, 1.0)
    assert (train.betas, train.eps, train.weight_decay) == ([0.9, 0.999], 1e-8, 0.01)
    assert (train.precision, train.eval_every, train.patience) == ("fp16", 500, 3)
    assert params.variant_names == [
        "finetune-conventional",
        "finetune-bwsk-analyzed",
        "finetune-bwsk-reversible",
        "scratch-conventional",
        "scratch-bwsk-analyzed",
        "scratch-bwsk-reversible",
    ]
    assert params.split_variant("scratch-bwsk-analyzed") == ("scratch", "bwsk-analyzed")
    with pytest.raises(BwskError, match="variant: found 'scratch', this study has finetune-conventional"):
        params.split_variant("scratch")


def test_both_studies_write_every_key() -> None:
    """No value of a shipped study hides in a default."""
    for path in (PUBLISHED, DEMO):
        written, full = values(path), load_params(path).model_dump()
        assert set(written) == set(full)
        for section in ("tokens", "train", "evaluate", "variants"):
            assert set(written[section]) == set(full[section])


def test_the_schema_in_the_workflow_is_this_one() -> None:
    stored = json.loads((ROOT / "workflow" / "schemas" / "params.schema.json").read_text())
    assert stored == json_schema(), "run `make schema`"


BAD: list[tuple[str, Any, str]] = [
    ("trian", {}, "trian: unknown key, must be one of study, seed, corpus,"),
    ("train.learning_rate", 1.0, "train.learning_rate: unknown key, must be one of batch_size,"),
    ("corpus.path", "x", "corpus.path: unknown key, must be one of source"),
    ("base.architecture", ..., "base.architecture: missing, must be set"),
    ("study", ..., "study: missing, must be set"),
    ("study.repository", "no-slash", "study.repository: found 'no-slash', must match pattern"),
    ("study.repository", "../../etc/passwd", "study.repository: found '../../etc/passwd', must match pattern"),
    ("study.title", "", "study.title: found '', must have at least 1 character"),
    ("study.published", "bert", "study.published: found 'bert', must be 't5-small'"),
    ("seed", -1, "seed: found -1, must be greater than or equal to 0"),
    ("seed", 2**32, "seed: found 4294967296, must be less than or equal to 4294967295"),
    ("seed", True, "seed: found True, must be a valid integer"),
    ("corpus.source", "web", "corpus.source: found 'web', must be 'hub', 'directory', 'embedded'"),
    ("corpus.source", ..., "corpus.source: missing, must be set"),
    ("corpus", None, "corpus: found None, must be"),
    ("tokenizer.vocab_size", 10, "tokenizer.vocab_size: found 10, must be greater than or equal to 256"),
    ("tokenizer.vocab_size", "1024", "tokenizer.vocab_size: found '1024', must be a valid integer"),
    ("tokens.block", 63, "tokens.block: found 63, must be even, it is split in the middle"),
    ("tokens.window", 128, "tokens.window: found 128, must be at most block (64)"),
    ("tokens.stride", 65, "tokens.stride: found 65, must be at most window (64)"),
    ("tokens.stride", 0, "tokens.stride: found 0, must be greater than or equal to 1"),
    ("base.noise_density", 1.0, "base.noise_density: found 1.0, must be less than 1"),
    ("base.steps", 1.5, "base.steps: found 1.5, must be a valid integer"),
    ("variants.inits", ["pretrain"], "variants.inits.0: found 'pretrain', must be 'finetune' or 'scratch'"),
    ("variants.inits", [], "variants.inits: found [], must have at least 1 item"),
    ("variants.modes", ["conventional"] * 2, "variants.modes: found ['conventional', 'conventional'], must not repeat"),
    ("train.warmup", 1.5, "train.warmup: found 1.5, must be less than 1"),
    ("train.lr_scratch", "3e-4", "train.lr_scratch: found the text '3e-4', must be a number (YAML reads 3e-4 as"),
    ("train.budget", "0.5", "train.budget: found '0.5', must be a number without quotes (YAML reads 3e-1 as a text"),
    ("train.budget", "tiny", "train.budget: found 'tiny', must be fast, balanced, max, a fraction in (0, 1] or a size"),
    ("train.budget", 1.5, "train.budget: found 1.5, must be fast, balanced, max, a fraction in (0, 1] or a size"),
    ("train.lr_scratch", math.nan, "train.lr_scratch: found nan, must be"),
    ("train.lr_scratch", math.inf, "train.lr_scratch: found inf, must be a finite number"),
    ("train.lr_scratch", 0.0, "train.lr_scratch: found 0.0, must be greater than 0"),
    ("train.precision", "half", "train.precision: found 'half', must be 'fp32', 'bf16' or 'fp16'"),
    ("train.betas", [0.9], "train.betas: found [0.9], must have at least 2 items"),
    ("train.betas", [0.9, 1.0], "train.betas.1: found 1.0, must be less than 1"),
    ("train.deterministic", "yes", "train.deterministic: found 'yes', must be a valid boolean"),
    ("train.max_steps", 0, "train.max_steps: found 0, must be greater than or equal to 1"),
    ("evaluate.batch_size", [], "evaluate.batch_size: found [], must be a valid integer"),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD, ids=[f"{key}={value}"[:40] for key, value, _ in BAD])
def test_one_line_names_key_value_and_rule(key: str, value: Any, expected: str, tmp_path: Path) -> None:
    assert message(tmp_path, yaml.safe_dump(replaced(key, value))).startswith(expected)


def test_paths_must_be_paths(tmp_path: Path) -> None:
    for section in ("corpus", "tokenizer", "base"):
        for path in ("", " ", "a\0b"):
            line = message(tmp_path, yaml.safe_dump(replaced(section, {"source": "directory", "path": path})))
            assert line == f"{section}.path: found {path!r}, must be a path"


def test_an_unknown_key_comes_first_and_the_others_are_counted(tmp_path: Path) -> None:
    changed = replaced("train.batch_size", "many")
    changed["tokens"]["blok"] = 1
    assert message(tmp_path, yaml.safe_dump(changed)) == (
        "tokens.blok: unknown key, must be one of separator, block, window, stride (and 1 more)"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "found None, must be a mapping"),
        ("[1, 2]", "found [1, 2], must be a mapping"),
        ("hello", "found 'hello', must be a mapping"),
        ("a: [1", ", line 1: not valid YAML: "),
        ("a: b: c", ", line 1: not valid YAML: mapping values are not allowed here"),
        ("a:\n\t- b", ", line 2: not valid YAML: "),
        ("a: &x 1\nb: *y", ", line 2: not valid YAML: found undefined alias 'y'"),
        ("!!python/object/apply:os.system [echo hi]", ", line 1: not valid YAML: could not determine a constructor"),
        ("seed: 1\nseed: 2", "line 2: the key 'seed' is there twice, keep one"),
        ("study:\n  title: a\n  title: b", "line 3: the key 'title' is there twice"),
        ("? [1, 2]\n: 3", "not valid YAML: "),
        ("a: \x00", "not valid YAML: "),
        (b"a: caf\xe9", "not UTF-8 at byte 6; save it as UTF-8"),
        ("[" * 5000, "not valid YAML: "),
        ("a: 2024-13-45", "not valid YAML: "),
        ("1: 2", "1: unknown key, must be one of study,"),
        ("study: {7: 2}", "study.7: unknown key, must be one of title,"),
    ],
)
def test_files_that_are_no_parameters(text: str | bytes, expected: str, tmp_path: Path) -> None:
    assert expected in message(tmp_path, text)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BwskError, match="no such file; a study is a directory with a params"):
        load_params(tmp_path / "params.yaml")
    with pytest.raises(BwskError, match=r"is a directory; name the params\.yaml in it"):
        load_params(tmp_path)


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + DEMO.read_bytes().replace(b"\n", b"\r\n"))
    assert load_params(path) == load_params(DEMO)


def test_what_is_merged_in_is_no_second_key(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(DEMO.read_text().replace("\nevaluate:\n", "\nevaluate:\n  <<: {batch_size: 7, max_windows: 3}\n"))
    assert load_params(path).evaluate == load_params(DEMO).evaluate  # which sets both


def test_parameters_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_params(DEMO).seed = 3  # type: ignore[misc]


# --- property-based: any change of a valid file is accepted, or refused in one line ---

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in tree.items():
        found.append((*path, key))
        if isinstance(value, dict):
            found += leaves(value, (*path, key))
    return found


@settings(max_examples=250, deadline=None)
@given(st.sampled_from([PUBLISHED, DEMO]), st.data())
def test_any_value_anywhere(tmp_path_factory: pytest.TempPathFactory, source: Path, data: st.DataObject) -> None:
    tree = values(source)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(leaves(tree)))
        place = tree
        for part in path:
            place = place[part]
        match data.draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                place[last] = data.draw(anything)
            case "remove":
                del place[last]
            case "add":
                place[data.draw(st.text(max_size=10))] = data.draw(anything)
    text = yaml.safe_dump(tree, allow_unicode=True)
    path = tmp_path_factory.getbasetemp() / "params.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        params = load_params(path)
    except BwskError as error:
        line = str(error)
        assert "\n" not in line
        assert len(line) < 1000
        assert "input_value" not in line
        return
    # What is accepted is strict JSON and reads back as itself.
    dumped = params.model_dump()
    assert Params.model_validate(json.loads(json.dumps(dumped, allow_nan=False))) == params


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(data)
    with pytest.raises(BwskError) as caught:
        load_params(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 2000), st.integers(2, 2000), st.integers(1, 2000))
def test_lengths_that_fit_are_accepted_and_no_others(block: int, window: int, stride: int) -> None:
    fits = block % 2 == 0 and window % 2 == 0 and window <= block and stride <= window
    changed = replaced("tokens", {"separator": "\n\n", "block": block, "window": window, "stride": stride})
    if fits:
        assert Params.model_validate(changed).tokens.stride == stride
    else:
        with pytest.raises(ValueError, match="must be"):
            Params.model_validate(changed)


@pytest.mark.parametrize(("name", "short"), [("float32", "fp32"), ("bfloat16", "bf16"), ("float16", "fp16")])
def test_a_precision_may_have_the_name_of_its_dtype(tmp_path: Path, name: str, short: str) -> None:
    """Both names are the same study: the same identity, recorded under the short one."""
    from bwsk.study.provenance import identity

    found = []
    for written in (name, short):
        values = yaml.safe_load((ROOT / "demo" / "params.yaml").read_text())
        values["train"]["precision"] = values["evaluate"]["precision"] = written
        jsonschema.validate(values, json_schema())
        path = tmp_path / f"{written}.yaml"
        path.write_text(yaml.safe_dump(values))
        found.append(load_params(path))
    assert found[0] == found[1]
    assert found[0].train.precision == found[0].evaluate.precision == found[0].step["precision"] == short
    assert identity(found[0], "train", "scratch-conventional") == identity(found[1], "train", "scratch-conventional")
