"""Simulation-based calibration: exact posteriors pass, and every way of being wrong is seen."""

import json
import re
import sys
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from pyro.infer import Predictive
from torch import nn

from armed_pyro import (
    Adversary,
    ClusteredData,
    HalfNormal,
    Known,
    MixedEffects,
    Priors,
    Schedule,
)
from armed_pyro.checks import rank_tests as uniformity
from armed_pyro.checks.calibration import SimulationCalibration, simulation_calibration
from armed_pyro.checks.simulation import held
from armed_pyro.inference.train import train
from armed_pyro.inference.training_run import TrainingDiverged

SITES, PER_SITE, NOISE, EFFECT = 7, 4, 0.8, 1.1
TINY = Schedule(steps=3, window=3, stages=0)


def make_data(outcome=None, **roles):
    rng = np.random.default_rng(0)
    site = np.repeat(list("abcdefg"), PER_SITE)
    x = rng.normal(3, 2, size=(len(site), 1))
    y = 10 + x[:, 0] + rng.normal(size=len(site)) if outcome is None else outcome
    return ClusteredData.from_arrays(x, y, {"site": site}, feature_names=["x"], **roles)


def make_model(random="(1 | site)", family="gaussian", **options):
    """By default one whose posterior is known: all variances are."""
    known = Priors(sd=Known(EFFECT), residual_sd=Known(NOISE))
    settings = {"priors": known, "bayesian_head": True} | options
    return MixedEffects(nn.Linear(1, 1).double(), random, family, **settings)


