"""What does a training step save, and what does it recompute?"""
