"""`python -m armed_pyro.cli`, and what torchrun starts."""

from armed_pyro.cli.app import app

if __name__ == "__main__":
    app()
