"""The parameters of a study: the content of `params.yaml`, typed and validated in one place.

`params.yaml` is Snakemake's config and DVC's params; the JSON schema that Snakemake checks
(`workflow/schemas/params.schema.json`) is generated from the models below, so this file is the only definition.
Validation is strict. Unknown keys, texts where numbers belong (`3e-4` is a text to YAML 1.1: write `3.0e-4`) and
impossible values give one-line errors that name the key, what was found and what is allowed.
"""

from __future__ import annotations

import math
import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from bwsk.errors import BwskError
from bwsk.reversible.budget import parse_budget
from bwsk.units import DTYPES, PRECISIONS, Precision, short_precision

Init = Literal["finetune", "scratch"]
Mode = Literal["conventional", "bwsk-analyzed", "bwsk-reversible"]
# Either name of a precision may stand in params.yaml; the short one is what is computed and recorded with.
NamedPrecision = Annotated[
    Precision, BeforeValidator(short_precision), WithJsonSchema({"enum": [*PRECISIONS, *DTYPES], "type": "string"})
]
Backend = Literal["eager", "graph", "compile"]
SPLITS = ("train", "validation", "test")

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _is_plain_path(path: str) -> str:
    if "\0" in path or not path.strip():
        raise ValueError("must be a path")
    return path


def _is_budget(budget: str | float) -> str | float:
    if isinstance(budget, str) and _is_number(budget):
        # A fraction has only one spelling, so that Snakemake and DVC agree on whether it has changed.
        raise ValueError("must be a number without quotes (YAML reads 3e-1 as a text: 3.0e-1)")
    try:
        parse_budget(budget, lambda: 1.0)
    except BwskError:
        raise ValueError("must be fast, balanced, max, a fraction in (0, 1] or a size such as 900MiB") from None
    return budget


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


