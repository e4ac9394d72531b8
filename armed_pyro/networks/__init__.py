"""Torch networks read and changed by hook, the adversary, networks by name."""
