"""The publication's workflow: corpus, tokens, training, evaluation, results, model card."""
