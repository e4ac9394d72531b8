"""Densities, transforms and small linear algebra that know nothing of mixed models."""
