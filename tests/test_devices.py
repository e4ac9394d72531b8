"""Fits on a GPU: tensors are made there and read from there. Without one, the tests are skipped."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from armed_pyro import Adversary, ClusteredData, Fit, MixedEffects, Schedule, Slopes, fit
from armed_pyro.data.grouping import Grouping
from armed_pyro.families.simulate import mixed_model
from armed_pyro.models.autoencoder import autoencoder_program
from armed_pyro.models.convolutional import convolutional_program
from armed_pyro.models.dense import dense

SHORT = Schedule(steps=60, window=10, stages=1)
BATCHES = Schedule(steps=120, window=10, stages=1, batch_size=24)


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nothing converges in so few steps
        yield


def simulated(family: str, seed: int = 1, n: int = 8) -> ClusteredData:
    coefficients = np.zeros((3, 2)) if family == "categorical" else (0.0, 0.5, -0.5)
    return mixed_model(family, n, 12, sd=(0.5,), coefficients=coefficients, seed=seed)[0]


def images() -> ClusteredData:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 1, 8, 8)).astype("float32")
    return ClusteredData.from_arrays(
        x, (rng.random(48) < 0.5).astype(float), {"site": rng.integers(6, size=48)}
    )


def crossed() -> ClusteredData:
    rng = np.random.default_rng(0)
    groups = {"g": rng.integers(8, size=96), "h": rng.integers(6, size=96)}
    return ClusteredData.from_arrays(rng.normal(size=(96, 2)), rng.normal(size=96), groups)


def linear(random: str, family: str = "gaussian", outputs: int = 1) -> MixedEffects:
    return MixedEffects(nn.Linear(2, outputs), random, family, bayesian_head=True)


def game() -> MixedEffects:
    net = dense(2, hidden=(8, 8))
    adversary = Adversary("site", taps=["1", "3"], weight=1.0)
    random = ["(1 | site)", Slopes("site", on="3")]
    return MixedEffects(net, random, "bernoulli", adversary, fixed_weight=0.5)


# Program, data, schedule.
PROGRAMS = {
    "slopes": (lambda: linear("(1 + x0 | site)"), lambda: simulated("gaussian"), SHORT),
    "counts": (lambda: linear("(1 | site)", "poisson"), lambda: simulated("poisson"), SHORT),
    "overdispersed": (
        lambda: linear("(1 + x1 || site)", "negative_binomial"),
        lambda: simulated("negative_binomial"),
        SHORT,
    ),
    "trials": (lambda: linear("(1 | site)", "binomial"), lambda: simulated("binomial"), SHORT),
    "classes": (
        lambda: linear("(1 | site)", "categorical", 3),
        lambda: simulated("categorical"),
        SHORT,
    ),
    "crossed": (lambda: linear("(1 | g) + (1 | h)"), crossed, SHORT),
    "game": (game, lambda: simulated("bernoulli"), BATCHES),
    "many clusters": (
        lambda: linear("(1 + x0 | site)"),
        lambda: simulated("gaussian", n=60),
        BATCHES,
    ),
    "images": (
        lambda: convolutional_program("site", (1, 8, 8), widths=(2, 4), units=4),
        images,
        BATCHES,
    ),
    "rebuilt images": (
        lambda: autoencoder_program("site", (1, 8, 8), widths=(3, 2), latents=3, units=4),
        images,
        BATCHES,
    ),
}


def fitted(name: str, **settings) -> tuple[Fit, ClusteredData]:
    program, data, schedule = PROGRAMS[name]
    rows = data()
    return fit(
        program(), rows, schedule=schedule, compile="never", progress=False, **settings
    ), rows


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fit_its_tables_and_its_file(name, tmp_path):
    found, rows = fitted(name, checkpoint=tmp_path / "checkpoint")
    resumed, _ = fitted(name, checkpoint=tmp_path / "checkpoint", resume=True)
    for one in (found, resumed):
        assert one.model.reference().is_cuda
        assert np.isfinite(one.history.loss).all()
    assert np.isfinite(found.variance_components()["mean"]).all()
    found.fixed_effects()
    assert len(found.diagnostics().checks)
    predicted = found.predict(rows, draws=20)
    assert np.isfinite(predicted.expected).all()
    assert "posterior" in found.to_datatree(draws=20)
    found.save(tmp_path / "fit", draws=20)
    loaded = Fit.load(tmp_path / "fit", PROGRAMS[name][0]().network)
    if found.refined is not None:  # other draws are those of the device's generator
        again = loaded.predict(rows, draws=20)
        np.testing.assert_allclose(again.expected, predicted.expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["slopes", "counts", "game"])
def test_new_clusters(name):
    found, _ = fitted(name)
    new = simulated(found.model.family.name, seed=2)
    labels = [f"new {label}" for label in new.grouping("site").labels()]
    support = replace(new, groupings={"site": Grouping.from_labels(labels)})
    for mode in ("population", "marginal", "membership", "nearest"):
        assert np.isfinite(found.predict(support, unseen=mode, draws=20).expected).all()
    adapted = found.predict(support, unseen="adapt", support=support, draws=20)
    assert np.isfinite(adapted.expected).all()
    assert found.adapt(support, draws=20, update_seen=name == "slopes") is not None


def test_a_fit_can_be_made_on_the_cpu_beside_a_gpu():
    found, _ = fitted("many clusters", refine=False, device="cpu")
    assert not found.model.reference().is_cuda


def test_nuts():
    found, _ = fitted("slopes")
    exact = found.refine("nuts", draws=8, warmup=4, chains=1, progress=False)
    assert np.isfinite(exact.variance_components()["mean"]).all()


def test_what_a_network_sees():
    found, _ = fitted("game")
    found.attribution(draws=10)
    found.invariance(permutations=5)
    found.boundaries(("x0", "x1"), size=5, draws=10)
    shown, _ = fitted("images")
    shown.attribution(draws=10)
    shown.attribution("grad_cam", layer="block2", draws=10)
    rebuilt, rows = fitted("rebuilt images")
    rebuilt.decoded(rows.take([0]), draws=10)
