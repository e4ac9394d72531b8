"""Explanations of a fitted network: by features, by layers, and by images."""
