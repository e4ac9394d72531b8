"""Fits to tables that are larger than memory."""
