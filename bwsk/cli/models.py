"""Commands: models."""
