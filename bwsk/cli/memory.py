"""Commands: memory."""
