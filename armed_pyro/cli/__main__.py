"""``python -m armed_pyro.cli.app``, and with several processes ``torchrun -m armed_pyro.cli.app``."""

from armed_pyro.cli.app import app

if __name__ == "__main__":
    app()
