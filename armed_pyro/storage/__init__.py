"""A fit in a folder."""
