"""log p(y | theta) from sums of the rows, against dense matrices and against the rows."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from scipy import stats
from torch import nn

from armed_pyro import ClusteredData, MixedEffects, Slopes
from armed_pyro.guides.closed_form import closed_form
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.guides.nested import NestedGuide
from armed_pyro.guides.noise import gaussian_noise
from armed_pyro.inference.marginal_weights import marginal_draws
from armed_pyro.inference.nested_weights import weigh

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
    _, latents = sampled(model, source)
    found = closed_form(model, source).log_likelihood(latents).numpy()
    expected = dense(model, source, latents)
    assert np.abs(found - expected).max() < 1e-8 * np.abs(expected).max()


EXACT = [name for name in PROGRAMS if name != "slopes on a layer"]


@pytest.mark.parametrize("name", EXACT)
def test_weights_without_effects_are_those_of_rows_and_any_effects(name):
    """p(y, u | theta) / q(u | theta) is p(y | theta), whatever u is."""
    model, source = program(name)
    guide, _ = sampled(model, source)
    assert isinstance(guide, NestedGuide) == (len(model.factors) > 1)
    guide.refresh(model, source)
    rows, closed = source.all(), closed_form(model, source)
    with torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(2)
        noise = gaussian_noise(guide, rows, DRAWS, model.reference())
        expected = marginal_draws(model, guide, closed, noise.values["_theta"])
        for far in (1, 4):
            values = {k: v if k == "_theta" else far * v for k, v in noise.values.items()}
            weighted = weigh(model, guide, rows, replace(noise, values=values))
            assert torch.allclose(weighted.total(), expected.total, rtol=1e-9, atol=1e-8)
            assert torch.allclose(weighted.hyper, expected.hyper)


@pytest.mark.parametrize("name", ["independent", "three levels", "network"])
def test_gradient_and_curvature_are_those_of_finite_differences(name):
    model, source = program(name)
    guide, _ = sampled(model, source)
    closed, size = closed_form(model, source), guide.hyperparameters.size

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
