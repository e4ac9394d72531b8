"""Settings of a program chosen by cross-validation."""
