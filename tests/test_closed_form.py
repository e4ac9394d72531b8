"""log p(y | theta) from sums of the rows, against dense matrices and against the rows."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from scipy import stats
from torch import nn

from armed_pyro import ClusteredData, Fit, MixedEffects, Schedule, Slopes, StreamedData, fit
from armed_pyro.guides.closed_form import closed_form
from armed_pyro.guides.crossed import CrossedGuide, choose_guide
from armed_pyro.guides.crossed_form import CrossedForm
from armed_pyro.guides.nested import NestedGuide
from armed_pyro.guides.noise import gaussian_noise
from armed_pyro.inference.importance_sampling import settled
from armed_pyro.inference.marginal_mode import start_at_mode
from armed_pyro.inference.marginal_weights import exact_likelihood, marginal_draws
from armed_pyro.inference.nested_weights import weigh
from armed_pyro.program.data_spec import Facts
from armed_pyro.streaming.on_disk import StreamedRows

pytestmark = pytest.mark.filterwarnings("ignore:there are fewer rows")
DRAWS = 5


def make_frame(n=150, children=40, classes=12, schools=4, seed=0):
    """Children in classes in schools; the last child is alone, and its x is constant."""
    rng = np.random.default_rng(seed)
    child = np.concatenate([np.arange(children), rng.integers(children - 1, size=n - children)])
    of_child, of_class = rng.integers(classes, size=children), rng.integers(schools, size=classes)
    x, t = rng.normal(size=(2, n))
    batch = rng.integers(5, size=n)
    u, v, w = rng.normal(size=children), rng.normal(size=classes), rng.normal(size=schools)
    room = of_child[child]
    y = 3 + x + u[child] * (1 + 0.5 * x) + v[room] + w[of_class[room]] * t + rng.normal(size=n)
    weight = rng.integers(0, 3, size=n).astype(float)
    frame = pd.DataFrame({"x": x, "t": t, "child": child, "room": room, "weight": weight})
    more = {"school": of_class[room], "batch": batch, "log_n": rng.normal(size=n), "y": y}
    return frame.assign(**more)


def bound(random, frame=None, *, net=None, head=True, features=("x", "t"), **roles):
    frame = make_frame() if frame is None else frame
    clusters = ["child", "room", "school", "batch"]
    columns = {"outcome": "y", "clusters": clusters, "features": list(features), **roles}
    data = ClusteredData.from_frame(frame, **columns)
    torch.manual_seed(0)
    net = nn.Linear(len(features), 1).double() if net is None else net
    model = MixedEffects(net, random, bayesian_head=head).bind(data).eval()
    model.requires_grad_(False)
    return model, model.compute(model.encode(data))


def sampled(model, source, seed=1):
    """Draws of the hyperparameters from a wide guide."""
    guide = choose_guide(model, source)
    with torch.no_grad(), pyro.validation_enabled(False):
        guide.hyperparameters.log_scale.fill_(-0.7)
        torch.manual_seed(seed)
        return guide, guide.draws(model.clusters(), DRAWS)


def dense(model, source, latents):
    """log p(y | theta) by the covariance matrix of all rows, in units of the outcome."""
    facts, rows = model.data_facts(), source.all()
    frequencies = model.frequencies(rows)
    counts = np.ones(len(source)) if frequencies is None else frequencies.numpy()
    index = np.repeat(np.arange(len(source)), counts.astype(int))
    weights = np.ones(len(source))
    if frequencies is None and rows.weights is not None:
        weights = rows.weights.numpy()
    values = []
    for draw in range(DRAWS):
        one = {k: v[draw : draw + 1] if v.dim() > 1 else v for k, v in latents.items()}
        fixed = {k: v for k, v in one.items() if not k.endswith("_effect") or k == "fixed_effect"}
        mean = model.predictor(rows, fixed).eta.reshape(-1).numpy()[index]
        sd = float(model.family_parameters(one)["residual_sd"].reshape(-1))
        V = np.diag(sd**2 / weights[index])
        for factor in model.factors:
            phi = factor.design(rows.slope_inputs(), source.computed or {}).numpy()[index]
            D = factor.covariance(one).reshape(len(factor.terms), -1).numpy() * facts.spread**2
            codes = source.codes[factor.name].numpy()[index]
            V += (codes[:, None] == codes) * (phi @ D @ phi.T)
        values.append(stats.multivariate_normal.logpdf(rows.y.numpy()[index], mean, V))
    return np.array(values)


PROGRAMS = {
    "intercept": ("(1 | child)", {}),
    "intercept and slope": ("(1 + x | child)", {}),
    "independent": ("(1 + x || child)", {}),
    "slope": ("(0 + x | child)", {}),
    "nested": ("(1 | child) + (1 | room)", {}),
    "nested, slopes at both": ("(1 + x | child) + (1 + x | room)", {}),
    "three levels": ("(1 + x | child) + (1 | room) + (1 + t | school)", {}),
    "three levels, three terms": ("(1 + x + t | child) + (1 | room) + (1 + x | school)", {}),
    "outer slope only": ("(1 | child) + (0 + t | school)", {}),
    "offset": ("(1 | child) + (1 | room)", {"offset": "log_n"}),
    "frequencies": ("(1 + x | child) + (1 | room)", {"weights": "weight"}),
    "crossed": ("(1 | child) + (1 | batch)", {}),
    "crossed, slopes": ("(1 + x | child) + (1 + t | batch) + (0 + x | school)", {}),
    "crossed, offset": ("(1 | room) + (1 | batch)", {"offset": "log_n"}),
    "crossed, frequencies": ("(1 + x | child) + (1 | batch)", {"weights": "weight"}),
    "no factors": ((), {}),
    "network": ("(1 + x | child) + (1 | room)", {"net": True, "head": False}),
    "hidden layer": ("(1 | child)", {"net": True, "head": True}),
    "slopes on a layer": (["(1 | child)", Slopes("room", on="1")], {"net": True, "head": True}),
}


def program(name):
    random, options = PROGRAMS[name]
    options = dict(options)
    if options.pop("net", False):
        torch.manual_seed(3)
        options["net"] = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    return bound(random, **options)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_closed_form_is_the_density_of_all_rows(name):
    model, source = program(name)
    guide, latents = sampled(model, source)
    guide.refresh(model, source)
    closed = exact_likelihood(model, guide, source)
    assert isinstance(closed, CrossedForm) == name.startswith("crossed")
    found = closed.log_likelihood(latents).numpy()
    expected = dense(model, source, latents)
    assert np.abs(found - expected).max() < 1e-8 * np.abs(expected).max()


EXACT = [name for name in PROGRAMS if name != "slopes on a layer"]


@pytest.mark.parametrize("name", EXACT)
def test_weights_without_effects_are_those_of_rows_and_any_effects(name):
    """p(y, u | theta) / q(u | theta) is p(y | theta), whatever u is."""
    model, source = program(name)
    guide, _ = sampled(model, source)
    crossed = name.startswith("crossed")
    assert isinstance(guide, NestedGuide) == (len(model.factors) > 1 and not crossed)
    guide.refresh(model, source)
    rows, closed = source.all(), exact_likelihood(model, guide, source)
    with torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(2)
        noise = gaussian_noise(guide, rows, DRAWS, model.reference())
        expected = marginal_draws(model, guide, closed, noise.values["_theta"])
        for far in (1, 4):
            values = {k: v if k == "_theta" else far * v for k, v in noise.values.items()}
            weighted = weigh(model, guide, rows, replace(noise, values=values))
            assert torch.allclose(weighted.total(), expected.total, rtol=1e-9, atol=1e-8)
            assert torch.allclose(weighted.hyper, expected.hyper)


@pytest.mark.parametrize("name", ["independent", "three levels", "network", "crossed, slopes"])
def test_gradient_and_curvature_are_those_of_finite_differences(name):
    model, source = program(name)
    guide, _ = sampled(model, source)
    closed, size = exact_likelihood(model, guide, source), guide.hyperparameters.size

    def density(theta):
        noise = theta.reshape(1, 1, 1, size)
        drawn = marginal_draws(model, guide, closed, noise)
        return (drawn.total - drawn.hyper).sum()

    with pyro.validation_enabled(False):
        torch.manual_seed(5)
        theta = (0.3 * torch.randn(size, dtype=torch.float64)).requires_grad_()
        (slope,) = torch.autograd.grad(density(theta), theta, create_graph=True)
        rows = [torch.autograd.grad(part, theta, retain_graph=True)[0] for part in slope]
        curvature = torch.stack(rows)
        for place in range(size):
            step = torch.zeros(size, dtype=torch.float64)
            step[place] = 1e-4
            ends = [theta.detach() + step, theta.detach() - step]
            up, down = (density(end).item() for end in ends)
            assert slope[place].item() == pytest.approx((up - down) / 2e-4, rel=1e-5, abs=1e-4)
            second = (up + down - 2 * density(theta.detach()).item()) / 1e-8
            assert curvature[place, place].item() == pytest.approx(second, rel=1e-2, abs=1)


def test_effects_of_the_closed_form_are_those_of_the_guide():
    """2,000 draws of both at one theta: means, sds and correlations."""
    model, source = program("crossed, slopes")
    guide, latents = sampled(model, source)
    guide.refresh(model, source)
    closed, draws = exact_likelihood(model, guide, source), 2000
    effects = {factor.effect_site for factor in model.factors}
    theta = {
        site: value[:1].expand(draws, *value.shape[1:])
        for site, value in latents.items()
        if site not in effects
    }
    with torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(3)
        found = closed.with_effects(theta)[1]
        expected = guide.effects_given(dict(theta), model.clusters())
    assert found.keys() == effects
    pairs = [torch.cat([u[site].flatten(1) for site in effects], 1) for u in (found, expected)]
    means, sds, cors = zip(
        *((u.mean(0), u.std(0), torch.corrcoef(u.T)) for u in pairs), strict=True
    )
    error = sds[1] / draws**0.5
    assert ((means[0] - means[1]).abs() < 5 * 2**0.5 * error).all()
    assert ((sds[0] / sds[1] - 1).abs() < 5 / draws**0.5).all()
    assert (cors[0] - cors[1]).abs().max() < 5 * (2 / draws) ** 0.5


def test_differences_of_gradients_find_the_same_mode_and_curvature(monkeypatch):
    """The curvature of dear densities, against second derivatives."""
    model, source = program("crossed, slopes")
    found = []
    for most in (2**60, -1):
        monkeypatch.setattr("armed_pyro.inference.marginal_mode.DIFFERENCED", most)
        guide = choose_guide(model, source)
        guide.refresh(model, source)
        start_at_mode(model, guide, source, exact_likelihood(model, guide, source))
        hyper = guide.hyperparameters
        found.append((hyper.anchor.clone(), hyper.frame @ hyper.frame.mT))
    (mode, covariance), (other, differenced) = found
    sds = covariance.diagonal().sqrt()
    assert ((mode - other).abs() < 0.15 * sds).all()
    assert ((covariance - differenced).abs() < 0.1 * sds[:, None] * sds).all()


def test_draws_are_weighed_until_every_mean_is_known():
    """With equal weights the error of a mean is n^-1/2 posterior sds: 5% of it needs 400 draws."""
    torch.manual_seed(0)
    value = {"g_sd": torch.randn(500, 1, 1), "known": torch.tensor(1.0)}
    assert settled(value, torch.zeros(500))
    assert not settled({"g_sd": value["g_sd"][:300]}, torch.zeros(300))
    # A few heavy weights leave fewer effective draws.
    assert not settled(value, 2 * torch.randn(500))


def test_dear_draws_are_few(monkeypatch):
    """A crossed fit with dear draws stops early, and agrees with one of 4,000 draws."""
    data = ClusteredData.from_frame(
        make_frame(400, 80, 20, 8), outcome="y", clusters=["child", "batch"], features=["x"]
    )
    model = MixedEffects(nn.Linear(1, 1), "(1 | child) + (1 | batch)", bayesian_head=True)
    many = fit(model, data, progress=False)
    assert isinstance(many.guide, CrossedGuide)
    monkeypatch.setattr("armed_pyro.inference.importance_sampling.FREE_WORK", 0)
    monkeypatch.setattr(CrossedForm, "most_draws", lambda self: 50)
    few = fit(model, data, progress=False)
    assert len(many.importance.log_weights) == 4000
    assert 400 < len(few.importance.log_weights) < 2000
    assert few.importance.effective > 350
    assert len(few.importance.index) == 100
    tables = [one.variance_components() for one in (many, few)]
    expected, found = (one[one["statistic"] == "sd"].set_index("factor") for one in tables)
    # Both means have errors, of 2 and 5% of a posterior sd.
    assert ((found["mean"] - expected["mean"]).abs() < 4 * 0.055 * expected["sd"]).all()


def test_predictors_of_a_million_and_tiny_sds_keep_the_density_exact():
    """x is near a million and moves by 1; sds of effects and residual are 1e-4 of the outcome's."""
    rng = np.random.default_rng(4)
    frame = make_frame(n=120, children=24, classes=6)
    room, child = frame["room"].to_numpy(), frame["child"].to_numpy()
    x = 1e6 + rng.normal(size=len(frame))
    effects = 1e-4 * rng.normal(size=24)[child] + rng.normal(size=6)[room]
    y = 1e6 + 3 * (x - 1e6) + effects + 1e-4 * rng.normal(size=len(frame))
    model, source = bound("(1 + x | child) + (1 | room)", frame.assign(x=x, y=y), features=("x",))
    closed, spread = closed_form(model, source), model.data_facts().spread
    tiny = torch.tensor([[[1e-4, 1e-6]]], dtype=torch.float64) / spread
    best = closed.sums.reference
    values, expected = [], []
    for scale in (0.5, 1.0, 2.0):
        latents = {
            "residual_sd": torch.tensor([[1e-4 * scale / spread]], dtype=torch.float64),
            "child_sd": tiny * scale,
            "child_cor_cholesky": torch.eye(2, dtype=torch.float64)[None, None],
            "room_sd": torch.tensor([[[1.0 / spread]]], dtype=torch.float64),
            "fixed_effect": best[None, None] * (1 + 1e-6 * scale),
        }
        values.append(float(closed.log_likelihood(latents)))
        expected.append(exact_density(model, source, latents))
    np.testing.assert_allclose(values, expected, rtol=1e-8)


