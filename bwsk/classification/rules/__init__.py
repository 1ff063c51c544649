"""The published and the strict rule set."""
