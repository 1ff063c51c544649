"""How much memory does a training step take?"""
