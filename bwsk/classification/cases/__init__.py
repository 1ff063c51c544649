"""Concrete operations that show what a rule says."""
