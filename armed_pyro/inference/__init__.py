"""Training of a bound program and its guide, and weighted or refined posterior draws."""
