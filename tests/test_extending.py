"""A family and a covariance defined here alone are fitted, checked, predicted with and saved."""

import ast
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

from armed_pyro import (
    ClusteredData,
    Fit,
    HalfNormal,
    MixedEffects,
    RandomEffects,
    Schedule,
    Slopes,
    fit,
)
from armed_pyro.families.family import Family, Parameter, arrays, mean_offset, outcome_of
from armed_pyro.families.gaussian import ResidualSd
from armed_pyro.families.registry import FAMILIES, family_named
from armed_pyro.families.simulate import mixed_model
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.guides.structured import StructuredGuide
from armed_pyro.priors import ScalePrior
from armed_pyro.random_effects.covariance import COVARIANCES, Covariance, covariance_named
from armed_pyro.random_effects.formula import parse_terms
from armed_pyro.rows.batch import Rows

LIBRARY = Path(__file__).resolve().parents[1] / "armed_pyro"
MODELS = Path(__file__).resolve().parents[1] / "models"

# --- a family -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Width(Parameter):
    """Scale of a logistic distribution."""

    prior: ScalePrior
    name = "width"
    start = 0.4

    def sample(self, priors, unit):
        return self.prior.sample(self.name, self.prior.scales([""], unit, 1.0)[0])

    def describe(self, priors, spread):
        return self.prior.describe(self.prior.scale or spread)

    def original(self, value, spread):
        return value * spread


@dataclass(frozen=True)
class Logistic(Family):
    """y = eta + shift + width * e with e ~ Logistic(0, 1)."""

    shift: float = 0.0
    prior: ScalePrior = field(default_factory=lambda: HalfNormal(3.0))

    name = "logistic"
    support = "finite numbers"

    @property
    def parameters(self):
        return (Width(self.prior),)

    def outside(self, y, data):
        return ~torch.isfinite(y)

    def center(self, data):
        return (outcome_of(data).median() - self.shift - mean_offset(data)).reshape(1)

    def spread(self, data):
        return float(outcome_of(data).std())

    def effect_scale(self):
        return 1.0

    def precision(self, parameters):
        width = parameters.get("width")
        return None if width is None else 1 / (3 * width**2)

    def distribution(self, eta, parameters, rows):
        width = self.value(parameters, "width")
        location, width = torch.broadcast_tensors(self.mean(eta, rows), width)
        logistic = [dist.transforms.SigmoidTransform().inv]
        unit = dist.Uniform(torch.zeros_like(location), torch.ones_like(location))
        moved = dist.transforms.AffineTransform(location, width)
        return dist.TransformedDistribution(unit, [*logistic, moved])

    def mean(self, eta, rows):
        return eta[..., 0] + self.shift

    def residual_variance(self, parameters, mean):
        return (self.value(parameters, "width") * np.pi) ** 2 / 3

    def residual_rows(self, parameters):
        return {"width": self.value(parameters, "width")}

    def cdf(self, y, eta, parameters, rows):
        given = arrays(y, self.mean(eta, rows), self.value(parameters, "width"))
        return torch.from_numpy(stats.logistic.cdf(*given))


# --- a covariance -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchangeable(Covariance):
    """Every two effects have the same correlation, rho ~ Beta(1, b)."""

    b: float = 2.0
    name = "exchangeable"

    def sites(self, group):
        return (group.site("rho"),)

    def sample(self, group, like):
        (site,) = self.sites(group)
        return {site: pyro.sample(site, dist.Beta(like.new_tensor(1.0), like.new_tensor(self.b)))}

    def cholesky(self, group, latents):
        rho = latents[self.sites(group)[0]][..., None, None]
        eye = torch.eye(len(group.terms), dtype=rho.dtype)
        return torch.linalg.cholesky(rho + (1 - rho) * eye)

    def describe(self, group):
        return {self.sites(group)[0]: f"Beta(1, {self.b:g})"}

    def starts(self, group):
        return {self.sites(group)[0]: torch.tensor(0.2, dtype=torch.float64)}

    def quantities(self, group, latents):
        return {"rho": latents[self.sites(group)[0]]}


@pytest.fixture(scope="module", autouse=True)
def registered():
    FAMILIES["logistic"], COVARIANCES["exchangeable"] = Logistic, Exchangeable
    yield
    del FAMILIES["logistic"], COVARIANCES["exchangeable"]


TERM = RandomEffects("site", ("x0",), covariance=Exchangeable(b=3.0))


@pytest.fixture(scope="module")
def data(registered):
    return mixed_model("logistic", 30, 12, sd=[1.0, 0.6], cor=0.5, dispersion=0.5, seed=4)[0]


