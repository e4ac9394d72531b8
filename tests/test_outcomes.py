"""Other outcomes: their density by hand, how often the network runs, and effects of known size."""

import dataclasses

import numpy as np
import pytest
import torch
from pyro import poutine
from torch import nn

from armed_pyro import (
    Adversary,
    ClusteredData,
    FilterScaleBias,
    Fit,
    Known,
    MixedEffects,
    Priors,
    Reconstruction,
    Schedule,
    fit,
)
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.inference.objective import Objective
from armed_pyro.models.autoencoder import AutoencoderClassifier, autoencoder_program
from armed_pyro.program.binding import needs_fixed_run
from armed_pyro.program.linearize import reconstruction_slopes
from armed_pyro.program.model import log_likelihoods
from armed_pyro.program.predictor import reaches_predictor

SITES = 4


class Signs(nn.Module):
    """The pattern of an image of two grey levels, and a label from its mean."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Identity()
        self.output = nn.Linear(1, 1)
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        pattern = torch.sign(x - x.mean((2, 3), keepdim=True))
        result = self.output(pattern.mean((2, 3)))
        self.decoder(pattern)
        return result


def images(n=24, seed=0, size=8, **roles):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 1, size, size)).astype("float32")
    return ClusteredData.from_arrays(
        x, rng.permutation([0.0, 1.0] * (n // 2)), {"site": np.arange(n) % SITES}, **roles
    )


def small(**settings):
    torch.manual_seed(0)
    return autoencoder_program("site", (1, 8, 8), widths=(2, 3), latents=3, units=4, **settings)


pytestmark = pytest.mark.filterwarnings("ignore:there are fewer rows")


def test_the_density_is_the_weighted_sum():
    weights = np.linspace(0.0, 2.0, 24)
    data = images(weights=weights)
    model = small(image_weight=0.3).bind(data)
    rows = model.encode(data).all()
    guide = choose_guide(model, model.encode(data))
    torch.manual_seed(1)
    model.eval()
    latents = poutine.trace(guide).get_trace(rows)
    trace = poutine.trace(poutine.replay(model, trace=latents)).get_trace(rows)
    trace.compute_log_prob()
    values = latents.nodes["_RETURN"]["value"]
    effects = values["site_effect"][rows.memberships["site"].position]
    net = model.network
    z = net.latents(net.encoder(rows.x))
    # By hand: instance normalisation, scaled and shifted, on the way to the image.
    h = net.decoder.conv1(net.decoder.shape(net.decoder.spread(z)))
    scale, bias = effects[:, 4:].float().split(2, -1)
    h = (1 + scale[..., None, None]) * net.decoder.norm1(h) + bias[..., None, None]
    rebuilt = net.decoder.image(net.decoder.act1(h))
    sd = values["image_sd"] * data.features.double().std().float()
    normal = torch.distributions.Normal(rebuilt, sd)
    by_row = torch.tensor(weights).float() * normal.log_prob(rows.x).sum((1, 2, 3))
    torch.testing.assert_close(
        trace.nodes["image"]["log_prob"].sum(), 0.3 * by_row.sum(), rtol=1e-4, atol=1e-3
    )
    eta = net.classifier(z) + effects[:, :1] + (effects[:, 1:4] * z).sum(1, keepdim=True)
    eta = eta[:, 0] + model.facts.center[0]
    label = torch.distributions.Bernoulli(logits=eta).log_prob(rows.y)
    own = trace.nodes["outcome"]["log_prob"].sum()
    torch.testing.assert_close(own, (torch.tensor(weights).float() * label).sum())
    found = log_likelihoods(model, rows, values)
    torch.testing.assert_close(found["image"], 0.3 * by_row, rtol=1e-4, atol=1e-3)


def test_what_effects_inside_reach_is_found():
    model = small().bind(images())
    assert model.unreached == {"", "encoder.conv1", "encoder.conv2", "latents"}
    assert not reaches_predictor(model)
    net = AutoencoderClassifier((1, 8, 8), widths=(2, 3), latents=3, units=4)
    inside = MixedEffects(
        net, FilterScaleBias("site", at="encoder.conv1"), "bernoulli",
        Adversary("site", ["encoder.conv1", "encoder.conv2"]), others=Reconstruction("decoder"),
    ).bind(images())  # fmt: skip
    assert inside.unreached == set()
    assert reaches_predictor(inside)
    assert needs_fixed_run(inside)


@pytest.mark.parametrize(
    ("settings", "runs"),
    [({}, 1), ({"adversary_weight": 0.0}, 1), ({"fixed_weight": 1.0}, 2)],
)
def test_the_network_runs_as_rarely_as_it_can(settings, runs):
    model = small(**settings).bind(images())
    count = []
    model.network.register_forward_hook(lambda *_: count.append(1))
    source = model.encode(images())
    guide = choose_guide(model, source)
    count.clear()
    Objective(model, guide)(source.all())
    assert len(count) == runs


def test_one_run_and_two_give_the_same_objective():
    """What effects inside do not reach is what it would be without them."""
    data = images()
    model = small().bind(data).eval()
    rows = model.encode(data).all()
    latents = choose_guide(model, model.encode(data)).center(rows)
    latents["site_effect"] = torch.randn_like(latents["site_effect"])
    one = model.predictor(rows, latents, return_fixed=False, others=True)
    two = model.predictor(rows, latents, return_fixed=True, others=True)
    plain = model.predictor(rows, latents)
    for other in (two, plain):
        torch.testing.assert_close(one.eta, other.eta)
        torch.testing.assert_close(one.fixed, other.fixed)
        for path in one.activations:
            torch.testing.assert_close(one.activations[path], other.activations[path])
    torch.testing.assert_close(one.others["image"], two.others["image"])
    without = model.predictor(rows, {}, others=True).others["image"]
    assert not torch.allclose(without, one.others["image"])


def test_the_fixed_effects_rebuild_images_on_their_own():
    data = images()
    model = small(fixed_weight=0.5).bind(data).eval()
    rows = model.encode(data).all()
    guide = choose_guide(model, model.encode(data))
    torch.manual_seed(2)
    latents = guide(rows)
    torch.manual_seed(2)
    loss = Objective(model, guide)(rows)
    alone = {name: one for name, one in latents.items() if name != "site_effect"}
    expected = -sum(log_likelihoods(model, rows, alone).values()).mean()
    torch.testing.assert_close(loss.fixed, expected.detach())


@pytest.mark.parametrize("exact", [16, 0])
def test_slopes_and_curvature_are_those_of_the_likelihood(exact, monkeypatch):
    monkeypatch.setattr("armed_pyro.program.linearize.MOST_EXACT", exact)
    data = images(n=8)
    model = small(image_weight=0.7).bind(data).eval()
    rows = model.encode(data).all()
    torch.manual_seed(3)
    effects = 0.3 * torch.randn(SITES, 8).double()
    point = {"site_effect": effects, "image_sd": torch.tensor(0.8).double()}

    def rebuilt(inside):
        latents = point | {"site_effect": torch.cat([effects[:, :4], inside], 1)}
        return model.predictor(rows, latents, others=True).others["image"]

    jacobian = torch.autograd.functional.jacobian(rebuilt, effects[:, 4:])
    mine = rows.memberships["site"].position
    jacobian = jacobian.flatten(1, 3)[torch.arange(8), :, mine]  # rows values terms
    precision = 0.7 / (0.8 * model.facts.feature_spread) ** 2
    residual = (rows.x - rebuilt(effects[:, 4:])).flatten(1).double()
    slope = precision * torch.einsum("nvt,nv->nt", jacobian, residual)
    curvature = precision * jacobian.mT @ jacobian
    found = []
    for _ in range(60):
        ((factor, own, roots),) = reconstruction_slopes(model, rows, point)
        found.append(roots.mT @ roots)
    assert factor.name == "site"
    torch.testing.assert_close(own[:, 4:], slope.detach(), rtol=1e-3, atol=1e-3)
    assert (own[:, :4] == 0).all()
    several = torch.stack(found)[..., 4:, 4:]
    if exact:
        torch.testing.assert_close(several[0], curvature, rtol=1e-3, atol=1e-3)
        return
    error = several.std(0) / 60**0.5
    assert ((several.mean(0) - curvature).abs() < 4.5 * error + 1e-4).all()


# --- a closed form --------------------------------------------------------------------------------

NOISE, TRUE = 0.2, 0.3


@pytest.fixture(scope="module")
def fitted():
    """Two-level images whose contrast and brightness differ by site."""
    rng = np.random.default_rng(5)
    sites, n, size = 16, 6, 4
    effects = TRUE * rng.normal(size=(sites, 2))
    site = np.repeat(np.arange(sites), n)
    pattern = rng.permuted(np.tile([-1.0, 1.0], (len(site), size * size // 2)), axis=1)
    a, b = effects[site].T[:, :, None]
    x = ((1 + a) * pattern + b + NOISE * rng.normal(size=pattern.shape)).astype("float32")
    y = rng.permutation([0.0, 1.0] * (len(site) // 2))
    data = ClusteredData.from_arrays(x.reshape(-1, 1, size, size), y, {"site": site})
    net = Signs()
    net.requires_grad_(False)
    sds = Known({"decoder.scale[0]": TRUE, "decoder.bias[0]": TRUE})
    model = MixedEffects(
        net, FilterScaleBias("site", at="decoder"), "bernoulli",
        others=Reconstruction("decoder", prior=Known(NOISE / float(x.std()))),
        priors=Priors(sd=sds),
    )  # fmt: skip
    result = fit(model, data, schedule=Schedule(steps=300), progress=False)
    return result, effects, (x, pattern, site)


def test_effects_are_those_of_least_squares(fitted):
    """The posterior is normal: N(m, S), S^-1 = P'P / sd^2 + D^-1 for the values of a site."""
    result, effects, (x, pattern, site) = fitted
    with result.model.seeded(0):
        draws = result.guide.draws(result.model.clusters(), 2000)["site_effect"].numpy()
    z = []
    for k in range(len(effects)):
        design = np.stack([pattern[site == k].ravel(), np.ones(pattern[site == k].size)], 1)
        target = (x - pattern)[site == k].ravel()
        precision = design.T @ design / NOISE**2 + np.eye(2) / TRUE**2
        mean = np.linalg.solve(precision, design.T @ target / NOISE**2)
        sd = np.sqrt(np.diag(np.linalg.inv(precision)))
        # 2,000 draws: means are within 4 / sqrt(2000) sds, sds within 6%.
        assert np.all(np.abs(draws[:, k].mean(0) - mean) < 0.12 * sd), (k, mean)
        np.testing.assert_allclose(draws[:, k].std(0), sd, rtol=0.1)
        z.append((draws[:, k].mean(0) - effects[k]) / sd)
    assert 0.7 < np.sqrt(np.mean(np.square(z))) < 1.35  # 32 scores of sd 1


