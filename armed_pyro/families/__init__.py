"""p(y given its parameters), one file for each kind of outcome."""
