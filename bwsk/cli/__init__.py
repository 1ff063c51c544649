"""The command line: the only part of bwsk that touches argv, and the seam that the workflow calls.

`main` turns a `BwskError` or an error of the operating system into one line on standard error and exit status 1. An
invalid command line gives such a line and exit status 2. Where status 1 is an answer (`ANSWERS`), errors give 2 too.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import Any, cast

# One module per group of commands; importing it registers its commands, in the order that `bwsk --help` shows.
GROUPS = ("models", "memory", "gradients", "data", "study", "publish", "versions", "tools")

# Commands whose exit status 1 says "different", as that of diff and cmp does.
ANSWERS = ("gradcheck",)


def main() -> None:
    """Run the `bwsk` command with `sys.argv`; exits the process."""
    try:
        _main()
    except KeyboardInterrupt:  # outside of a command; within one, typer exits with the same status
        sys.exit(128 + signal.SIGINT)


def _main() -> None:
    import typer

    from bwsk.cli.app import app
    from bwsk.errors import BwskError

    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # do not fail in a locale without these characters

    os.umask(os.umask(0o022) | 0o002)  # outputs must not be world-writable: `bwsk check` would refuse them
    for group in GROUPS:
        import_module(f"bwsk.cli.{group}")
    failed = 2 if sys.argv[1:2] and sys.argv[1] in ANSWERS else 1
    usage_error = cast(type[Exception], typer.BadParameter.__base__)  # UsageError has no public name in typer
    try:
        # Not standalone, where typer draws its errors as boxes.
        status = app(sys.argv[1:] or ["--help"], prog_name="bwsk", standalone_mode=False)
        sys.exit(status if sys.argv[1:] else 2)
    except usage_error as error:
        print(f"bwsk: error: {_usage(error)}", file=sys.stderr)
        sys.exit(2)
    except BwskError as error:
        print(f"bwsk: error: {_one_line(str(error))}", file=sys.stderr)
        sys.exit(failed)
    except (RuntimeError, MemoryError) as error:  # `train` reports more about it
        from bwsk.study.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print("bwsk: error: out of memory; free memory, or use a smaller batch (evaluate.batch_size)", file=sys.stderr)
        sys.exit(failed)
    except OSError as error:  # a full disk or missing permissions that no command handles itself
        if isinstance(error, BrokenPipeError):
            sys.exit(failed)
        where = f"{error.filename}: " if error.filename else ""
        found = _one_line(f"{where}{error.strerror or error}")
        print(f"bwsk: error: {found}; free space or fix permissions, then try again", file=sys.stderr)
        sys.exit(failed)


def _one_line(text: str) -> str:
    """The message as one printable line, with line feeds and escape sequences in quoted names escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _usage(error: Any) -> str:
    """One line for an invalid command line: the option, what was found, and which help to read."""
    if hasattr(error.__cause__, "errors"):  # pydantic's, with which typer converts values; typer omits the value
        first = error.__cause__.errors()[0]
        rule = first["msg"].partition(" should ")[2].partition(", unable")[0] or "be another"
        error.message = f"found {first['input']!r:.80}, must {rule}"
    found = " ".join(error.format_message().split()).removeprefix("Invalid value for ")
    found = found.rstrip(".?").replace("'. Did", "', did")
    # If an option has no value or one too many, typer does not name the command, which is the first word.
    words = ["bwsk", *(word for word in sys.argv[1:2] if not word.startswith("-"))]
    command = error.ctx.command_path if error.ctx else " ".join(words)
    return f"{found[0].lower()}{found[1:]}; see: {command} --help"
