"""Batches, the loop, checkpoints, and one training from texts to a model."""
