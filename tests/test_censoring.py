"""Censored and truncated outcomes: their columns, likelihood and residuals."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import optimize, stats
from torch import nn

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, fit, model
from armed_pyro.checks.calibration import simulation_calibration
from armed_pyro.checks.simulation import check_censoring_is_known, observed_again
from armed_pyro.data.schema import Schema
from armed_pyro.families.piecewise import PiecewiseExponential
from armed_pyro.families.registry import family_named
from armed_pyro.priors import HalfNormal, Priors
from armed_pyro.random_effects.model_formula import ModelFormula
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.censoring import EVENT, INTERVAL, LEFT, RIGHT, Censoring
from armed_pyro.streaming.streamed_data import StreamedData

F64 = torch.float64
N = 200
CUTS = (0.5, 1.5, 4.0)


class Piecewise:
    """The piecewise-exponential distribution, from its cumulative hazard alone."""

    def __init__(self, rate, ratios):
        self.rate, self.ratios = rate, ratios

    def hazard(self, t):
        starts, ends = np.array([0.0, *CUTS]), np.array([*CUTS, np.inf])
        within = np.clip(t[:, None] - starts, 0, ends - starts)
        return self.rate * (within * self.ratios).sum(1)

    def logsf(self, t):
        return -self.hazard(np.maximum(t, 0))

    def cdf(self, t):
        return -np.expm1(self.logsf(t))

    def logpdf(self, t):
        piece = np.searchsorted(CUTS, t)
        return np.log(self.rate * self.ratios[np.arange(len(t)), piece]) + self.logsf(t)


def piecewise(eta, **steps):
    levels = np.cumsum([np.zeros_like(eta), *np.log(np.stack([*steps.values()]))], 0).T
    return Piecewise(np.exp(eta), np.exp(levels - levels.mean(1, keepdims=True)))


# The distribution of an exact outcome by scipy.
REFERENCES = {
    "gaussian": lambda eta, residual_sd: stats.norm(eta, residual_sd),
    "student": lambda eta, residual_scale, nu: stats.t(nu, eta, residual_scale),
    "gamma": lambda eta, shape: stats.gamma(shape, scale=np.exp(eta) / shape),
    "lognormal": lambda eta, residual_sd: stats.lognorm(residual_sd, scale=np.exp(eta)),
    "exponential": lambda eta: stats.expon(scale=np.exp(eta)),
    "weibull": lambda eta, shape: stats.weibull_min(shape, scale=np.exp(eta)),
    "weibull(hazard)": lambda eta, shape: stats.weibull_min(shape, scale=np.exp(-eta / shape)),
    "loglogistic": lambda eta, shape: stats.fisk(shape, scale=np.exp(eta)),
    "piecewise_exponential": piecewise,
}


class Drawn:
    """Random parameters, outcomes, statuses and entries of 200 rows."""

    def __init__(self, name, n=N, seed=0, late=True):
        rng = np.random.default_rng(seed)
        self.family = family_named(name)
        if isinstance(self.family, PiecewiseExponential):
            self.family = PiecewiseExponential(cuts=CUTS)
        self.eta = rng.normal(0.3, 0.8, n)
        self.values = {
            parameter.name: np.exp(rng.normal(0.3, 0.5, n)) + (parameter.name == "nu")
            for parameter in self.family.parameters
        }
        self.reference = REFERENCES[name](self.eta, **self.values)
        self.parameters = {k: torch.tensor(v) for k, v in self.values.items()}
        torch.manual_seed(seed)
        exact = Rows(torch.zeros(n, 0), None, {})
        tensor = torch.tensor(self.eta)[:, None]
        self.y = self.family.density(tensor, self.parameters, exact).sample().numpy()
        self.status = rng.integers(0, 4, n).astype(float)
        self.upper = np.where(self.status == INTERVAL, self.y + rng.gamma(1, 1, n) + 1e-3, self.y)
        least = self.y - 1 if name in ("gaussian", "student") else 0.0
        self.entry = least + 0.9 * rng.uniform(size=n) * (self.y - least)
        self.entry = np.where(rng.uniform(size=n) < 0.5, self.entry, -1e9)
        self.late = late

    def rows(self, dtype=F64):
        parts = [self.status, self.upper] + ([self.entry] if self.late else [])
        columns = torch.tensor(np.stack(parts, 1), dtype=dtype)
        return Rows(torch.zeros(len(self.y), 0), None, {}, censoring=columns)

    def log_prob(self, dtype=F64):
        parameters = {k: v.to(dtype) for k, v in self.parameters.items()}
        eta = torch.tensor(self.eta, dtype=dtype)[:, None]
        density = self.family.distribution(eta, parameters, self.rows(dtype))
        return density.log_prob(torch.tensor(self.y, dtype=dtype))

    def expected(self):
        made = self.reference
        ranges = np.log(np.maximum(made.cdf(self.upper) - made.cdf(self.y), 1e-300))
        value = np.select(
            [self.status == RIGHT, self.status == LEFT, self.status == INTERVAL],
            [made.logsf(self.y), np.log(made.cdf(self.y)), ranges],
            made.logpdf(self.y),
        )
        return value - (made.logsf(self.entry) if self.late else 0.0)


@pytest.mark.parametrize("late", [False, True], ids=["all", "late"])
@pytest.mark.parametrize("name", REFERENCES)
def test_the_likelihood_is_scipys_at_random_parameters(name, late):
    drawn = Drawn(name, late=late)
    assert set(drawn.status) == {RIGHT, EVENT, LEFT, INTERVAL}
    # Survivor functions by quadrature are less exact.
    close = 5e-5 if name in ("gamma", "student") else 1e-7
    np.testing.assert_allclose(drawn.log_prob().numpy(), drawn.expected(), rtol=1e-6, atol=close)


@pytest.mark.parametrize("name", REFERENCES)
def test_single_precision_agrees_with_double(name):
    drawn = Drawn(name, seed=1)
    for key in ("eta", "y", "upper", "entry"):  # the same inputs in both precisions
        setattr(drawn, key, getattr(drawn, key).astype(np.float32).astype(float))
    drawn.parameters = {k: v.float().double() for k, v in drawn.parameters.items()}
    exact = drawn.log_prob()
    single = drawn.log_prob(torch.float32).double()
    assert ((single - exact).abs() < 2e-4 * (1 + exact.abs())).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_gradients_agree_with_finite_differences(name):
    drawn = Drawn(name, n=24, seed=2)
    names, y = list(drawn.parameters), torch.tensor(drawn.y)

    def log_prob(eta, *values):
        parameters = dict(zip(names, values, strict=True))
        return drawn.family.distribution(eta, parameters, drawn.rows()).log_prob(y)

    inputs = [torch.tensor(drawn.eta)[:, None], *drawn.parameters.values()]
    inputs = [value.clone().requires_grad_(True) for value in inputs]
    assert torch.autograd.gradcheck(log_prob, inputs, rtol=1e-4, atol=1e-6)
    assert torch.autograd.gradgradcheck(
        lambda eta: log_prob(eta, *inputs[1:]), inputs[:1], rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["single", "double"])
@pytest.mark.parametrize("name", REFERENCES)
def test_extreme_predictors_have_finite_likelihoods_and_slopes(name, dtype):
    drawn = Drawn(name, n=40, seed=3)
    y = torch.tensor(drawn.y, dtype=dtype)
    parameters = {k: v.to(dtype) for k, v in drawn.parameters.items()}
    for value in (-12.0, 12.0):
        eta = torch.full((40, 1), value, dtype=dtype, requires_grad=True)
        log_prob = drawn.family.distribution(eta, parameters, drawn.rows(dtype)).log_prob(y)
        assert torch.isfinite(log_prob).all()
        (slope,) = torch.autograd.grad(log_prob.sum(), eta, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), eta)
        assert torch.isfinite(slope).all()
        assert torch.isfinite(second).all()


@pytest.mark.parametrize("name", REFERENCES)
def test_narrow_intervals_have_the_density_times_their_length(name):
    drawn = Drawn(name, seed=4, late=False)
    drawn.status[:] = INTERVAL
    drawn.upper = drawn.y + np.geomspace(1e-9, 1e-5, N) * np.abs(drawn.y)
    middle = drawn.reference.logpdf((drawn.y + drawn.upper) / 2)
    inside = np.min(np.abs(drawn.y[:, None] - CUTS), 1) > 1e-3  # the density jumps at cuts
    found = drawn.log_prob().numpy() - np.log(drawn.upper - drawn.y)
    np.testing.assert_allclose(found[inside], middle[inside], atol=1e-4)


@pytest.mark.parametrize("name", REFERENCES)
def test_residuals_of_censored_outcomes_are_uniform(name):
    """Outcomes are drawn, then only their being above, below or between limits is kept."""
    rng, n = np.random.default_rng(5), 4000
    drawn = Drawn(name, n=n, seed=5)
    limits = (
        np.sort(drawn.reference.ppf(rng.uniform(0.02, 0.98, (2, n))), 0)
        if name != ("piecewise_exponential")
        else np.sort(rng.exponential(1.0, (2, n)), 0)
    )
    y, (low, high) = drawn.y, limits
    kind = rng.integers(0, 3, n)
    drawn.status = np.select(
        [(kind == 1) & (y > high), (kind == 1) & (y < low), (kind == 2) & (y > low) & (y < high)],
        [RIGHT, LEFT, INTERVAL],
        EVENT,
    )
    drawn.y = np.select([drawn.status == RIGHT, drawn.status == LEFT], [high, low], y)
    drawn.y = np.where(drawn.status == INTERVAL, low, drawn.y)
    drawn.upper = np.where(drawn.status == INTERVAL, high, drawn.y)
    drawn.late = False
    eta = torch.tensor(drawn.eta)[:, None]
    args = torch.tensor(drawn.y), eta, drawn.parameters, drawn.rows()
    lower, upper = drawn.family.cdf_range(*args)
    assert min((drawn.status == s).mean() for s in (RIGHT, EVENT, LEFT, INTERVAL)) > 0.05
    assert (lower[drawn.status == RIGHT] > 0).all()
    assert (upper[drawn.status == RIGHT] == 1).all()
    assert (lower[drawn.status == LEFT] == 0).all()
    u = rng.uniform(lower, np.maximum(upper, lower))
    assert stats.kstest(u, "uniform").pvalue > 0.001


def test_residuals_of_late_entries_are_uniform():
    rng, n = np.random.default_rng(6), 4000
    eta, shape = rng.normal(0, 0.5, n), 1.4
    t = np.exp(eta) * rng.weibull(shape, n)
    entry = np.exp(eta) * rng.uniform(0, 1, n)
    kept = t > entry
    columns = np.stack([np.ones(n), t, entry], 1)[kept]
    rows = Rows(torch.zeros(kept.sum(), 0), None, {}, censoring=torch.tensor(columns))
    parameters = {"shape": torch.tensor(shape).double()}
    family, y = family_named("weibull"), torch.tensor(t[kept])
    lower, upper = family.cdf_range(y, torch.tensor(eta[kept])[:, None], parameters, rows)
    np.testing.assert_array_equal(lower, upper)
    assert stats.kstest(lower, "uniform").pvalue > 0.001
    alone = Rows(torch.zeros(kept.sum(), 0), None, {})
    ignored, _ = family.cdf_range(y, torch.tensor(eta[kept])[:, None], parameters, alone)
    assert stats.kstest(ignored, "uniform").pvalue < 1e-10


@pytest.mark.parametrize("name", [n for n in REFERENCES if n != "piecewise_exponential"])
def test_quantiles_are_scipys(name):
    drawn = Drawn(name, seed=7)
    share = torch.tensor(np.random.default_rng(7).uniform(size=N))
    density = drawn.family.density(torch.tensor(drawn.eta)[:, None], drawn.parameters, drawn.rows())
    expected = drawn.reference.ppf(share.numpy())
    np.testing.assert_allclose(density.quantile(share).numpy(), expected, rtol=1e-7)


def test_quantiles_means_and_draws_of_the_piecewise_exponential():
    drawn = Drawn("piecewise_exponential", n=6, seed=8)
    eta = torch.tensor(drawn.eta)[:, None]
    density = drawn.family.density(eta, drawn.parameters, drawn.rows())
    for share in (0.01, 0.4, 0.9, 0.999):
        at = density.quantile(torch.full((6,), share, dtype=F64))
        np.testing.assert_allclose(drawn.reference.cdf(at.numpy()), share, rtol=1e-9)
    y = density.sample((20_000,))
    error = y.std(0) / 20_000**0.5
    assert ((y.mean(0) - density.mean).abs() < 4 * error).all()


# --- columns --------------------------------------------------------------------------------------


def table():
    frame = pd.DataFrame({"time": [2.0, 3.0, 1.0, 4.0], "died": [1, 0, 1, 0], "g": list("abab")})
    frame["x"], frame["start"] = [0.1, 0.5, 0.3, 0.9], [0.0, 1.0, 0.5, 0.0]
    frame["until"] = [2.0, np.nan, 5.0, 4.5]
    return frame


ROLES = {"outcome": "time", "clusters": ["g"], "features": ["x"]}


def test_statuses_are_numbers_truth_values_or_texts():
    for values in ([1, 0, 1, 0], [True, False, True, False], ["event", "Right", "event", "right"]):
        data = ClusteredData.from_frame(table().assign(died=values), status="died", **ROLES)
        assert data.status.tolist() == [EVENT, RIGHT, EVENT, RIGHT]
    data = ClusteredData.from_arrays([[0.0]], [1.0], {"g": ["a"]}, status=["left"])
    assert data.status.tolist() == [LEFT]


def test_intervals_give_statuses():
    frame = table()
    frame.loc[2, "time"] = np.nan
    data = ClusteredData.from_frame(frame, upper="until", **ROLES)
    assert data.status.tolist() == [EVENT, RIGHT, LEFT, INTERVAL]
    assert data.outcome.tolist() == [2.0, 3.0, 5.0, 4.0]
    assert data.upper.tolist() == [2.0, 3.0, 5.0, 4.5]
    arrays = ClusteredData.from_arrays(
        np.zeros((4, 1)),
        [2.0, 3.0, -np.inf, 4.0],
        {"g": list("abab")},
        upper=[2.0, np.inf, 5.0, 4.5],
    )
    for name in ("outcome", "status", "upper"):
        assert getattr(arrays, name).tolist() == getattr(data, name).tolist()


@pytest.mark.parametrize(
    ("change", "roles", "message"),
    [
        ({"died": [1, 2, 1, 2]}, {"status": "died"}, "'died' has 2 in 2 row.*Subtract 1"),
        ({"died": [1, 0, 3, 0]}, {"status": "died"}, "has 3 in 1 row.*1 or True"),
        ({"died": list("yyny")}, {"status": "died"}, "has 'y', 'n' in 4 row"),
        ({"until": [1.0, 5, 5, 5]}, {"upper": "until"}, "upper end must be at least the lower"),
        ({"until": list("abcd")}, {"upper": "until"}, "'until' holds"),
        ({"start": [2.0, 0, 0, 0]}, {"entry": "start"}, "entry must be below the outcome"),
        ({}, {"status": "died", "upper": "until"}, "Give either a status, or the upper ends"),
        ({"died": [1, None, 1, 0]}, {"status": "died"}, "Missing values in 'died'"),
    ],
)
def test_columns_that_make_no_sense_are_refused(change, roles, message):
    with pytest.raises(ValueError, match=message):
        ClusteredData.from_frame(table().assign(**change), **roles, **ROLES)


def bind(frame, family, **roles):
    data = ClusteredData.from_frame(frame, **roles, **ROLES)
    return MixedEffects(nn.Linear(1, 1), "(1 | g)", family).bind(data)


@pytest.mark.parametrize(
    ("change", "family", "message"),
    [
        ({}, "poisson", "family 'poisson' has no censored outcomes"),
        ({"time": [-1.0, 1, 1, 1]}, "weibull", "family 'weibull' needs positive numbers"),
        ({"died": [0, 0, 0, 0]}, "weibull", "is censored in every row"),
    ],
)
def test_families_say_what_they_cannot_take(change, family, message):
    with pytest.raises(ValueError, match=message):
        bind(table().assign(**change), family, status="died")


def test_only_censored_programs_lose_the_exact_guide():
    assert bind(table(), "gaussian").family.is_quadratic
    bound = bind(table(), "gaussian", status="died").family
    assert not bound.is_quadratic
    assert str(bound) == "gaussian"
    assert bind(table(), "gaussian", entry="start").family.censored


def test_new_tables_need_no_status():
    data = ClusteredData.from_frame(table(), status="died", entry="start", **ROLES)
    new = ClusteredData.encode(table()[["x", "g"]], data.schema)
    assert new.outcome is None
    assert new.status is None
    known = ClusteredData.encode(table(), data.schema)
    assert known.status.tolist() == [1.0, 0.0, 1.0, 0.0]
    hole = table().assign(died=[1, None, 1, 0])
    assert ClusteredData.encode(hole, data.schema).outcome is None
    again = Schema.from_json(data.schema.to_json())
    assert (again.status, again.entry, again.upper) == ("died", "start", None)
    old = {k: v for k, v in data.schema.to_json().items() if k not in ("status", "upper", "entry")}
    assert Schema.from_json(old).status is None


@pytest.mark.parametrize(
    ("left", "roles"),
    [
        ("event(time, died)", {"status": "died"}),
        ("event(time, died, start)", {"status": "died", "entry": "start"}),
        ("interval(time, until)", {"upper": "until"}),
        ("interval(time, until, start)", {"upper": "until", "entry": "start"}),
        ("time | entry(start)", {"entry": "start"}),
        ("event(time, died) | weights(w)", {"status": "died", "weights": "w"}),
    ],
)
def test_formulas_name_the_columns(left, roles):
    read = ModelFormula.read(f"{left} ~ x + (1 | g)")
    assert read.outcome == "time"
    assert dict(read.roles) == roles


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ("event(time)", r"expected columns as in event\(time, status\)"),
        ("interval(log(time), until)", r"expected columns as in interval\(lower, upper\)"),
        ("event(time, died, start) | entry(start)", "names the entry twice"),
    ],
)
def test_formulas_that_make_no_sense_are_refused(left, message):
    with pytest.raises(ValueError, match=message):
        ModelFormula.read(f"{left} ~ x + (1 | g)")


def test_formula_and_arguments_are_the_same_model():
    by_formula = model("event(time, died, start) ~ x + (1 | g)", table(), family="weibull").data
    data = ClusteredData.from_frame(table(), status="died", entry="start", **ROLES)
    for name in ("outcome", "status", "entry"):
        assert torch.equal(getattr(by_formula, name), getattr(data, name))


# --- fits -----------------------------------------------------------------------------------------


def simulated(n=400, clusters=20, sd=0.0, seed=0, shape=1.5, slope=0.7):
    """Weibull times with a late entry, and censored from the right."""
    rng = np.random.default_rng(seed)
    n_all = 3 * n
    g, x = np.arange(n_all) % clusters, rng.normal(size=n_all)
    eta = 0.5 + slope * x + rng.normal(0, sd, clusters)[g]
    t = np.exp(eta) * rng.weibull(shape, n_all)
    entry, end = rng.uniform(0, 0.5, n_all), 0.5 + rng.exponential(4.0, n_all)
    seen = (t > entry).nonzero()[0][:n]
    frame = {"time": np.minimum(t, end), "died": (t <= end).astype(int), "start": entry}
    return pd.DataFrame({**frame, "x": x, "g": g}).iloc[seen].reset_index(drop=True)


def weibull_likelihood(theta, frame):
    """Minus the log-likelihood of intercept, slope and log shape, by scipy."""
    made = stats.weibull_min(np.exp(theta[2]), scale=np.exp(theta[0] + theta[1] * frame["x"]))
    value = np.where(frame["died"] == 1, made.logpdf(frame["time"]), made.logsf(frame["time"]))
    return -(value - made.logsf(frame["start"])).sum()


SMALL = Priors(sd=HalfNormal(0.01), fixed_sd=20.0)


@pytest.fixture(scope="module")
def fitted():
    return model(
        "event(time, died, start) ~ x + (1 | g)", simulated(), family="weibull", priors=SMALL
    ).fit(progress=False)


def test_without_random_effects_the_posterior_is_that_of_maximum_likelihood(fitted):
    best = optimize.minimize(weibull_likelihood, np.zeros(3), (simulated(),), method="BFGS")
    table, shape = fitted.fixed_effects().set_index("term"), fitted.draws(1000)["shape"]
    error = np.sqrt(np.diag(best.hess_inv))
    found = [*table["mean"], float(shape.log().mean())]
    spread = [*table["sd"], float(shape.log().std())]
    np.testing.assert_allclose((found - best.x) / error, 0, atol=0.2)
    np.testing.assert_allclose(spread / error, 1, atol=0.15)


def test_a_saved_fit_keeps_the_columns(fitted, tmp_path):
    fitted.save(tmp_path / "run")
    again = Fit.load(tmp_path / "run")
    assert again.model.family == fitted.model.family
    for name in ("status", "entry"):
        assert torch.equal(getattr(again.data, name), getattr(fitted.data, name))
    expected = fitted.to_datatree(groups=["log_likelihood"], draws=5)
    found = again.to_datatree(groups=["log_likelihood"], draws=5)
    np.testing.assert_array_equal(
        found["log_likelihood"]["time"], expected["log_likelihood"]["time"]
    )


def test_streamed_rows_are_those_in_memory(tmp_path):
    simulated().to_parquet(tmp_path / "rows.parquet")
    roles = {"status": "died", "entry": "start", **ROLES}
    streamed = StreamedData.scan(tmp_path / "rows.parquet", **roles)
    held = ClusteredData.from_frame(simulated(), **roles)
    schedule = Schedule(steps=150)
    program = MixedEffects(nn.Linear(1, 1), "(1 | g)", "weibull", priors=SMALL, bayesian_head=True)
    with streamed.encoded(["g"], 0) as encoded:
        kept = encoded.outcomes()
        for name in ("outcome", "status", "entry"):
            assert torch.equal(getattr(kept, name), getattr(held, name))
    results = [fit(program, rows, schedule=schedule, progress=False) for rows in (streamed, held)]
    first, second = (result.fixed_effects().set_index("term") for result in results)
    assert results[0].model.family.censored
    np.testing.assert_allclose((first["mean"] - second["mean"]) / second["sd"], 0, atol=0.3)


def test_adaptation_uses_the_censoring(fitted):
    """A cluster whose rows are all censored late lives longer than one with early events."""
    program = model("event(time, died) ~ 1 + (1 | g)", simulated(sd=1.0, seed=1), family="weibull")
    result = program.fit(schedule=Schedule(steps=100), progress=False)
    new = pd.DataFrame({"time": 1.0, "died": [0] * 5 + [1] * 5, "g": ["late"] * 5 + ["early"] * 5})
    table = result.adapt(new).table().set_index("cluster")
    assert table.loc["late", "mean"] > table.loc["early", "mean"] + 0.5
    exact = result.adapt(new.assign(died=1)).table().set_index("cluster")
    assert table.loc["late", "mean"] > exact.loc["late", "mean"] + 0.3


def test_detection_limits_do_not_bias_a_normal_mean():
    """Tobit: values below a limit are only known to be below it."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=300)
    y = 1 + x + rng.normal(size=300)
    frame = pd.DataFrame({"y": np.maximum(y, 0.5), "x": x, "g": np.arange(300) % 10})
    frame["seen"] = np.where(y > 0.5, "event", "left")
    result = model("event(y, seen) ~ x + (1 | g)", frame, priors=SMALL).fit(progress=False)

    def minus(theta):
        made = stats.norm(theta[0] + theta[1] * x, np.exp(theta[2]))
        return -np.where(y > 0.5, made.logpdf(y), made.logcdf(0.5)).sum()

    best = optimize.minimize(minus, np.zeros(3), method="BFGS")
    error = np.sqrt(np.diag(best.hess_inv))[:2]
    table = result.fixed_effects()
    np.testing.assert_allclose((table["mean"] - best.x[:2]) / error, 0, atol=0.2)
    np.testing.assert_allclose(table["sd"] / error, 1, atol=0.15)