PathText = Annotated[str, AfterValidator(_is_plain_path)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StudyParams(_Section):
    """What the study is called and published as."""

    title: str = Field(description="Heading of the model card.", min_length=1)
    repository: str = Field(
        description="Hub repository of the results, used in the card's usage examples.",
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
    )
    published: Literal["t5-small"] | None = Field(
        default=None, description="Publication whose claims this study is compared with; null compares with none."
    )


class HubCorpus(_Section):
    """A dataset of the Hugging Face Hub, pinned by revision."""

    source: Literal["hub"]
    id: str = Field(min_length=1)
    config: str | None = None
    revision: str = Field(description="Commit of the dataset.", min_length=1)
    column: str = Field(default="text", min_length=1)


class DirectoryCorpus(_Section):
    """A local directory of {train,validation,test}.txt (a row per line) or .parquet (a row per record)."""

    source: Literal["directory"]
    path: PathText
    column: str = Field(default="text", description="Text column of the .parquet files.", min_length=1)


class EmbeddedCorpus(_Section):
    """English text that ships with every Python: the topics of `pydoc_data`, split by topic."""

    source: Literal["embedded"]


class HubTokenizer(_Section):
    """A tokenizer of the Hub, pinned by revision."""

    source: Literal["hub"]
    id: str = Field(min_length=1)
    revision: str = Field(min_length=1)


class DirectoryTokenizer(_Section):
    """A local directory with a saved tokenizer, or with a bare `spiece.model`."""

    source: Literal["directory"]
    path: PathText


class TrainedTokenizer(_Section):
    """A T5-style unigram tokenizer, trained on the study's own train split."""

    source: Literal["train"]
    vocab_size: int = Field(description="Pieces, special tokens included.", ge=256, le=1_000_000)


class TokensParams(_Section):
    """How a split becomes blocks (training) and windows (perplexity). Lengths are in tokens."""

    separator: str = Field(default="\n\n", description="Joins the rows of a split into one text.")
    block: int = Field(
        default=512, description="Training block; first half encoder, second half labels.", ge=2, le=2**24
    )
    window: int = Field(default=512, description="Evaluation window; split in the middle like a block.", ge=2)
    stride: Positive = Field(default=128, description="Distance of evaluation windows in the published protocol.")

    @model_validator(mode="after")
    def _lengths_fit(self) -> TokensParams:
        for name in ("block", "window"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name}: found {getattr(self, name)}, must be even, it is split in the middle")
        if self.window > self.block:
            raise ValueError(f"window: found {self.window}, must be at most block ({self.block})")
        if self.stride > self.window:
            raise ValueError(f"stride: found {self.stride}, must be at most window ({self.window})")
        return self


class HubBase(_Section):
    """A pretrained model of the Hub, pinned by revision."""

    source: Literal["hub"]
    id: str = Field(min_length=1)
    revision: str = Field(min_length=1)


class DirectoryBase(_Section):
    """A local directory with `config.json` and `model.safetensors`."""

    source: Literal["directory"]
    path: PathText
    id: str | None = Field(default=None, description="Name to report as base model; the directory's if null.")


class PretrainedBase(_Section):
    """A small T5, pretrained here by span corruption (Raffel et al. 2020, section 3.1.4) on the train split."""

    source: Literal["pretrain"]
    architecture: dict[str, int | float | str | bool] = Field(
        description="T5 configuration: d_model, d_ff, d_kv, num_layers, num_heads, … (vocab_size from the tokenizer)."
    )
    steps: Positive
    batch_size: Positive = 16
    input_length: int = Field(default=128, ge=8)
    noise_density: float = Field(default=0.15, gt=0.0, lt=1.0)
    mean_span_length: float = Field(default=3.0, ge=1.0)
    lr: float = Field(default=1.0e-3, gt=0.0)


class TrainParams(_Section):
    """The published training recipe. Steps are optimizer steps."""

    batch_size: Positive = 4
    epochs: Positive = 10
    max_steps: Positive | None = Field(default=None, description="Cap on steps; null runs all epochs.")
    lr_finetune: float = Field(default=5.0e-5, gt=0.0)
    lr_scratch: float = Field(default=3.0e-4, gt=0.0)
    warmup: Fraction = Field(default=0.1, description="Share of the steps with a linearly rising learning rate.")
    warmup_start: float = Field(default=0.1, description="First learning rate as a share of the full one.", gt=0, le=1)
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: float = Field(default=1.0e-8, gt=0.0)
    weight_decay: float = Field(default=0.01, ge=0.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    precision: NamedPrecision = Field(default="fp16", description="Autocast dtype; weights stay float32.")
    backend: Backend = Field(default="eager", description="How a step runs; graph and compile: see docs/benchmarks.md.")
    eval_every: Positive = Field(default=500, description="Steps between validations; each epoch's end has one too.")
    patience: Positive = Field(default=3, description="Validations in a row without a new best before stopping.")
    checkpoint_every: Positive = Field(default=500, description="Steps between checkpoints.")
    log_every: Positive = Field(default=50, description="Steps per point of the loss curve.")
    budget: Annotated[str | float, AfterValidator(_is_budget)] = Field(
        default="fast", description="Memory budget of the reversible engine."
    )
    deterministic: bool = Field(default=True, description="Deterministic kernels; same inputs, same bytes.")
    tf32: bool = Field(default=False, description="Allow TF32 matrix products on CUDA in float32.")
    threads: Positive = Field(default=2, description="CPU threads; part of the identity, bits depend on it.", le=1024)


class EvaluateParams(_Section):
    """How perplexities are computed, during training and after it."""

    batch_size: Positive = 32
    precision: NamedPrecision = "fp32"
    max_windows: Positive | None = Field(default=None, description="Only the first windows of a split; null is all.")


class VariantsParams(_Section):
    """The variants are all pairs `{init}-{mode}`."""

    inits: Annotated[list[Init], Field(min_length=1)] = list(get_args(Init))
    modes: Annotated[list[Mode], Field(min_length=1)] = list(get_args(Mode))

    @model_validator(mode="after")
    def _no_repeats(self) -> VariantsParams:
        for name in ("inits", "modes"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name}: found {values}, must not repeat")
        return self


class Params(_Section):
    """Everything that decides what a study computes; the whole of `params.yaml`."""

    study: StudyParams
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of every variant: they differ by mode alone.")
    corpus: Annotated[HubCorpus | DirectoryCorpus | EmbeddedCorpus, Field(discriminator="source")]
    tokenizer: Annotated[HubTokenizer | DirectoryTokenizer | TrainedTokenizer, Field(discriminator="source")]
    tokens: TokensParams = TokensParams()
    base: Annotated[HubBase | DirectoryBase | PretrainedBase, Field(discriminator="source")]
    variants: VariantsParams = VariantsParams()
    train: TrainParams = TrainParams()
    evaluate: EvaluateParams = EvaluateParams()

    @property
    def variant_names(self) -> list[str]:
        """`{init}-{mode}` of every variant, in the published order."""
        return [f"{init}-{mode}" for init in self.variants.inits for mode in self.variants.modes]

    @property
    def base_name(self) -> str:
        """What the base model is called in reports."""
        match self.base:
            case HubBase():
                return self.base.id
            case DirectoryBase():
                return self.base.id or PurePosixPath(self.base.path).name
            case PretrainedBase():
                return "a small T5 pretrained within the study"

    @property
    def step(self) -> dict[str, Any]:
        """The shape of a training step as arguments of `make_reversible` and `predict_memory`, without the batch."""
        half = self.tokens.block // 2
        return {"input_length": half, "target_length": half, "precision": self.train.precision}

    def split_variant(self, variant: str) -> tuple[Init, Mode]:
        """`finetune-bwsk-analyzed` -> (`finetune`, `bwsk-analyzed`); BwskError if the study has no such variant."""
        if variant not in self.variant_names:
            raise BwskError(f"variant: found {variant!r}, this study has {', '.join(self.variant_names)}")
        init, _, mode = variant.partition("-")
        return init, mode  # type: ignore[return-value]


# Spellings of numbers and booleans that YAML 1.1 (Snakemake, bwsk) and YAML 1.2 (DVC) read alike. Only in YAML 1.1 is
# 010 eight, 1:30 ninety and `on` true.
_READ_ALIKE = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)"),
    "tag:yaml.org,2002:float": re.compile(r"[^_:]*"),
    "tag:yaml.org,2002:bool": re.compile(r"true|false", re.IGNORECASE),
}