def exact_density(model, source, latents):
    """log p(y | theta) by elimination of one row after the other, in extended precision."""
    facts, rows = model.data_facts(), source.all()
    long = np.longdouble
    x = np.column_stack([np.ones(len(source)), rows.x.numpy()]).astype(long)
    y = (rows.y.numpy().astype(long) - long(float(facts.center[0]))) / long(facts.spread)
    residual = y - x @ latents["fixed_effect"].numpy().reshape(-1).astype(long)
    V = np.diag(np.full(len(y), long(float(latents["residual_sd"])) ** 2))
    for factor in model.factors:
        phi = factor.design(rows.slope_inputs(), {}).numpy().astype(long)
        L = factor.scale_matrix(latents).reshape(len(factor.terms), -1).numpy().astype(long)
        codes = source.codes[factor.name].numpy()
        V = V + (codes[:, None] == codes) * (phi @ L @ L.T @ phi.T)
    log_det, squares = long(0), long(0)
    for row in range(len(y)):
        pivot = V[row, row]
        log_det, squares = log_det + np.log(pivot), squares + residual[row] ** 2 / pivot
        share = V[row + 1 :, row] / pivot
        residual[row + 1 :] = residual[row + 1 :] - share * residual[row]
        V[row + 1 :, row + 1 :] = V[row + 1 :, row + 1 :] - np.outer(share, V[row, row + 1 :])
    constant = np.log(2 * np.pi) + 2 * np.log(facts.spread)
    return float(-0.5 * (log_det + squares + len(y) * constant))


