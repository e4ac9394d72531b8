"""q, the approximate posterior."""
