"""Commands: publish."""