@dataclass(frozen=True)
class Posterior:
    """N(mean, covariance) of the fixed effects and the sites' effects, in standardised units."""

    mean: torch.Tensor
    root: torch.Tensor
    known: dict
    narrowed: float = 1.0
    shifted: float = 0.0
    converged: bool = True

    def draws(self, n, *, seed):
        noise = torch.randn(
            n, len(self.mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        sd = self.root.square().sum(1).sqrt()
        values = self.mean + self.shifted * sd + self.narrowed * noise @ self.root.mT
        fixed, effects = values.split([2, SITES], 1)
        return self.known | {"fixed_effect": fixed[:, None], "site_effect": effects[..., None]}


def exact_fit(bound, data, *, schedule, seed, progress, refine=True, **wrong):
    """What `train` would give: the posterior in closed form."""
    facts, rows = bound.data_facts(), bound.encode(data).all()
    one = torch.ones(len(rows), 1, dtype=torch.float64)
    clusters = torch.eye(SITES, dtype=torch.float64)[rows.memberships["site"].position]
    design = torch.cat([one, rows.x, clusters], 1)
    target = (rows.y - facts.center[0]) / facts.spread
    effect, noise = EFFECT / facts.spread, NOISE / facts.spread
    prior = torch.tensor([bound.priors.fixed_sd] * 2 + [effect] * SITES, dtype=torch.float64)
    precision = design.mT @ design / noise**2 + torch.diag(prior**-2)
    covariance = torch.linalg.inv(precision)
    mean = covariance @ design.mT @ target / noise**2
    return Posterior(mean, torch.linalg.cholesky(covariance), bound.known(), **wrong)


def calibrate(monkeypatch, fit=exact_fit, model=None, data=None, **settings):
    monkeypatch.setattr("armed_pyro.checks.simulation.train", fit)
    data = make_data() if data is None else data
    settings = {"progress": False} | settings
    return simulation_calibration(make_model() if model is None else model, data, **settings)


def wrong_fit(**wrong):
    return lambda *args, **keywords: exact_fit(*args, **keywords, **wrong)


# -------------------------------------------------------------------------- right and wrong fits


def test_an_exact_posterior_passes(monkeypatch):
    result = calibrate(monkeypatch, simulations=200)
    assert result.passed, str(result)
    assert str(result).startswith("calibrated: 6 quantities in 200 simulations")
    table = result.table()
    assert (table["p_adjusted"] > 0.05).all()
    assert ((table["coverage_90"] - 0.9).abs() < 4 * table["se_90"]).all()
    assert (table["z_rank"].abs() < 4).all()


@pytest.mark.parametrize(
    ("wrong", "reading"),
    [
        ({"narrowed": 0.6}, "posteriors too narrow"),
        ({"narrowed": 1.7}, "posteriors too wide"),
        ({"shifted": 0.6}, "draws too high"),
        ({"shifted": -0.6}, "draws too low"),
    ],
)
def test_a_wrong_posterior_fails(monkeypatch, wrong, reading):
    result = calibrate(monkeypatch, wrong_fit(**wrong), simulations=100)
    assert not result.passed
    assert re.match(r"NOT calibrated: \d of 6 quantities in 100 simulations", str(result))
    assert reading in str(result)
    table = result.table().drop("log_likelihood")
    assert not table["passed"].any()
    assert not table["inside_band"].any()
    expected = np.array([0.5, 0.9])
    if "narrowed" in wrong:  # P(|N(0, 1)| < narrowed z), with z the quantile of |N(0, 1)|
        z = torch.tensor([0.674490, 1.644854]).double() * wrong["narrowed"]
        expected = torch.erf(z / 2**0.5).numpy()
    else:
        assert (np.sign(table["z_rank"]) == -np.sign(wrong["shifted"])).all()
        z = torch.tensor([0.674490, 1.644854]).double()
        normal = torch.distributions.Normal(0.0, 1.0)
        shift = wrong["shifted"]
        expected = (normal.cdf(z + shift) - normal.cdf(shift - z)).numpy()
    for column, error, value in zip(["50", "90"], [0.5, 0.3], expected, strict=True):
        found = table[f"coverage_{column}"].to_numpy()
        assert np.abs(found - value).max() < 4 * error / 100**0.5


def test_the_likelihood_shows_a_posterior_that_ignores_the_data(monkeypatch):
    """Draws of the prior have uniform ranks in every marginal."""

    def prior_fit(bound, data, **_):
        rows = replace(bound.encode(data).all(), y=None)

        class Prior:
            converged = True

            def draws(self, n, *, seed):
                with bound.seeded(seed):
                    sites = Predictive(bound, num_samples=n, parallel=True)(rows)
                return {k: sites[k] for k in ("fixed_effect", "site_effect")} | bound.known()

        return Prior()

    result = calibrate(monkeypatch, prior_fit, simulations=100)
    table = result.table()
    assert table.index[~table["passed"]].tolist() == ["log_likelihood"]


def test_failed_fits_are_counted(monkeypatch):
    def failing(every, first=2):
        count = iter(range(1000))

        def fit(bound, data, **keywords):
            if next(count) % every == first:
                raise TrainingDiverged("the loss diverged at step 7", None)
            return exact_fit(bound, data, **keywords)

        return fit

    one = calibrate(monkeypatch, failing(200), simulations=100)
    assert (one.simulations, one.failed, len(one.ranks)) == (100, 1, 99)
    assert 2 not in one.ranks.index
    assert one.passed
    assert "simulation 2: the loss diverged at step 7" in str(one)
    two = calibrate(monkeypatch, failing(80), simulations=100)
    assert (two.simulations, two.failed, len(two.ranks)) == (100, 2, 98)
    assert two.table()["passed"].all()
    assert not two.passed, "more than 1% failed"
    assert str(two).startswith("NOT calibrated")
    with pytest.raises(RuntimeError, match=r"all 10 fits failed.*simulation 0: the loss"):
        calibrate(monkeypatch, failing(1, first=0), simulations=10)


def test_draws_that_are_not_finite_count_as_failed(monkeypatch):
    result = calibrate(monkeypatch, wrong_fit(shifted=1.0), simulations=10)
    assert result.failed == 0
    broken = wrong_fit(shifted=float("nan"))
    with pytest.raises(RuntimeError, match=r"draws of site_effect\[a,Intercept\].*not finite"):
        calibrate(monkeypatch, broken, simulations=10)


def test_refined_and_unconverged_fits(monkeypatch):
    def fit(*args, refine, **keywords):
        narrowed = 1.0 if refine else 0.01
        exact = exact_fit(*args, **keywords)
        return Posterior(exact.mean, exact.root, exact.known, narrowed, converged=False)

    rough = calibrate(monkeypatch, fit, simulations=20, draws=19, refine=False)
    exact = calibrate(monkeypatch, simulations=20, draws=19)
    refined = calibrate(monkeypatch, fit, simulations=20, draws=19)
    assert refined.ranks.equals(exact.ranks)
    assert not rough.ranks.equals(exact.ranks)
    assert (exact.unconverged, rough.unconverged) == (0, 20)
    assert "20 fits had not converged" in str(rough)


# ------------------------------------------------------------------------------- the simulations


def test_the_seed_alone_decides_the_ranks(monkeypatch):
    model = make_model()

    def ranks(seed, surroundings):
        torch.manual_seed(surroundings)
        state = torch.get_rng_state()
        ranks = calibrate(monkeypatch, model=model, simulations=10, seed=seed).ranks
        assert torch.equal(torch.get_rng_state(), state)
        return ranks

    one = ranks(0, 1)
    assert one.equals(ranks(0, 2))
    assert not one.equals(ranks(1, 1))


def test_more_simulations_begin_with_the_same(monkeypatch):
    few, many = (calibrate(monkeypatch, simulations=n).ranks for n in (10, 15))
    assert many[:10].equals(few)


REAL = {
    "model": make_model(
        "(1 + x | site)", priors=Priors(sd=HalfNormal(1.0), residual_sd=HalfNormal(1.0))
    ),
    "data": make_data(),
    "simulations": 10,
    "draws": 9,
    "schedule": TINY,
    "progress": False,
}


@pytest.fixture(scope="module")
def real():
    """Real fits of few steps."""
    return simulation_calibration(**REAL)


def test_workers_do_not_matter(real):
    again = simulation_calibration(**REAL, workers=2)
    assert again.ranks.equals(real.ranks)
    assert again.unconverged == real.unconverged == 10


def test_the_facts_stay_those_of_the_data(monkeypatch):
    """Each fit gets the program as laid out, its network held, and nothing but a new outcome."""
    seen = []

    def fit(bound, data, **keywords):
        seen.append((bound, data))
        return exact_fit(bound, data, **keywords)

    net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    model = MixedEffects(
        net.double(),
        "(1 | site)",
        adversary=Adversary("site", ["0"]),
        priors=make_model().priors,
        fixed_weight=1.0,
    )
    data, before = make_data(), {k: v.clone() for k, v in net.state_dict().items()}
    calibrate(monkeypatch, fit, model, data, simulations=10)
    bound, simulated = seen[0]
    assert bound.data_facts().center == (pytest.approx(float(data.outcome.mean())),)
    assert bound.adversaries == ()
    assert bound.fixed_weight == 0
    assert torch.equal(simulated.features, data.features)
    assert not torch.equal(simulated.outcome, data.outcome)
    bound.train()  # as training does
    rows = bound.encode(simulated).all()
    once, again = (bound.predictor(rows, {}).eta for _ in range(2))
    assert torch.equal(once, again), "dropout or batch statistics are at work"
    assert not any(p.requires_grad for p in bound.network.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert net.training


def test_a_held_network_keeps_its_weights_in_a_real_fit():
    net = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    bound = held(MixedEffects(net, "(1 | site)"), make_data())
    train(bound, make_data(), schedule=TINY, progress=False)
    after = bound.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in net.state_dict().items())


def test_labels_of_all_quantities(real):
    ranks = real.ranks
    effects = [f"site_effect[{k},{term}]" for k in "adg" for term in ("Intercept", "x")]
    assert list(ranks) == [
        "site_sd[Intercept]",
        "site_sd[x]",
        "site_cor[Intercept,x]",
        *effects,
        "residual_sd",
        "fixed_effect[Intercept]",
        "fixed_effect[x]",
        "log_likelihood",
    ]
    assert ranks.index.tolist() == list(range(10))
    assert ((ranks >= 0) & (ranks <= 9)).all(axis=None)
    assert (ranks.std() > 0).all()


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"simulations": 9}, "`simulations` must be at least 10, not 9"),
        ({"draws": 8}, "`draws` must be at least 9, not 8"),
        ({"workers": 0}, "`workers` must be at least 1, not 0"),
        ({"seed": -1}, "`seed` must be at least 0, not -1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        simulation_calibration(make_model(), make_data(), **settings)


def no_fit(*_, **__):
    raise AssertionError("the fits began")


def test_nothing_latent(monkeypatch):
    model = MixedEffects(nn.Linear(1, 1), priors=Priors(residual_sd=Known(1.0)))
    with pytest.raises(ValueError, match=r"no latent site.*bayesian_head=True"):
        calibrate(monkeypatch, no_fit, model)


def test_weights(monkeypatch):
    weights = np.r_[0.0, np.ones(SITES * PER_SITE - 1)]
    data = make_data(weights=weights)
    assert len(calibrate(monkeypatch, data=data, simulations=10).ranks) == 10
    with pytest.raises(ValueError, match="weights other than 0 and 1"):
        calibrate(monkeypatch, no_fit, data=replace(data, weights=2 * data.weights))


COUNTS = np.random.default_rng(1).poisson(3.0, SITES * PER_SITE).astype(float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priors": Priors(sd=HalfNormal(50.0))}, r"site_sd\[Intercept\] ~ HalfNormal\(50\)"),
        ({"priors": Priors(sd=HalfNormal(0.1), fixed_sd=90.0)}, r"fixed_effect ~ .*fixed_sd=0.5"),
        ({"priors": Priors(sd=HalfNormal(0.1)), "bayesian_head": False}, "network, whose weights"),
    ],
)
@pytest.mark.parametrize("family", ["poisson", "negative_binomial"])
def test_absurd_priors(monkeypatch, family, options, message):
    model = make_model(family=family, **options)
    if "bayesian_head" in options:
        nn.init.constant_(model.network.bias, 900.0)
    with pytest.raises(ValueError, match=r"above 1e\+09 in \d+ of 20 simulations.*" + message):
        calibrate(monkeypatch, no_fit, model, make_data(COUNTS), simulations=20)


