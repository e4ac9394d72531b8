"""Decoded cluster effects: against the equation, principal components, and a known truth."""

import sys

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, FilterScaleBias, MixedEffects, Schedule, fit
from armed_pyro.families.family import Family
from armed_pyro.families.simulate import mixed_model
from armed_pyro.models.autoencoder import autoencoder_program
from armed_pyro.models.linear import linear

SITES, SIDE, NOISE = 6, 6, 0.1
BRIEF = Schedule(steps=4, window=2, stages=0)


class Pixels(Family):
    """Independent normal pixels with a known sd."""

    name = "pixels"
    support = "finite numbers"

    def outside(self, y, data):
        return ~torch.isfinite(y).all(-1)

    def center(self, data):
        return data.outcome.mean(0)

    def columns(self, data):
        return tuple(f"pixel{i}" for i in range(data.outcome.shape[1]))

    def distribution(self, eta, dispersion, rows):
        return dist.Normal(eta, NOISE).to_event(1)

    def mean(self, eta, rows):
        return eta

    def residual_variance(self, dispersion, mean):
        return torch.full_like(mean, NOISE**2)


class Decoder(nn.Module):
    """From two numbers to an image; its last filter is what clusters change."""

    def __init__(self, channels=1):
        super().__init__()
        self.dense = nn.Linear(2, 8 * SIDE * SIDE)
        self.out = nn.Conv2d(8, channels, 3, padding=1)

    def forward(self, x):
        hidden = torch.tanh(self.dense(x)).reshape(-1, 8, SIDE, SIDE)
        return self.out(hidden).flatten(1)


def blobs(sites=SITES, n=120, channels=1, seed=0):
    """A blob whose place is known, with the contrast and brightness of its site."""
    rng = np.random.default_rng(seed)
    site = np.arange(n) % sites
    place = rng.normal(size=(n, 2))
    y, x = np.mgrid[:SIDE, :SIDE]
    middle = (SIDE - 1) / 2 + place[:, :, None, None]
    blob = np.exp(-((x - middle[:, 0]) ** 2 + (y - middle[:, 1]) ** 2) / 3)
    contrast, brightness = 1 + 0.3 * rng.normal(size=sites), 0.2 * rng.normal(size=sites)
    image = contrast[site, None, None] * blob + brightness[site, None, None]
    image = image[:, None] + NOISE * rng.normal(size=(n, channels, SIDE, SIDE))
    data = ClusteredData.from_arrays(place, image.reshape(n, -1), {"site": site})
    return data, contrast, brightness


def fitted(channels=1, random=None, schedule=BRIEF, **settings):
    data = settings.pop("data", None) or blobs(channels=channels)[0]
    torch.manual_seed(0)
    random = FilterScaleBias("site", at="out") if random is None else random
    model = MixedEffects(Decoder(channels), random, Pixels(), **settings)
    return fit(model, data, schedule=schedule, seed=2, refine=False, progress=False)


@pytest.fixture(scope="module")
def result():
    with pytest.warns(UserWarning, match="fewer rows"):
        return fitted()