class _Loader(yaml.SafeLoader):
    """Refuses files that a reader, or DVC, would understand differently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # YAML silently takes the last of repeated keys. Merges (`<<`) are exempt, because their keys may be overridden.
        written = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in written]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise BwskError(f"line {_line(written[index])}: the key {key!r} is there twice, keep one")
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        alike = _READ_ALIKE.get(node.tag)
        if alike and not alike.fullmatch(value):
            raise BwskError(
                f"line {_line(node)}: found {value}, which YAML 1.1 and 1.2 read differently; "
                "write a plain decimal number, or true or false"
            )
        if re.search("[\ud800-\udfff]", value):
            raise BwskError(f"line {_line(node)}: found {value!r}, which is no text; write the characters themselves")
        return value


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def load_params(path: str | Path) -> Params:
    """Read and validate a `params.yaml`; raises a one-line BwskError if anything is wrong with it."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise BwskError(f"{path}: no such file; a study is a directory with a params.yaml") from None
    except IsADirectoryError:
        raise BwskError(f"{path}: is a directory; name the params.yaml in it") from None
    except UnicodeDecodeError as error:
        raise BwskError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise BwskError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        data = yaml.load(text, Loader=_Loader)
    except BwskError as error:
        raise BwskError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
        raise BwskError(f"{path}{where}: not valid YAML: {' '.join(str(problem).split())}") from None
    if not isinstance(data, dict):
        raise BwskError(f"{path}: found {_shown(data)}, must be a mapping of study, corpus, tokenizer, base, …")
    try:
        return Params.model_validate(data)
    except ValidationError as error:
        raise BwskError(f"{path}: {_one_line(error)}") from None


def json_schema() -> dict[str, Any]:
    """The JSON schema of `params.yaml`, as Snakemake checks it and editors complete from it."""
    schema = Params.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "BWSK study parameters"}


def _one_line(error: ValidationError) -> str:
    """The first of the errors as `key.path: found X, must …`, followed by the number of the others."""
    errors = error.errors(include_url=False)
    # An unknown key is usually misspelt. It comes first, because it explains the 'missing' error that goes with it.
    first = min(errors, key=lambda entry: entry["type"] not in _UNKNOWN_KEY)
    location = first["loc"]
    section, path = _section(location) if first["type"] not in _NO_SOURCE else (Params, str(location[0]))
    found, kind, context = first["input"], first["type"], first.get("ctx", {})
    match kind:
        case "extra_forbidden" | "invalid_key":
            message = f"{path}: unknown key, must be one of {', '.join(section.model_fields)}"
        case "missing":
            message = f"{path}: missing, must be set"
        case "literal_error":
            message = f"{path}: found {_shown(found)}, must be {context['expected']}"
        case "union_tag_invalid":
            message = f"{path}.source: found {_shown(context['tag'])}, must be {context['expected_tags']}"
        case "union_tag_not_found":
            message = f"{path}.source: missing, must be set"
        case "value_error":
            reason = str(context["error"])
            message = f"{path}.{reason}" if ": found" in reason else f"{path}: found {_shown(found)}, {reason}"
        case "float_type" | "float_parsing" if isinstance(found, str):
            message = f"{path}: found the text {_shown(found)}, must be a number (YAML reads 3e-4 as a text: 3.0e-4)"
        case _:
            rule = first["msg"].partition(" should ")[2] or first["msg"]
            message = f"{path}: found {_shown(found)}, must {rule}"
    more = len(errors) - 1
    return " ".join(message.split()) + (f" (and {more} more)" if more else "")


# `invalid_key`: a key that is not a string, e.g. a number.
_UNKNOWN_KEY = ("extra_forbidden", "invalid_key")
# For a section whose `source` is unknown or missing, pydantic's location ends at the section.
_NO_SOURCE = ("union_tag_invalid", "union_tag_not_found")


def _section(location: tuple[int | str, ...]) -> tuple[type[BaseModel], str]:
    """The model that holds the last key of a pydantic location, and the key path as the file's reader knows it."""
    if len(location) <= 1:
        return Params, ".".join(map(str, location))
    annotation = Params.model_fields[str(location[0])].annotation
    if isinstance(annotation, type):
        return annotation, ".".join(map(str, location))
    # In a section with a `source`, pydantic puts the chosen source between the section and its key.
    chosen = {get_args(member.model_fields["source"].annotation)[0]: member for member in get_args(annotation)}
    return chosen[location[1]], ".".join(map(str, (location[0], *location[2:])))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
