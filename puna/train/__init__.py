"""Batches to updates to checkpoints: the loop, what it needs, and what it leaves behind."""
