"""Scripts a statistician would run, imported as ``armed_pyro.analysis``."""