def test_outcomes_that_are_not_finite(monkeypatch):
    model = make_model(bayesian_head=False)
    nn.init.constant_(model.network.weight, float("inf"))
    with pytest.raises(ValueError, match=r"not finite or above .* 10 of 10 .*network"):
        calibrate(monkeypatch, no_fit, model, simulations=10)


# ------------------------------------------------------------------------------------ uniformity


@pytest.mark.parametrize("test", [uniformity.ecdf, uniformity.chi_square])
@pytest.mark.parametrize(("n", "draws"), [(300, 99), (60, 19), (200, 250)])
def test_false_alarms_are_as_frequent_as_they_should_be(test, n, draws):
    sets = np.random.default_rng(3).integers(draws, endpoint=True, size=(500, n))
    p = np.array([test(ranks, draws) for ranks in sets])
    for alpha in (0.01, 0.1, 0.5):
        error = np.sqrt(alpha * (1 - alpha) / 500)
        assert abs((p <= alpha).mean() - alpha) < 3.5 * error + 0.2 / n


@pytest.mark.parametrize(("n", "draws"), [(300, 99), (40, 15)])
def test_bars_stay_in_their_band(n, draws):
    edges = uniformity.bin_edges(n, draws)
    low, high = uniformity.bin_band(n, draws, 0.9)
    sets = np.random.default_rng(4).integers(draws, endpoint=True, size=(1000, n))
    bars = np.stack([np.histogram(ranks, edges)[0] for ranks in sets])
    outside = ((bars < low) | (bars > high)).any(1).mean()
    assert outside < 0.1 + 3 * np.sqrt(0.09 / 1000)


