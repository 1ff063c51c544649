"""The command line: the only part of bwsk that touches argv, and the seam that the workflow calls.

`main` turns a `BwskError`, and what the operating system refuses, into one line on standard error and exit status 1.
"""

from __future__ import annotations

import sys
from importlib import import_module

# One module per group of commands; importing it registers its commands, in the order that `bwsk --help` shows.
GROUPS = ("models", "memory", "data", "study", "publish", "versions", "tools")


def main() -> None:
    """Run the `bwsk` command with `sys.argv`; exits the process."""
    from bwsk.cli.app import app
    from bwsk.errors import BwskError

    for group in GROUPS:
        import_module(f"bwsk.cli.{group}")
    try:
        app()
    except BwskError as error:
        print(f"bwsk: error: {error}", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:  # `train` has more to say about it
        from bwsk.faults import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print("bwsk: error: out of memory; free some, or set a smaller batch (evaluate.batch_size)", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a full disk or a missing right that no command has words of its own for
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        where = f"{error.filename}: " if error.filename else ""
        print(f"bwsk: error: {where}{error.strerror or error}; free space or set rights, then again", file=sys.stderr)
        sys.exit(1)
