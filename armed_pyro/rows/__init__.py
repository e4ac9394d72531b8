"""Rows as tensors: one batch, and the sources that batches come from."""