def test_rows_of_exact_outcomes_stand_beside_censored_ones():
    like = torch.tensor([[0.0, 3.0, 1.0]])
    exact = Censoring.of(Censoring.exact(torch.tensor([2.0, 5.0]), like))
    assert exact.is_event.all()
    assert exact.entry.tolist() == [-np.inf, -np.inf]


def test_simulated_outcomes_are_censored_as_the_datas_are():
    data = ClusteredData.from_frame(table(), status="died", **ROLES)
    again = observed_again(data, torch.tensor([3.5, 2.0, 9.0, 9.0]).double())
    # Rows with an event could have been observed up to 4, the largest time.
    assert again.status.tolist() == [EVENT, EVENT, RIGHT, RIGHT]
    assert again.outcome.tolist() == [3.5, 2.0, 4.0, 4.0]
    left = ClusteredData.from_arrays([[0.0]], [1.0], {"g": ["a"]}, status=["left"])
    with pytest.raises(ValueError, match="censored by the same rule"):
        check_censoring_is_known(left)


def test_draws_are_above_their_entries():
    drawn = Drawn("weibull", n=50, seed=9)
    eta = torch.tensor(drawn.eta)[:, None]
    density = drawn.family.distribution(eta, drawn.parameters, drawn.rows())
    torch.manual_seed(0)
    y = density.sample((4000,)).numpy()
    assert (y >= drawn.entry).all()
    made, entry = drawn.reference, np.maximum(drawn.entry, 0)
    u = (made.cdf(y) - made.cdf(entry)) / made.sf(entry)
    assert stats.kstest(u.flatten()[::50], "uniform").pvalue > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("family", ["weibull", "weibull(hazard)", "loglogistic", "lognormal"])
def test_ranks_of_truths_are_uniform(family):
    """Simulation-based calibration with late entries and censoring."""
    frame = simulated(n=200, clusters=20, seed=11)
    data = ClusteredData.from_frame(frame, status="died", entry="start", **ROLES)
    program = MixedEffects(
        nn.Linear(1, 1),
        "(1 | g)",
        family,
        priors=Priors(sd=HalfNormal(0.5), fixed_sd=0.5, residual_sd=HalfNormal(1.0)),
        bayesian_head=True,
    )
    result = simulation_calibration(program, data, simulations=100, draws=99, progress=False)
    assert result.passed, str(result)
