"""Variance components, random effects and the ArviZ tree."""
