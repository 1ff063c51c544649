"""The engine for T5 and its relatives."""
