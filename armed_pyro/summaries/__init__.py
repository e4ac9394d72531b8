"""Variance components and the ArviZ tree."""