def test_images_are_predicted_under_every_sites_effects(fitted):
    result, effects, (_, pattern, site) = fitted
    prediction = result.predict(result.data, draws=200)
    without = result.predict(result.data, draws=200, others=False)
    assert without.others == {}
    np.testing.assert_allclose(without.expected, prediction.expected)
    found = prediction.others["image"]
    expected = (1 + effects[site][:, :1]) * pattern + effects[site][:, 1:]
    assert found.mean.shape == (len(site), 1, 4, 4)
    # The sd of a site's mean is that of 48 values each; sds say so.
    error = found.mean.reshape(expected.shape) - expected
    assert np.sqrt((error**2).mean()) < 2 * NOISE / np.sqrt(48)
    assert 0.5 < (found.sd.mean() / np.sqrt((error**2).mean())) < 2
    alone = result.predict(
        dataclasses.replace(
            result.data,
            groupings={"site": ClusteredData.from_arrays(
                np.zeros((len(site), 0)), None, {"site": site + 50}).groupings["site"]},
        ),
        unseen="population",
        draws=10,
    )  # fmt: skip
    np.testing.assert_allclose(alone.others["image"].mean.reshape(pattern.shape), pattern)


def test_every_outcome_has_its_own_name(fitted, tmp_path):
    result, _, (x, _, site) = fitted
    tree = result.to_datatree(draws=20)
    n = len(site)
    for group in ("posterior_predictive", "prior_predictive"):
        assert tree[group]["image"].shape == (1, 20, n, 1, 4, 4)
        assert tree[group]["outcome"].shape == (1, 20, n)
    assert tree["log_likelihood"]["image"].shape == (1, 20, n)
    np.testing.assert_array_equal(
        tree["observed_data"]["image"].to_numpy()[:, 0], x.reshape(-1, 4, 4)
    )
    drawn = tree["posterior_predictive"]["image"].to_numpy()[0, :, :, 0].reshape(20, n, -1)
    # Draws scatter about the means with the residual sd.
    spread = (drawn - drawn.mean(0)).std() * np.sqrt(20 / 19)
    assert spread == pytest.approx(NOISE, rel=0.1)
    made = result.predict(result.data, draws=20)
    assert made.to_dataset()["image_expected"].shape == (n, 1, 4, 4)
    result.save(tmp_path / "run", draws=20)
    loaded = Fit.load(tmp_path / "run", Signs())
    assert loaded.model.others == result.model.others
    again = loaded.predict(result.data, draws=20)
    np.testing.assert_array_equal(again.others["image"].mean, made.others["image"].mean)
    np.testing.assert_array_equal(again.expected, made.expected)
    sds = result.variance_components()
    own = sds[sds["factor"].eq("Residual") & sds["term"].eq("image")]
    assert own["mean"].iloc[0] == pytest.approx(NOISE, rel=1e-3)


