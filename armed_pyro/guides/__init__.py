"""Guides q(theta) q(u | theta), the approximate posteriors."""