@pytest.fixture(scope="module")
def result(data):
    model = MixedEffects(
        nn.Linear(1, 1).double(), TERM, Logistic(1.5, HalfNormal(2.0)), bayesian_head=True
    )
    return fit(model, data, schedule=Schedule(steps=400), progress=False, seed=1)


def test_sites_start_where_family_and_covariance_say(data):
    model = MixedEffects(nn.Linear(1, 1).double(), TERM, "logistic").bind(data)
    with torch.no_grad():
        center = StructuredGuide(model).hyperparameters.center()
    assert float(center["width"]) == pytest.approx(0.4)
    assert float(center["site_rho"]) == pytest.approx(0.2)
    assert center["site_sd"].tolist() == pytest.approx([0.5, 0.5])


def test_the_posterior_holds_the_truth(result):
    table = result.variance_components().set_index(["factor", "term", "statistic"])
    truth = {
        ("Residual", "", "width"): 0.5,
        ("site", "Intercept", "sd"): 1.0,
        ("site", "x0", "sd"): 0.6,
        ("site", "Intercept,x0", "cor"): 0.5,
        ("site", "Intercept,x0", "rho"): 0.5,
    }
    for row, value in truth.items():
        assert abs(table.loc[row, "mean"] - value) < 3 * table.loc[row, "sd"], row
    posterior = result.to_datatree(draws=10, groups=["posterior"])["posterior"]
    assert {"width", "site_rho", "site_cor", "site_sd"} <= set(posterior.data_vars)
    np.testing.assert_allclose(posterior["site_cor"][..., 0, 1], posterior["site_rho"])


def test_priors_are_printed(result, capsys):
    result.summary()
    text = capsys.readouterr().out
    assert "(logistic(shift=1.5, prior=HalfNormal(scale=2.0)))" in text
    assert "width: HalfNormal(2)" in text
    assert "site_rho: Beta(1, 3)" in text
    assert "exchangeable(b=3.0)(1 + x0 | site)" in text


def residuals(result):
    (check,) = [one for one in result.diagnostics().checks if one.name == "residuals"]
    return check


def test_residuals_are_checked_by_the_familys_distribution_function(result):
    check = residuals(result)
    assert check.verdict == "pass"
    assert check.p > 0.01
    skewed = dataclasses.replace(result.data, outcome=result.data.outcome.exp())
    wrong = Fit(dataclasses.replace(result.posterior, data=skewed))
    assert residuals(wrong).verdict == "fail"


def test_new_clusters_follow_the_covariance(result):
    latents, (factor,) = result.draws(4000), result.model.factors
    with result.model.seeded(0):
        extended = result.model.extend(latents, {"site": 31}, population=False)
    # Effects stand at the mean of x0, sds and correlations at x0 = 0.
    effects = torch.linalg.solve(factor.from_zero, extended["site_effect"][:, -1].mT).mT
    z = effects / latents["site_sd"][:, 0]
    rho = float(latents["site_rho"].mean())
    assert abs(float((z[:, 0] * z[:, 1]).mean()) - rho) < 4 * ((1 + rho**2) / 4000) ** 0.5


def test_what_is_saved_is_loaded_and_predicts_the_same(result, tmp_path):
    result.save(tmp_path / "run", draws=20)
    loaded = Fit.load(tmp_path / "run", nn.Linear(1, 1).double())
    assert loaded.model.family == Logistic(1.5, HalfNormal(2.0))
    assert loaded.model.terms == (TERM,)
    rows = result.data.take(np.arange(40))
    new = pd.DataFrame({"x0": rows.features[:8, 0].numpy(), "site": [90, 91] * 4})
    rows_new = type(rows).from_arrays(
        new[["x0"]].to_numpy(), None, {"site": new["site"]}, outcome_name="y"
    )
    for given in (rows, rows_new):
        one = result.predict(given, unseen="marginal", draws=6)
        other = loaded.predict(given, unseen="marginal", draws=6)
        np.testing.assert_array_equal(one.expected, other.expected)
        np.testing.assert_array_equal(one.outcome, other.outcome)
    pd.testing.assert_frame_equal(result.variance_components(), loaded.variance_components())


def test_new_clusters_are_adapted_to(result):
    x = np.linspace(-1, 1, 20)
    y = 3.0 + 2.0 * x
    rows = type(result.data).from_arrays(
        x[:, None], y, {"site": ["new"] * 20}, outcome_name="y", feature_names=["x0"]
    )
    expected = result.adapt(rows, draws=200).predict(rows).expected.mean(0)
    population = result.predict(rows, unseen="population", draws=200).expected.mean(0)
    assert abs(expected - y).mean() < 0.25 * abs(population - y).mean()


