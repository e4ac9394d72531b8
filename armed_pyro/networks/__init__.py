"""Torch networks read and modulated by hooks, the adversary, and networks by name."""
