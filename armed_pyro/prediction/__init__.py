"""Predictions for rows of seen and new clusters."""
