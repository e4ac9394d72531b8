"""Batches of rows as tensors, and the sources of batches."""
