"""p(y | eta, parameters): one file for each kind of outcome."""
