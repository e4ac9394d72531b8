"""Families of measurements, proportions and counts, with their links, against scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from armed_pyro import ClusteredData
from armed_pyro.families.links import BINARY_LINKS, MEAN_LINKS
from armed_pyro.families.registry import FAMILIES, family_named
from armed_pyro.rows.batch import Rows

F64 = torch.float64
N = 200
COUNTS = "whole numbers"


def beta_log(y, mu, phi):
    return stats.beta.logpdf(y, mu * phi, (1 - mu) * phi)


def betabinom_log(y, n, mu, phi):
    return stats.betabinom.logpmf(y, n, mu * phi, (1 - mu) * phi)


def nbinom_log(y, mu, size):
    return stats.nbinom.logpmf(y, size, size / (size + mu))


def inflated(log_f, log_zero, zi, y):
    return np.where(y == 0, np.log(zi + (1 - zi) * np.exp(log_zero)), np.log1p(-zi) + log_f)


def hurdle(log_f, log_zero, hu, y):
    return np.where(y == 0, np.log(hu), np.log1p(-hu) + log_f - np.log1p(-np.exp(log_zero)))


def gamma_log(y, mu, shape):
    return stats.gamma.logpdf(y, shape, scale=mu / shape)


LINKS = {
    "log": np.exp,
    "sqrt": np.square,
    "identity": lambda eta: eta,
    "softplus": lambda eta: np.log1p(np.exp(eta)),
    "logit": special.expit,
    "probit": special.ndtr,
    "cloglog": lambda eta: 1 - np.exp(-np.exp(eta)),
}
# log p(y | mu, trials, parameters), by the family's name; the mean is that of the default link.
REFERENCES = {
    "student": lambda y, mu, n, residual_scale, nu: stats.t.logpdf(y, nu, mu, residual_scale),
    "lognormal": lambda y, mu, n, residual_sd: stats.lognorm.logpdf(y, residual_sd, scale=mu),
    "gamma": lambda y, mu, n, shape: gamma_log(y, mu, shape),
    "exponential": lambda y, mu, n: stats.expon.logpdf(y, scale=mu),
    "weibull": lambda y, mu, n, shape: stats.weibull_min.logpdf(y, shape, scale=mu),
    "weibull(hazard)": lambda y, mu, n, shape: stats.weibull_min.logpdf(
        y, shape, scale=mu ** (-1 / shape)
    ),
    "gamma(softplus)": lambda y, mu, n, shape: gamma_log(y, mu, shape),
    "beta": lambda y, mu, n, phi: beta_log(y, mu, phi),
    "beta(probit)": lambda y, mu, n, phi: beta_log(y, mu, phi),
    "zero_one_inflated_beta": lambda y, mu, n, phi, zoi, coi: np.select(
        [y == 0, y == 1],
        [np.log(zoi * (1 - coi)), np.log(zoi * coi)],
        np.log1p(-zoi) + beta_log(np.where(y % 1 > 0, y, 0.5), mu, phi),
    ),
    "negative_binomial1": lambda y, mu, n, phi: nbinom_log(y, mu, mu / phi),
    "beta_binomial": lambda y, mu, n, phi: betabinom_log(y, n, mu, phi),
    "beta_binomial(cloglog)": lambda y, mu, n, phi: betabinom_log(y, n, mu, phi),
    "zero_inflated(poisson)": lambda y, mu, n, zi: inflated(
        stats.poisson.logpmf(y, mu), -mu, zi, y
    ),
    "zero_inflated(negative_binomial)": lambda y, mu, n, shape, zi: inflated(
        nbinom_log(y, mu, shape), nbinom_log(0 * y, mu, shape), zi, y
    ),
    "hurdle(poisson(sqrt))": lambda y, mu, n, hu: hurdle(stats.poisson.logpmf(y, mu), -mu, hu, y),
    "hurdle(negative_binomial1)": lambda y, mu, n, phi, hu: hurdle(
        nbinom_log(y, mu, mu / phi), nbinom_log(0 * y, mu, mu / phi), hu, y
    ),
    "hurdle(beta_binomial)": lambda y, mu, n, phi, hu: hurdle(
        betabinom_log(y, n, mu, phi), betabinom_log(0 * y, n, mu, phi), hu, y
    ),
    "hurdle(gamma)": lambda y, mu, n, shape, hu: hurdle(
        gamma_log(np.where(y > 0, y, 1), mu, shape), np.full(len(y), -np.inf), hu, y
    ),
    "hurdle(lognormal)": lambda y, mu, n, residual_sd, hu: hurdle(
        stats.lognorm.logpdf(np.where(y > 0, y, 1), residual_sd, scale=mu),
        np.full(len(y), -np.inf),
        hu,
        y,
    ),
    "poisson(sqrt)": lambda y, mu, n: stats.poisson.logpmf(y, mu),
    "poisson(softplus)": lambda y, mu, n: stats.poisson.logpmf(y, mu),
    "negative_binomial(identity)": lambda y, mu, n, shape: nbinom_log(y, mu, shape),
    "bernoulli(probit)": lambda y, mu, n: stats.bernoulli.logpmf(y, mu),
    "bernoulli(cloglog)": lambda y, mu, n: stats.bernoulli.logpmf(y, mu),
    "bernoulli(log)": lambda y, mu, n: stats.bernoulli.logpmf(y, mu),
    "binomial(probit)": lambda y, mu, n: stats.binom.logpmf(y, n, mu),
}
# Whose mean has no bound at 0, or is a log-median.
DEFAULTS = {"student": "identity", "lognormal": "log", "beta": "logit", "beta_binomial": "logit"}
SHARES = {"zi", "hu", "zoi", "coi"}


def link_of(name):
    words = name.rstrip(")").split("(")
    default = "logit" if "beta" in words[0] or words[0] == "binomial" else "log"
    if words[0] in ("hurdle", "zero_inflated"):
        default = DEFAULTS.get(words[1], "log")
    default = DEFAULTS.get(words[0], default)
    return words[-1] if words[-1] in LINKS else default


class Drawn:
    """Random parameters, predictors and outcomes of 200 rows."""

    def __init__(self, name, dtype=F64, n=N, seed=0):
        rng = np.random.default_rng(seed)
        self.family = family_named(name)
        eta = rng.normal(0.3, 1.0, n)
        if link_of(name) in ("sqrt", "identity") and name != "student":
            eta = 0.5 + np.abs(eta)
        if name == "bernoulli(log)":
            eta = -0.05 - np.abs(eta)
        self.values = {
            one.name: rng.uniform(0.05, 0.9, n)
            if one.name in SHARES
            else np.exp(rng.normal(0.7, 0.8, n)) + 0.3
            for one in self.family.parameters
        }
        self.trials = rng.integers(1, 30, n).astype(float)
        self.mu = LINKS[link_of(name)](eta)
        self.eta = torch.tensor(eta, dtype=dtype)[:, None]
        self.parameters = {k: torch.tensor(v, dtype=dtype) for k, v in self.values.items()}
        self.rows = Rows(torch.zeros(n, 0), None, {}, trials=torch.tensor(self.trials, dtype=dtype))
        torch.manual_seed(seed)
        self.density = self.family.distribution(self.eta, self.parameters, self.rows)
        self.y = self.density.sample()

    def at(self, row):
        """Eta, parameters and rows of a single row."""
        parameters = {name: value[row] for name, value in self.parameters.items()}
        return self.eta[row : row + 1], parameters, self.rows.trials[row : row + 1]


def rows_of(trials, n):
    return Rows(torch.zeros(n, 0), None, {}, trials=trials.expand(n))


@pytest.mark.parametrize("name", REFERENCES)
def test_log_density_is_scipys_at_random_parameters(name):
    drawn = Drawn(name)
    y = drawn.y.numpy()
    expected = REFERENCES[name](y, drawn.mu, drawn.trials, **drawn.values)
    found = drawn.density.log_prob(drawn.y).numpy()
    assert drawn.density.batch_shape == (N,)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", REFERENCES)
def test_single_precision_agrees_with_double(name):
    """Also where a parameter is so large that differences of lgamma would be lost to rounding."""
    drawn = Drawn(name)
    # The same inputs in both precisions.
    eta, y = drawn.eta.float(), drawn.y.float()
    kept = torch.isfinite(y) & ((y != 1) | (drawn.y == 1)) & ((y != 0) | (drawn.y == 0))
    for factor in (1.0, 1e5):
        single = {
            key: (value if key in SHARES else value * factor).float()
            for key, value in drawn.parameters.items()
        }
        double = {key: value.double() for key, value in single.items()}
        exact = drawn.family.distribution(eta.double(), double, drawn.rows).log_prob(y.double())
        rows = Rows(torch.zeros(N, 0), None, {}, trials=drawn.rows.trials.float())
        found = drawn.family.distribution(eta, single, rows).log_prob(y)
        # The size of a density's parts: log-odds times its precision.
        largest = max([value.max() for key, value in double.items() if key not in SHARES] or [1.0])
        inputs = "beta" in name or "gamma" in name
        scale = 1 + exact.abs() + (0.05 * float(largest) if inputs else 0.0)
        assert torch.isfinite(found[kept]).all()
        assert ((found - exact).abs() < 1e-4 * scale)[kept].all()


@pytest.mark.parametrize("name", REFERENCES)
def test_gradients_agree_with_finite_differences(name):
    drawn = Drawn(name, n=12, seed=1)
    names = list(drawn.parameters)

    def log_prob(eta, *values):
        parameters = dict(zip(names, values, strict=True))
        return drawn.family.distribution(eta, parameters, drawn.rows).log_prob(drawn.y)

    inputs = [drawn.eta, *drawn.parameters.values()]
    inputs = [value.clone().requires_grad_(True) for value in inputs]
    assert torch.autograd.gradcheck(log_prob, inputs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", REFERENCES)
def test_distribution_functions_are_integrals_of_the_density(name):
    drawn = Drawn(name, n=4, seed=2)
    if drawn.family.no_residuals:
        pytest.skip(drawn.family.no_residuals)
    for row in range(4):
        eta, parameters, trials = drawn.at(row)
        y = drawn.y[row : row + 1]
        lower, upper = drawn.family.cdf_range(y, eta, parameters, rows_of(trials, 1))

        def density(values, eta=eta, parameters=parameters, trials=trials):
            values = torch.as_tensor(np.atleast_1d(values), dtype=F64)
            n = len(values)
            made = drawn.family.distribution(eta.expand(n, 1), parameters, rows_of(trials, n))
            return made.log_prob(values).exp().numpy()

        if drawn.family.integer:
            mass = density(np.arange(float(y) + 1))
            expected, jump = mass.sum(), mass[-1]
        else:
            jump = upper[0] - lower[0]
            zero = density(0.0)[0] if "hurdle" in name or "inflated" in name else 0.0
            least = -np.inf if name == "student" else 0.0
            top = float(y) if jump == 0 or float(y) == 1 else 0.0
            inside = integrate.quad(lambda v: density(v)[0], least, top, limit=400)[0]
            one = density(1.0)[0] if float(y) == 1 and "inflated" in name else 0.0
            expected = zero + inside + one
            assert jump == pytest.approx({0.0: zero, 1.0: one}.get(float(y), 0.0), abs=1e-12)
        assert upper[0] == pytest.approx(expected, abs=2e-6)
        assert upper[0] - lower[0] == pytest.approx(jump, abs=1e-9)


@pytest.mark.parametrize("name", REFERENCES)
def test_means_variances_and_information_are_those_of_draws(name):
    drawn = Drawn(name, n=3, seed=3)
    n = 40_000
    for row in range(3):
        eta, parameters, trials = drawn.at(row)
        eta = eta if name == "bernoulli(log)" else 0.5 * eta
        # Fourth moments, and logs of proportions that are not 0, exist.
        parameters |= {key: parameters[key] + 5 for key in ("nu", "phi") if key in parameters}
        parameters |= {key: parameters[key] / 4 for key in ("residual_sd",) if key in parameters}
        one, many = rows_of(trials, 1), rows_of(trials, n)
        density = drawn.family.distribution(eta, parameters, one)
        torch.manual_seed(row)
        y = density.sample((n,))[:, 0]
        expected = drawn.family.expected(eta, parameters, one)
        assert expected.item() == pytest.approx(density.mean.item(), rel=1e-6)
        assert abs(y.mean() - expected).item() < 4 * y.std().item() / math.sqrt(n)
        square = (y - expected) ** 2
        error = 4.5 * square.std().item() / math.sqrt(n)
        assert abs(square.mean() - density.variance).item() < error
        wide = eta.expand(n, 1).clone().requires_grad_(True)
        log_prob = drawn.family.distribution(wide, parameters, many).log_prob(y)
        (score,) = torch.autograd.grad(log_prob.sum(), wide)
        information = drawn.family.information(eta, parameters, one)
        assert information.shape == (1, 1)
        squared = score**2
        bound = squared.mean() + 4.5 * squared.std() / math.sqrt(n)
        assert information <= bound + 1e-9
        # The lower bound of the linear variance has nearly all of the information.
        share = 0.5 if "binomial1" in name else 1.0
        assert information >= share * squared.mean() - 4.5 * squared.std() / math.sqrt(n) - 1e-9


@pytest.mark.parametrize("name", REFERENCES)
def test_draws_come_first(name):
    drawn = Drawn(name, n=4)
    parameters = {key: value[:2, None] for key, value in drawn.parameters.items()}
    eta = torch.stack([drawn.eta, drawn.eta + 0.1])
    if name == "bernoulli(log)":
        eta = eta - 0.2
    both = drawn.family.distribution(eta, parameters, drawn.rows)
    assert both.batch_shape == (2, 4)
    last = {key: value[1] for key, value in parameters.items()}
    one = drawn.family.distribution(eta[1], last, drawn.rows)
    torch.testing.assert_close(both.log_prob(drawn.y)[1], one.log_prob(drawn.y))
    expected = drawn.family.expected(eta, parameters, drawn.rows)
    torch.testing.assert_close(expected[1], drawn.family.expected(eta[1], last, drawn.rows))
    information = drawn.family.information(eta, parameters, drawn.rows)
    alone = drawn.family.information(eta[1], last, drawn.rows)
    torch.testing.assert_close(information.expand(2, 4, 1)[1], alone.expand(4, 1))
    expanded = one.expand((3, 4))
    torch.testing.assert_close(expanded.log_prob(drawn.y)[2], one.log_prob(drawn.y))


# --- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [*MEAN_LINKS, *BINARY_LINKS], ids=lambda one: type(one).__name__)
def test_links_are_monotone_with_their_inverse_and_derivative(link):
    eta = torch.linspace(-6, 3, 400, dtype=F64).requires_grad_(True)
    mean = link.inverse(eta)
    assert (mean.diff() >= 0).all()
    assert (mean > 0).all()
    (slope,) = torch.autograd.grad(mean.sum(), eta)
    torch.testing.assert_close(link.derivative(eta).detach(), slope, rtol=1e-6, atol=1e-12)
    inside = (mean > 1e-8) & (mean < 1 - 1e-8) if link in BINARY_LINKS else mean > 1e-8
    back = link.of(mean.detach())[inside]
    torch.testing.assert_close(back, eta.detach()[inside], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["single", "double"])
@pytest.mark.parametrize("link", BINARY_LINKS, ids=lambda one: type(one).__name__)
def test_logs_of_probabilities_are_finite_and_sum_to_one(link, dtype):
    eta = torch.tensor([-80.0, -20, -3, -0.7, -1e-4, 0, 0.5, 2, 4, 6], dtype=dtype)
    eta = eta.requires_grad_(True)
    inside, outside = link.log_sides(eta)
    assert torch.isfinite(inside).all()
    assert torch.isfinite(outside).all()
    torch.testing.assert_close(inside.exp() + outside.exp(), torch.ones_like(eta))
    torch.testing.assert_close(inside.exp(), link.inverse(eta))
    for side in (inside, outside):
        (slope,) = torch.autograd.grad(side.sum(), eta, retain_graph=True, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), eta, retain_graph=True)
        assert torch.isfinite(slope).all()
        assert torch.isfinite(second).all()
        # log mu and log(1 - mu) are concave, so that the guide's curvature is not negative.
        assert (second <= 1e-3).all()


@pytest.mark.parametrize("link", [*MEAN_LINKS, *BINARY_LINKS], ids=lambda one: type(one).__name__)
def test_marginal_means_are_those_of_draws(link):
    eta = torch.tensor([[0.6, 1.1]], dtype=F64) - (2.5 if link in BINARY_LINKS else 0)
    draws = eta + 0.5 * torch.randn(
        100_000, 2, dtype=F64, generator=torch.Generator().manual_seed(0)
    )
    values = link.inverse(draws).mean(1)
    expected = link.marginal_mean(eta, torch.tensor([0.25], dtype=F64))
    assert abs(values.mean() - expected).item() < 4 * values.std().item() / math.sqrt(100_000)


@pytest.mark.parametrize(
    ("name", "mean", "expected"),
    [
        # Nakagawa, Johnson and Schielzeth (2017), tables 1 and 2, or the delta method.
        ("poisson(sqrt)", 4.0, 0.25),
        ("negative_binomial(sqrt)", 4.0, 0.25 * (1 + 4 / 1.5)),
        ("negative_binomial1", 4.0, math.log(1 + 2.5 / 4)),
        ("gamma", 4.0, special.polygamma(1, 1.5)),
        ("lognormal", 4.0, 1.5**2),
        ("student", 4.0, 1.5**2 * 2.1 / 0.1),
        ("bernoulli(probit)", 0.4, 1.0),
        ("bernoulli(cloglog)", 0.4, math.pi**2 / 6),
        ("bernoulli(log)", 0.4, 0.6 / 0.4),
        ("beta", 0.4, special.polygamma(1, 0.6) + special.polygamma(1, 0.9)),
        ("zero_inflated(poisson)", 4.0, math.log(1 + (1 / 4 + 0.2) / 0.8)),
    ],
)
def test_residual_variances(name, mean, expected):
    family = family_named(name)
    parameters = {
        one.name: torch.tensor([0.2 if one.name in SHARES else 1.5]).double()
        for one in family.parameters
    }
    found = family.residual_variance(parameters, torch.tensor([mean]).double())
    assert found.item() == pytest.approx(expected, rel=1e-6)


# --- support, names -------------------------------------------------------------------------------


def data_of(y, **roles):
    n = len(y)
    return ClusteredData.from_arrays(
        np.zeros((n, 0)),
        np.array(y, float),
        {"site": np.arange(n) % 2},
        outcome_name="dose",
        **roles,
    )


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("student", [-1, 0, 1e9], None),
        ("lognormal", [1e-9, 3], 0.0),
        ("gamma", [1e-9, 3], -1.0),
        ("beta", [1e-9, 0.999], 1.0),
        ("zero_one_inflated_beta", [0, 1, 0.4], 1.1),
        ("negative_binomial1", [0, 5], 0.5),
        ("zero_inflated(poisson)", [0, 5], -1.0),
        ("hurdle(negative_binomial)", [0, 5], 2.5),
        ("hurdle(gamma)", [0, 1e-9, 4.5], -1e-9),
        ("poisson(identity)", [0, 5], -1.0),
    ],
)
def test_the_edges_of_the_support(name, good, bad):
    family = family_named(name)
    family.check(data_of(good))
    family.center(data_of(good))
    if bad is not None:
        with pytest.raises(ValueError, match=r"needs .*outside that range in 1 row\(s\), e.g. row"):
            family.check(data_of([*good, bad]))


def test_trials_of_overdispersed_counts():
    family_named("beta_binomial").check(data_of([0, 3], trials=[3, 3]))
    with pytest.raises(ValueError, match="outside that range"):
        family_named("beta_binomial").check(data_of([0, 4], trials=[3, 3]))
    with pytest.raises(ValueError, match="--trials"):
        family_named("zero_inflated(binomial)").check(data_of([0, 1]))


def test_nothing_but_zeros_cannot_be_modelled():
    with pytest.raises(ValueError, match=r"0 in every row.*'hurdle\(gamma\)'"):
        family_named("hurdle(gamma)").check(data_of([0, 0, 0]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bernoulli(loggit)", "link of family 'bernoulli'.*loggit"),
        ("gaussian(log)", "single link"),
        ("zero_inflated(gamma)", "family inside 'zero_inflated'"),
        ("hurdle(student)", "family inside 'hurdle'"),
        ("hurdle(gamma(sqrt))", "link of family 'gamma'"),
        ("hurdle((", "unknown family"),
        ("zip", r"did you mean 'zero_inflated\(poisson\)'"),
        ("nbinom1", "did you mean 'negative_binomial1'"),
    ],
)
def test_unknown_names_are_errors(name, message):
    with pytest.raises(ValueError, match=message):
        family_named(name)


def test_names_of_families_with_links_and_families_inside():
    for name in REFERENCES:
        family = family_named(name)
        assert family_named(str(family)) == family
    assert str(family_named("bernoulli(logit)")) == "bernoulli"
    assert family_named("hurdle( gamma (softplus) )").base.link == "softplus"
    assert family_named("poisson").coefficient_ratio == "incidence-rate ratio"
    assert family_named("poisson(sqrt)").coefficient_ratio == ""
    assert family_named("bernoulli(cloglog)").coefficient_ratio == "hazard ratio"
    assert {"student", "hurdle"} <= set(FAMILIES)


def test_centres_are_the_links_of_the_means():
    y = [0, 1, 5, 9, 0, 3]
    offset = np.full(6, 0.7)
    for name, expected in (
        ("poisson(sqrt)", math.sqrt(3)),
        ("poisson(identity)", 3.0),
        ("negative_binomial1", math.log(3)),
    ):
        assert family_named(name).center(data_of(y)).item() == pytest.approx(expected)
        shifted = family_named(name).center(data_of(y, offset=offset))
        assert shifted.item() == pytest.approx(expected - 0.7)
    # Of families with zeros of their own, it is that of the positive outcomes.
    assert family_named("hurdle(gamma)").center(data_of(y)).item() == pytest.approx(math.log(4.5))
    # Outliers move neither the centre nor the scale of Student's t.
    for y in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5e9]):
        assert family_named("student").center(data_of(y)).item() == 3
        assert family_named("student").spread(data_of(y)) == pytest.approx(1.4826)
