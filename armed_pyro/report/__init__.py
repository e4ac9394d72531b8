"""Text and HTML of finished tables."""