def test_a_kind_that_is_not_registered_is_not_saved(result, tmp_path, monkeypatch):
    monkeypatch.delitem(COVARIANCES, "exchangeable")
    with pytest.raises(ValueError, match="covariance Exchangeable cannot be saved"):
        result.save(tmp_path / "run")
    monkeypatch.setitem(COVARIANCES, "exchangeable", Exchangeable)
    monkeypatch.delitem(FAMILIES, "logistic")
    with pytest.raises(ValueError, match="family Logistic cannot be saved"):
        result.save(tmp_path / "run")


def test_covariances_are_given_by_name_or_with_settings():
    assert covariance_named("exchangeable") == Exchangeable()
    assert str(Slopes("site", on="1", covariance="exchangeable")) == (
        "Slopes('site', on='1', covariance='exchangeable')"
    )
    with pytest.raises(ValueError, match=r"unknown covariance 'exchangable'.*correlated"):
        RandomEffects("site", covariance="exchangable")
    (parsed,) = parse_terms("(1 + x | site)")
    assert dataclasses.replace(parsed, covariance="correlated").block  # a term like any other


def test_covariances_hold_at_the_means_only_where_they_can_hold_anywhere(data):
    moved = {}
    for covariance in (None, "correlated", "independent", "exchangeable"):
        term = RandomEffects("site", ("x0",), covariance=covariance)
        model = MixedEffects(nn.Linear(1, 1), term, "logistic").bind(data)
        moved[covariance] = model.factors[0].from_zero is not None
    assert moved == {None: False, "correlated": False, "independent": True, "exchangeable": True}


def test_known_sds_and_dependent_clusters_are_refused(data):
    @dataclass(frozen=True)
    class Related(Exchangeable):
        clusters_independent = False

    term = RandomEffects("site", ("x0",), covariance=Related())
    with pytest.raises(ValueError, match="makes its clusters depend on each other"):
        MixedEffects(nn.Linear(1, 1), term, "logistic").bind(data)


# --- families that only look gaussian, or have no distribution function --------------------------


@dataclass(frozen=True)
class Laplace(Family):
    """y = eta + residual_sd * Laplace: its parameter is called as that of the gaussian family."""

    name = "laplace"
    support = "finite numbers"

    @property
    def parameters(self):
        return (ResidualSd(),)

    def outside(self, y, data):
        return ~torch.isfinite(y)

    def center(self, data):
        return outcome_of(data).median().reshape(1)

    def spread(self, data):
        return float(outcome_of(data).std())

    def distribution(self, eta, parameters, rows):
        return dist.Laplace(eta[..., 0], self.value(parameters, "residual_sd") / 2**0.5)

    def mean(self, eta, rows):
        return eta[..., 0]

    def residual_variance(self, parameters, mean):
        return self.value(parameters, "residual_sd") ** 2


