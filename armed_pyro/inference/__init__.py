"""From a bound program and rows to posterior draws."""
