"""Commands that make a study's data: corpus, tokenizer, tokens, base checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bwsk.cli.app import STEPS, app
from bwsk.cli.options import JsonFile, ParamsFile

_PARAMS = Path("params.yaml")
_CORPUS = Path("build/corpus")
_TOKENIZER = Path("build/tokenizer")
_TOKENS = Path("build/tokens")


@app.command(rich_help_panel=STEPS)
def corpus(
    out: Annotated[Path, typer.Option(help="Output folder of the splits.")] = _CORPUS,
    params_file: ParamsFile = _PARAMS,
) -> None:
    """Fetch or read the corpus and store its three splits."""
    from bwsk.study.corpus import make_corpus
    from bwsk.study.params import load_params

    info = make_corpus(load_params(params_file), out)
    for split, entry in info["splits"].items():
        typer.echo(f"corpus {info['name']}, {split}: {entry['rows']:,} rows, {entry['bytes']:,} bytes")


@app.command(rich_help_panel=STEPS)
def tokenizer(
    out: Annotated[Path, typer.Option(help="Output folder of the tokenizer.")] = _TOKENIZER,
    params_file: ParamsFile = _PARAMS,
    corpus: Annotated[
        Path | None, typer.Option(help="Folder written by `bwsk corpus`; needed to train a tokenizer.")
    ] = None,
) -> None:
    """Fetch, copy or train the tokenizer."""
    from bwsk.study.params import load_params
    from bwsk.study.tokenizer import make_tokenizer

    info = make_tokenizer(load_params(params_file), corpus, out)
    typer.echo(f"tokenizer {info['name']}: {info['vocab_size']:,} ids")


@app.command(rich_help_panel=STEPS)
def tokens(
    out: Annotated[Path, typer.Option(help="Output folder of the tokens (study).")] = _TOKENS,
    params_file: ParamsFile = _PARAMS,
    corpus: Annotated[Path, typer.Option(help="Folder written by `bwsk corpus` (study).")] = _CORPUS,
    tokenizer: Annotated[Path, typer.Option(help="Folder of a tokenizer.")] = _TOKENIZER,
    text: Annotated[Path | None, typer.Option(help="Only count the tokens of this UTF-8 text file.")] = None,
    json_file: JsonFile = None,
    block: Annotated[int, typer.Option(help="Tokens of a training block (--text).", min=1)] = 512,
    window: Annotated[int, typer.Option(help="Tokens of an evaluation window (--text).", min=1)] = 512,
    stride: Annotated[int, typer.Option(help="Distance between evaluation windows (--text).", min=1)] = 128,
    separator: Annotated[
        str, typer.Option(help="Text that joins the lines (--text).", show_default="a blank line")
    ] = "\n\n",
) -> None:
    """Tokenise the splits into blocks and windows.

    With --text, count the tokens of any text file instead. That needs a tokenizer but no study.
    """
    from bwsk.files import write_json

    if text is not None:
        from bwsk.study.tokens import count_text

        counts = count_text(text, tokenizer, separator, block, window, stride)
        _table([(text.name, counts)])
        if json_file is not None:
            write_json(json_file, counts)
        return
    from bwsk.study.params import load_params
    from bwsk.study.tokens import make_tokens

    info = make_tokens(load_params(params_file), corpus, tokenizer, out)
    _table(list(info["splits"].items()))
    if json_file is not None:
        write_json(json_file, info)


@app.command(rich_help_panel=STEPS)
def base(
    out: Annotated[Path, typer.Option(help="Output folder of the base checkpoint.")] = Path("build/base"),
    params_file: ParamsFile = _PARAMS,
    tokenizer: Annotated[Path, typer.Option(help="Folder written by `bwsk tokenizer`.")] = _TOKENIZER,
    tokens: Annotated[Path, typer.Option(help="Folder written by `bwsk tokens`.")] = _TOKENS,
    device: Annotated[str, typer.Option(help="Where to pretrain: cpu or cuda.")] = "cpu",
) -> None:
    """Fetch, check or pretrain the base checkpoint."""
    from bwsk.study.base_checkpoint import make_base_checkpoint
    from bwsk.study.params import load_params

    info = make_base_checkpoint(load_params(params_file), tokenizer, tokens, out, device)
    typer.echo(f"base {info['name']}: {info['parameters']:,} parameters, sha256 {info['sha256'][:12]}")


def _table(rows: list[tuple[str, dict[str, Any]]]) -> None:
    """Print a table of counts per split or file."""
    from bwsk.cli.output import console, numbers, table

    shown = table("")
    numbers(shown, "rows", "bytes", "tokens", "blocks", "windows")
    for name, entry in rows:
        counts = (entry[key] for key in ("rows", "bytes", "n_tokens", "n_blocks", "n_windows"))
        shown.add_row(name, *(f"{count:,}" for count in counts))
    console().print(shown)
