"""The command line ``armed-pyro``."""

from armed_pyro.cli.app import app

__all__ = ["app"]
