"""`python -m bwsk` is the `bwsk` command."""

from bwsk.cli import main

main()