def test_images_are_the_equation(result):
    """(1 + a) h + b is linear in the effects, so that means decode to means."""
    found = result.decoded(result.data.take([3]), shape=(SIDE, SIDE), draws=50).images
    model = result.model
    x = model.encode(result.data.take([3]), model.data_facts().levels).x
    with torch.no_grad():
        h = model.network(x.float()).reshape(SIDE, SIDE).numpy()
    center = np.reshape(model.data_facts().center, (SIDE, SIDE))
    effects = result.draws(50)["site_effect"].numpy()
    scale, bias = effects.mean(0).T[..., None, None]
    np.testing.assert_allclose(found["fixed"], center + h, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        found["image"], center + (1 + scale) * h + bias, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(found["difference"], scale * h + bias, rtol=1e-4, atol=1e-5)
    sd = (effects[:, :, :1, None] * h + effects[:, :, 1:, None]).std(0, ddof=1)
    np.testing.assert_allclose(found["difference_sd"], sd, rtol=1e-3)
    assert found["image"].dims == ("site", "y", "x")


def test_the_walk_is_the_first_principal_component(result):
    """Of images under fresh effects of the population."""
    found = result.decoded(result.data.take([0]), shape=(SIDE, SIDE), draws=50).images
    sd = (result.draws(50)["site_sd"] ** 2).mean(0).sqrt().reshape(-1)
    x = result.model.encode(result.data.take([0]), result.model.data_facts().levels).x
    with torch.no_grad():
        h = result.model.network(x.float()).reshape(-1).numpy().astype(float)
    gradient = np.stack([h, np.ones_like(h)], 1) * sd.numpy()
    values, vectors = np.linalg.eigh(gradient @ gradient.T)
    step = (found["walk"].sel(step=1) - found["walk"].sel(step=0)).to_numpy().ravel()
    assert abs(step @ vectors[:, -1]) == pytest.approx(np.linalg.norm(step), rel=1e-4)
    assert step @ step == pytest.approx(values[-1], rel=1e-3)
    assert found.attrs["share"] == pytest.approx(values[-1] / values.sum(), rel=1e-3)
    np.testing.assert_allclose(found["walk"].sel(step=0), found["fixed"], atol=1e-5)
    loading = found["loading"].to_numpy()
    np.testing.assert_allclose(step, loading[0] * h + loading[1], rtol=1e-3, atol=1e-4)


def test_correlated_effects_on_the_predictor_and_latent_heads():
    data, _ = mixed_model(
        "categorical", 4, 10, sd=[1.0, 0.5], cor=0.5, coefficients=[[0.0] * 4, [1.0] * 4]
    )
    net = linear(1, 5)
    model = MixedEffects(net, "(1 + x0 | site)", "categorical", bayesian_head=True)
    found = fit(model, data, schedule=BRIEF, refine=False, progress=False)
    one = found.decoded(data.take([5]), shape=(2, 2), draws=40)
    model, latents = found.model, found.draws(40)
    factor = model.factors[0]
    rows = model.encode(data.take([5]), model.data_facts().levels).all()
    k = int(rows.memberships["site"].position[0])
    with torch.no_grad():
        predictor = model.predictor(rows, latents)
    np.testing.assert_allclose(
        one.images["image"][k].to_numpy().ravel(), predictor.eta.mean(0)[0], rtol=1e-5
    )
    np.testing.assert_allclose(
        one.images["fixed"].to_numpy().ravel(), predictor.fixed.mean(0)[0], rtol=1e-5
    )
    # The walk's variance is the largest eigenvalue of the predictor's covariance.
    z = torch.kron(torch.tensor([[1.0, float(rows.x)]]).double(), torch.eye(4).double())
    D = factor.covariance(latents).reshape(-1, 8, 8).mean(0)
    values = torch.linalg.eigvalsh(z @ D @ z.mT)
    step = (one.images["walk"][3] - one.images["walk"][2]).to_numpy().ravel()
    assert step @ step == pytest.approx(float(values[-1]), rel=1e-5)


@pytest.mark.filterwarnings("ignore:there are fewer rows")
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_figures_are_drawn(channels, tmp_path):
    shape = (SIDE, SIDE) if channels == 1 else (channels, SIDE, SIDE)
    found = fitted(channels).decoded(blobs()[0].take([0]), shape=shape, draws=5)
    figure = found.plot()
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles[0] == "fixed effects"
    assert {f"site {k}" for k in range(SITES)} < set(titles)
    assert {"-2 sd", "0", "+2 sd"} < set(titles)
    figure.savefig(tmp_path / "clusters.png")
    assert (tmp_path / "clusters.png").stat().st_size > 5000


@pytest.mark.filterwarnings("ignore:there are fewer rows")
def test_columns_choose_the_pixels(result):
    names = [f"pixel{i}" for i in range(SIDE)]
    row = result.data.take([0])
    whole = result.decoded(row, shape=(SIDE, SIDE), draws=5).images
    part = result.decoded(row, shape=(1, SIDE), columns=names, draws=5).images
    np.testing.assert_allclose(part["image"], whole["image"][:, :1], rtol=1e-5)


@pytest.fixture(scope="module")
def rebuilt():
    """An autoencoder-classifier, whose image is an outcome beside the label."""
    rng = np.random.default_rng(0)
    batch = np.repeat(["a", "b", "c"], 12)
    images = rng.normal(size=(36, 1, 8, 8)).astype("float32")
    data = ClusteredData.from_arrays(images, (images.mean((1, 2, 3)) > 0).astype(float),
                                     {"batch": batch})  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = autoencoder_program("batch", (1, 8, 8), widths=(3, 2), latents=3, units=4)
    return fit(model, data, schedule=BRIEF, seed=2, refine=False, progress=False)


@pytest.mark.filterwarnings("ignore:there are fewer rows")
def test_an_autoencoders_image_is_the_one_that_it_predicts(rebuilt):
    """Its shape and outcome need not be named; effects on the label do nothing to it."""
    row = rebuilt.data.take([20])
    found = rebuilt.decoded(row, draws=30).images
    assert found["image"].dims == ("batch", "y", "x")
    assert found["fixed"].shape == (8, 8)
    own = rebuilt.predict(row, draws=30).others["image"].mean[0, 0]
    np.testing.assert_allclose(found["image"].sel(batch="b"), own, rtol=1e-4, atol=1e-5)
    assert float(np.abs(found["difference"]).max()) > 1e-4
    named = rebuilt.decoded(row, of="image", shape=(1, 8, 8), draws=30).images
    assert named["image"].dims == ("batch", "channel", "y", "x")
    np.testing.assert_allclose(named["image"][:, 0], found["image"])
    with pytest.raises(ValueError, match=r"no outcome .imago.. Did you mean .image."):
        rebuilt.decoded(row, of="imago")
    with pytest.raises(ValueError, match="`columns` are of the predictor"):
        rebuilt.decoded(row, of="image", columns=["y"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": None}, "give `shape`"),
        ({"shape": (5, 5)}, "of the 36 pixels, not"),
        ({"shape": (36,)}, "of the 36 pixels, not"),
        ({"factor": "batch"}, "grouping factor"),
        ({"columns": ["pixel99"]}, "column of the predictor"),
        ({"draws": 1}, "at least 2"),
        ({"row": range(2)}, "one row"),
    ],
)
def test_bad_arguments_are_refused(result, arguments, message):
    given = {"shape": (SIDE, SIDE)} | arguments
    row = result.data.take(given.pop("row", [0]))
    with pytest.raises(ValueError, match=message):
        result.decoded(row, **given)


@pytest.mark.filterwarnings("ignore:there are fewer rows")
def test_random_effects_and_matplotlib_are_needed(result, monkeypatch):
    plain = fitted(random=())
    with pytest.raises(ValueError, match="no random effects"):
        plain.decoded(plain.data.take([0]), shape=(SIDE, SIDE))
    found = result.decoded(result.data.take([0]), shape=(SIDE, SIDE), draws=3)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*armed_pyro\[analysis\]"):
        found.plot()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:there are fewer rows")
def test_contrast_and_brightness_are_recovered():
    data, contrast, brightness = blobs(sites=10, n=500)
    schedule = Schedule(steps=500, batch_size=100, stages=0, net_learning_rate=0.01)
    found = fitted(data=data, schedule=schedule, fixed_weight=1.0)
    effects = found.draws(200)["site_effect"].mean(0).numpy()
    assert np.corrcoef(effects[:, 0], contrast)[0, 1] > 0.9
    assert np.corrcoef(effects[:, 1], brightness)[0, 1] > 0.9
    images = found.decoded(data.take([0]), shape=(SIDE, SIDE)).images
    # Where there is no blob, the difference is the brightness.
    corner = images["difference"].min(("y", "x")) + images["difference"].max(("y", "x"))
    assert np.corrcoef(corner, 2 * brightness + (contrast - 1))[0, 1] > 0.9