@pytest.mark.parametrize("draws", [9, 30, 99])
def test_coverage_of_uniform_ranks_is_exact(draws):
    for prob in (0.5, 0.9):
        found, error = uniformity.coverage(np.arange(draws + 1), draws, prob)
        assert found == pytest.approx(prob)
        assert error == pytest.approx(np.sqrt(prob * (1 - prob) / (draws + 1)))


def test_ties_are_broken_at_random():
    rng, draws = np.random.default_rng(0), np.zeros((9, 1))
    ranks = np.concatenate([uniformity.rank(np.zeros(1), draws, rng) for _ in range(2000)])
    counts = np.bincount(ranks, minlength=10)
    assert uniformity.chi_square(ranks, 9) > 0.001
    assert (counts > 0).all()


def test_holm():
    p = np.array([0.001, 0.3, 0.01, 0.04])
    assert uniformity.holm(p) == pytest.approx([0.004, 0.3, 0.03, 0.08])
    assert uniformity.holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------------------- the results


def make_result(n=200, quantities=3, seed=0, **more):
    rng = np.random.default_rng(seed)
    ranks = {f"site_effect[{k},Intercept]": rng.integers(100, size=n) for k in range(quantities)}
    return SimulationCalibration(pd.DataFrame(ranks).rename_axis("simulation"), 99, **more)


def test_verdict_over_many_quantities():
    """Holm's correction: a program of 30 quantities that is right passes with 90% and more."""
    passed = [
        bool(make_result(100, 30, seed).table(prob=0.9)["passed"].all()) for seed in range(60)
    ]
    assert np.mean(passed) > 0.9 - 3 * np.sqrt(0.09 / 60)


def test_json():
    result = make_result(errors=("simulation 200: it diverged",), unconverged=3)
    values = json.loads(json.dumps(result.to_json()))
    assert values["simulations"] == 201
    assert values["passed"] is True
    assert values["table"]["quantity"] == list(result.ranks)
    again = SimulationCalibration.from_json(values)
    pd.testing.assert_frame_equal(again.ranks, result.ranks)
    assert (again.draws, again.errors, again.unconverged) == (99, result.errors, 3)


def test_probability_out_of_range():
    with pytest.raises(ValueError, match="`prob` must lie between 0 and 1, not 99"):
        make_result().table(prob=99)


@pytest.mark.parametrize(("quantities", "shown"), [(1, 1), (6, 6), (30, 24)])
def test_figure(quantities, shown):
    result = make_result(quantities=quantities)
    name = result.ranks.columns[-1]
    narrow = np.random.default_rng(0).permutation(np.r_[:20, 80:100].repeat(5))
    result = replace(result, ranks=result.ranks.assign(**{name: narrow}))
    figure = result.plot()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    titles = {axes.get_title(): axes.title.get_color() for axes in panels}
    assert len(titles) == shown
    assert [title for title, color in titles.items() if color == "#c53030"] == [name]
    heights = panels[-1].patches[0].get_data().values
    assert heights.sum() == 200
    assert ("worst 24 of 30" in figure.get_supxlabel()) is (quantities == 30)
    figure.canvas.draw()


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*armed_pyro\[analysis\]"):
        make_result().plot()