def test_crossed_factors_have_another_closed_form_and_counts_none():
    model, source = bound("(1 | child) + (1 | batch)")
    assert closed_form(model, source) is None
    assert exact_likelihood(model, choose_guide(model, source), source) is not None
    counts = make_frame().assign(y=lambda frame: frame.child % 3)
    data = ClusteredData.from_frame(counts, outcome="y", clusters=["child"], features=["x"])
    model = MixedEffects(nn.Linear(1, 1).double(), "(1 | child)", "poisson").bind(data)
    assert closed_form(model, model.encode(data)) is None


@pytest.fixture(scope="module")
def fitted():
    data = ClusteredData.from_frame(
        make_frame(400, 80, 20, 8),
        outcome="y",
        clusters=["child", "room", "school"],
        features=["x"],
    )
    terms = "(1 + x | child) + (1 | room) + (1 | school)"
    return fit(MixedEffects(nn.Linear(1, 1), terms, bayesian_head=True), data, progress=False)


def test_a_fit_of_three_levels_is_saved_and_loaded(fitted, tmp_path):
    assert isinstance(fitted.guide, NestedGuide)
    assert fitted.importance.k_hat < 0.7
    assert fitted.importance.effective > 1500
    fitted.save(tmp_path / "run")
    again = Fit.load(tmp_path / "run", net=nn.Linear(1, 1))
    assert isinstance(again.guide, NestedGuide)
    before, after = (replace(f.posterior, refined=None).draws(50) for f in (fitted, again))
    for name, value in before.items():
        assert torch.allclose(value, after[name]), name
    assert again.importance.k_hat == pytest.approx(fitted.importance.k_hat, abs=1e-3)


