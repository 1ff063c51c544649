"""Commands that train and evaluate the variants of a study."""
