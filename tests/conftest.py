"""What every test gets: one thread, no display, and a clean Pyro parameter store."""

import os

os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_global_parameters():
    """Fail a test that leaves parameters in Pyro's global store; the library keeps them local."""
    pyro.clear_param_store()
    yield
    left = sorted(pyro.get_param_store().keys())
    pyro.clear_param_store()
    if left:
        pytest.fail(
            f"parameters left in Pyro's global store: {left}; "
            "use pyro.settings.context(module_local_params=True) or modules",
            pytrace=False,
        )
