"""Is it the stock model, bit by bit? The self-check of an installation, and the comparison of any two set-ups."""
