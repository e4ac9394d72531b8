"""Concrete programs: networks joined with random effects, imported as ``armed_pyro.models``."""
