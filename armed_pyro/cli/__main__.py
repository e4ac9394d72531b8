"""``python -m armed_pyro.cli``, and with several processes ``torchrun -m armed_pyro.cli``."""

from armed_pyro.cli import app

if __name__ == "__main__":
    app()
