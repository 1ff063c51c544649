"""How much memory will a training step take?"""