def test_what_is_too_large_is_left_out_and_said(fitted, monkeypatch):
    monkeypatch.setattr("armed_pyro.summaries.datatree.LARGEST_OTHER", 10.0)
    with pytest.warns(UserWarning, match="draws of image would take"):
        tree = fitted[0].to_datatree(draws=5, groups=["posterior_predictive"])
    assert list(tree["posterior_predictive"].data_vars) == ["outcome"]


# --- errors ---------------------------------------------------------------------------------------


def test_what_cannot_be_rebuilt_is_said():
    net = AutoencoderClassifier((1, 8, 8), widths=(2, 3), latents=3, units=4)
    with pytest.raises(ValueError, match=r"'latents' gives.*name the layer whose output"):
        MixedEffects(net, (), "bernoulli", others=Reconstruction("latents")).bind(images())
    with pytest.raises(ValueError, match=r"no module 'decode'.*'decoder'"):
        MixedEffects(net, (), "bernoulli", others=Reconstruction("decode")).bind(images())
    with pytest.raises(ValueError, match="must be positive, not 0"):
        Reconstruction("decoder", weight=0)
    with pytest.raises(ValueError, match="needs a name"):
        Reconstruction("decoder", name="")
    twice = (Reconstruction("decoder"), Reconstruction("decoder"))
    with pytest.raises(ValueError, match="would be called 'image'"):
        MixedEffects(net, (), "bernoulli", others=twice).bind(images())