def test_hidden_rows_weigh_as_closed_forms_do(fitted):
    """Draws of all effects, weighed by the rows, have the evidence of the closed form."""
    posterior = fitted.posterior
    rows = posterior.model.compute(posterior.model.encode(posterior.data)).all()
    with posterior.model.seeded(3), pyro.validation_enabled(False):
        noise = gaussian_noise(posterior.guide, rows, 200, posterior.model.reference())
        total = weigh(posterior.model, posterior.guide, rows, noise).total()
    error = float(total.std()) / math.sqrt(len(total))
    bound = float(np.mean(posterior.history.elbo[-100:])) * len(rows)
    assert abs(float(total.mean()) - bound) < 4 * error + 0.5


def test_steps_can_be_compiled(fitted):
    posterior = fitted.posterior
    source = posterior.model.encode(posterior.data)
    options = {"schedule": Schedule(steps=30), "compile": "always", "refine": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = fit(
            MixedEffects(nn.Linear(1, 1), "(1 | child) + (1 | room)", bayesian_head=True),
            posterior.data,
            progress=False,
            **options,
        )
    assert any(result.posterior.history.compiled)
    assert len(source) == 400


def test_streamed_rows_have_the_same_sums(tmp_path):
    frame = make_frame(600, 100, 20, 5).drop(columns=["weight", "log_n", "batch"])
    frame = frame.sample(frac=1, random_state=0)
    frame.to_parquet(tmp_path / "rows.parquet", row_group_size=100)
    roles = {"outcome": "y", "clusters": ["child", "room"], "features": ["x", "t"]}
    data = StreamedData.scan(tmp_path / "rows.parquet", folder=tmp_path, **roles)
    model = MixedEffects(nn.Linear(2, 1).double(), "(1 + x | child) + (1 | room)")
    model = MixedEffects(model.network, model.terms, bayesian_head=True)
    with data.encoded(model.factor_names(), 0, progress=False) as table:
        streamed = model.bind(Facts.of_encoded(table, model.family)).eval()
        source = StreamedRows(table, streamed.reference())
        guide, latents = sampled(streamed, source)
        assert isinstance(guide, NestedGuide)
        found = closed_form(streamed, source).log_likelihood(latents)
    held = model.bind(ClusteredData.from_frame(frame, **roles)).eval()
    expected = closed_form(held, held.encode(ClusteredData.from_frame(frame, **roles)))
    assert torch.allclose(found, expected.log_likelihood(latents), rtol=1e-9)


def test_a_guide_whose_weights_are_good_at_the_mode_is_not_trained(monkeypatch):
    """Both posteriors agree within their Monte Carlo errors; without weights it is trained."""
    data = ClusteredData.from_frame(
        make_frame(400, 80, 20, 8), outcome="y", clusters=["child", "room"], features=["x"]
    )
    model = MixedEffects(nn.Linear(1, 1), "(1 | child) + (1 | room)", bayesian_head=True)
    kept = fit(model, data, progress=False)
    assert len(kept.history.loss) == 1
    assert kept.converged
    assert kept.importance.k_hat < 0.7
    assert kept.importance.effective > 2000
    monkeypatch.setattr("armed_pyro.inference.phases.efficient", lambda *_: False)
    trained = fit(model, data, progress=False)
    assert len(trained.history.loss) > 20
    assert trained.history.elbo[-1] == pytest.approx(kept.history.elbo[0], abs=0.01)
    tables = [one.variance_components() for one in (trained, kept)]
    expected, found = (one[one["statistic"] == "sd"].set_index("factor") for one in tables)
    error = expected["sd"] * 2**0.5 / 2000**0.5
    assert ((found["mean"] - expected["mean"]).abs() < 4 * error).all()
    monkeypatch.undo()
    unweighted = fit(model, data, refine=False, schedule=Schedule(steps=24), progress=False)
    assert len(unweighted.history.loss) == 24


def test_random_effects_are_drawn_for_some_of_the_hyperparameters(monkeypatch, tmp_path):
    data = ClusteredData.from_frame(
        make_frame(300, 60, 12, 4), outcome="y", clusters=["child", "room"], features=["x"]
    )
    monkeypatch.setattr("armed_pyro.inference.train.FEWEST_KEPT", 100)
    monkeypatch.setattr("armed_pyro.inference.train.KEPT_VALUES", 1)
    model = MixedEffects(nn.Linear(1, 1), "(1 | child) + (1 | room)", bayesian_head=True)
    fitted = fit(model, data, progress=False)
    assert len(fitted.refined) == 100
    assert len(fitted.refined.pool["child_sd"]) == 4000
    assert len(fitted.hyperparameters(4000)["child_sd"].unique()) > 1000
    drawn = fitted.draws(100)
    assert {len(value) for value in drawn.values() if value.dim() > 1} == {100}
    # An effect belongs to the hyperparameters beside it: its mean square is their variance.
    pool = fitted.refined.pool
    sd, effects = pool["child_sd"][:100, 0, 0], pool["child_effect"][..., 0]
    assert torch.corrcoef(torch.stack([sd, effects.square().mean(1).sqrt()]))[0, 1] > 0.5
    fitted.save(tmp_path / "fit")
    loaded = Fit.load(tmp_path / "fit", net=nn.Linear(1, 1))
    for site, value in fitted.refined.pool.items():
        assert torch.equal(loaded.refined.pool[site], value)
    assert loaded.variance_components().equals(fitted.variance_components())