@pytest.mark.parametrize("random", ["(1 | site)", "(1 | site) + (1 | batch)"])
def test_only_quadratic_families_are_taken_for_exact(random):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.normal(size=60), "site": np.arange(60) % 6})
    frame = frame.assign(batch=np.arange(60) // 12, y=frame.x + rng.laplace(size=60))
    columns = {"outcome": "y", "clusters": ["site", "batch"], "features": ["x"]}
    data = ClusteredData.from_frame(frame, **columns)
    for family, exact in (("gaussian", True), (Laplace(), False)):
        model = MixedEffects(nn.Linear(1, 1).double(), random, family).bind(data)
        guide = choose_guide(model, model.encode(data))
        assert guide.exact(model) is exact


def test_a_residual_check_that_is_not_made_is_said_aloud():
    data, _ = mixed_model("gaussian", 8, 8, seed=1)
    short = {"schedule": Schedule(steps=30), "progress": False, "refine": False}
    without = fit(MixedEffects(nn.Linear(1, 1).double(), "(1 | site)", Laplace()), data, **short)
    check = residuals(without)
    assert check.verdict == "not checked"
    assert check.reason == "family 'laplace' gives no distribution function"
    assert "cdf" in check.advice
    assert "not checked: residuals" in str(without.diagnostics())

    data, _ = mixed_model("bernoulli", 8, 8, seed=1)
    single = fit(MixedEffects(nn.Linear(1, 1).double(), "(1 | site)", "bernoulli"), data, **short)
    check = residuals(single)
    assert check.verdict == "not checked"
    assert check.reason == ("family 'bernoulli': any probability fits single trials")


# --- what the families answer --------------------------------------------------------------------

ETA = {1: torch.tensor([[-0.7], [0.2], [1.1]]).double(), 2: torch.randn(3, 2).double()}


@pytest.mark.parametrize("name", ["binomial", "gaussian", "negative_binomial", "poisson"])
def test_distribution_functions_are_sums_of_the_density(name):
    family = family_named(name)
    given = {one.name: torch.tensor(1.3).double() for one in family.parameters}
    rows = Rows(torch.zeros(3, 0), None, {}, trials=torch.tensor([4.0, 9.0, 6.0]).double())
    y = torch.tensor([2.0, 3.0, 4.0]).double()
    density = family.distribution(ETA[1], given, rows)
    if family.integer:
        steps = torch.arange(5.0).double()[:, None]
        mass = density.log_prob(steps.expand(-1, 3)).exp().where(steps <= y, 0)
        expected = mass.sum(0)
    else:
        expected = density.cdf(y)
    torch.testing.assert_close(family.cdf(y, ETA[1], given, rows), expected)
    assert not family.no_residuals


def test_every_family_of_the_library_can_be_checked_or_says_why_not():
    for family in (make() for make in FAMILIES.values()):
        gives = type(family).cdf is not Family.cdf
        assert gives is not bool(family.no_residuals), family.name
        assert set(family.statistics) <= {"mean", "sd", "zeros"}


def test_draws_by_default_are_those_of_the_density():
    family, eta = Logistic(), np.zeros((4000, 1))
    y = family.simulate(np.random.default_rng(0), eta, {"width": 2.0}, trials=1)
    assert stats.kstest(y, "logistic", (0.0, 2.0)).pvalue > 0.01
    again = family.simulate(np.random.default_rng(0), eta, {"width": 2.0}, trials=1)
    np.testing.assert_array_equal(y, again)


# --- no branch on names outside families/ ---------------------------------------------------------


def names_and_classes():
    made = [make() for make in FAMILIES.values() if make is not Logistic]
    parameters = {one.name for family in made for one in family.parameters}
    classes = {cls.__name__ for family in made for cls in type(family).__mro__} - {
        "Family",
        "ABC",
        "object",
    }
    return {family.name for family in made}, parameters, classes


def constants(node):
    return {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}


def branches(source):
    """Lines that compare with a family's or parameter's name, list families, or ask their class."""
    families, parameters, classes = names_and_classes()
    for node in ast.walk(ast.parse(source)):
        wrong = False
        if isinstance(node, ast.Compare):
            sides = set().union(*map(constants, [node.left, *node.comparators]))
            wrong = bool(sides & (families | parameters))
        elif isinstance(node, ast.match_case):
            wrong = bool(constants(node.pattern) & (families | parameters))
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            wrong = bool(
                {one.value for one in node.elts if isinstance(one, ast.Constant)} & families
            )
        elif isinstance(node, ast.Dict):
            keys = [one for one in node.keys if isinstance(one, ast.Constant)]
            wrong = bool({one.value for one in keys} & families)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            asked = {"isinstance": classes, "issubclass": classes}.get(called, set())
            named = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
            wrong = bool(named & asked)
            if called in {"startswith", "endswith", "get", "count", "index"}:
                wrong |= bool(set().union(*map(constants, node.args), set()) & families)
        if wrong:
            yield f"line {node.lineno if hasattr(node, 'lineno') else 0}: {ast.unparse(node)[:80]}"


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ('if family.name == "gaussian": pass', True),
        ('if parameter.name != "residual_sd": pass', True),
        ('if name in ("bernoulli", "categorical"): pass', True),
        ('COUNTS = ("poisson",)', True),
        ('TABLE = {"poisson": 1}', True),
        ("isinstance(model.family, CountFamily)", True),
        ("match name:\n    case 'poisson':\n        pass", True),
        ('TABLE.get("poisson")', True),
        ('def fit(family="gaussian"): pass', False),
        ("isinstance(model.family, Family)", False),
        ('{"residual_sd": prior}', False),
        ('"bernoulli" if outputs == 1 else "categorical"', False),
    ],
)
def test_branches_on_names_are_seen(source, caught):
    assert bool(list(branches(source))) is caught


def test_no_branch_on_a_familys_name_is_left_outside_families():
    files = [*LIBRARY.rglob("*.py"), *MODELS.rglob("*.py")]
    found = {
        str(path.relative_to(LIBRARY.parent)): list(branches(path.read_text("utf-8")))
        for path in files
        if LIBRARY / "families" not in path.parents
    }
    assert {path: lines for path, lines in found.items() if lines} == {}
