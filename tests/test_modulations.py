"""Filters scaled and shifted by cluster: against the equation, a known truth, and by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from armed_pyro import (
    Adversary,
    ClusteredData,
    FilterScaleBias,
    Fit,
    HalfNormal,
    Known,
    MixedEffects,
    Priors,
    Schedule,
    Slopes,
    fit,
)
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.inference.objective import Objective
from armed_pyro.inference.train import train
from armed_pyro.networks.taps import modulated, pooled
from armed_pyro.program.linearize import sensitivities

SITES, FILTERS = 5, 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, FILTERS, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1)
    )


def images(n=40, seed=0) -> ClusteredData:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, 1, 6, 6)), rng.normal(size=n)
    return ClusteredData.from_arrays(x, y, {"site": np.arange(n) % SITES})


def program(random=None, **settings):
    data = images()
    random = FilterScaleBias("site", at="0") if random is None else random
    model = MixedEffects(network().double(), random, **settings).bind(data)
    return model, model.encode(data).all()


def by_hand(model, rows, effects):
    net, facts = model.network, model.data_facts()
    scale, bias = effects[rows.memberships["site"].position].split(FILTERS, -1)
    h = (1 + scale[:, :, None, None]) * net[0](rows.x) + bias[:, :, None, None]
    return facts.spread * net[4](net[3](net[2](net[1](h)))) + torch.tensor(facts.center)


def test_the_predictor_is_the_equation():
    model, rows = program()
    effects = torch.randn(SITES, 2 * FILTERS).double()
    found = model.predictor(rows, {"site_effect": effects})
    torch.testing.assert_close(found.eta, by_hand(model, rows, effects))
    torch.testing.assert_close(found.fixed, by_hand(model, rows, torch.zeros_like(effects)))
    # The hooks are gone.
    torch.testing.assert_close(model.predictor(rows, {}).eta, found.fixed)


def test_each_draw_has_filters_of_its_own():
    model, rows = program(["(1 | site)", FilterScaleBias("site", at="0")], bayesian_head=True)
    torch.manual_seed(0)
    effects = torch.randn(4, 1, SITES, 1 + 2 * FILTERS).double()
    head = torch.randn(4, 1, 1, 4).double()
    both = model.predictor(rows, {"site_effect": effects, "fixed_effect": head}).eta
    assert both.shape == (4, 1, len(rows), 1)
    for draw in range(4):
        alone = {"site_effect": effects[draw, 0], "fixed_effect": head[draw, 0]}
        torch.testing.assert_close(both[draw, 0], model.predictor(rows, alone).eta)
    assert len({float(one.sum().detach()) for one in both}) == 4


def test_all_kinds_of_layers_can_be_modulated():
    """Vectors, sequences, images and volumes: the second dimension holds the filters."""
    for shape in [(4, 3), (4, 3, 7), (4, 3, 5, 5), (4, 3, 2, 2, 2)]:
        block = FilterScaleBias("g", at="").block(None, {"": 3})
        effects, h = torch.randn(4, 6), torch.randn(shape)
        with modulated(net := nn.Identity(), [(block.path, effects)]):
            out = net(h)
        over = (...,) + (None,) * (len(shape) - 2)
        torch.testing.assert_close(out, (1 + effects[:, :3][over]) * h + effects[:, 3:][over])
        torch.testing.assert_close(net(h), h)


def test_terms_have_names_units_and_priors():
    model, _ = program(["(1 | site)", FilterScaleBias("site", at="0")])
    (factor,) = model.factors
    names = [f"0.{kind}[{c}]" for kind in ("scale", "bias") for c in range(FILTERS)]
    assert factor.terms == ("Intercept", *names)
    # Relative scales and the layer's own units: the outcome's spread does not enter.
    diagonal = factor.to_original.diagonal()
    assert diagonal[0] == model.data_facts().spread
    assert (diagonal[1:] == 1).all()
    assert factor.prior_scale[1:].tolist() == pytest.approx([0.3] * 2 * FILTERS)
    model, _ = program(priors=Priors(sd=HalfNormal({"0.bias[1]": 2.0})))
    assert model.factors[0].prior_scale.tolist() == pytest.approx([0.3] * 4 + [2.0, 0.3])


def test_two_terms_may_be_at_one_layer_but_not_twice_the_same():
    model, _ = program([Slopes("site", on="0"), FilterScaleBias("site", at="0")])
    assert len(model.factors[0].terms) == 3 * FILTERS
    with pytest.raises(ValueError, match="both give 'site' the column"):
        program([FilterScaleBias("site", at="0"), FilterScaleBias("site", at="0")])
    with pytest.raises(ValueError, match=r"no module '9' \(nearest|no module '9'"):
        program(FilterScaleBias("site", at="9"))


def test_gradients_reach_every_effect_and_the_adversary_sees_the_fixed_features():
    game = Adversary("site", taps=["1"], weight=1.0)
    model, rows = program(adversary=game)
    guide = choose_guide(model, model.encode(images()))
    torch.manual_seed(1)
    loss = Objective(model, guide)(rows)
    location = guide.pseudo[0].location
    (gradient,) = torch.autograd.grad(loss.total, location, retain_graph=True)
    assert (gradient != 0).all()
    # What a cluster's filters do to the features is no business of the adversary's.
    (played,) = (
        torch.autograd.grad(loss.adversarial, location, allow_unused=True)
        if (loss.adversarial.requires_grad)
        else (None,)
    )
    assert played is None
    activations = model.predictor(rows, guide.center(rows)).activations
    torch.testing.assert_close(activations["1"], pooled(torch.tanh(model.network[0](rows.x))))


def test_sensitivities_are_derivatives():
    model, rows = program(["(1 | site)", FilterScaleBias("site", at="0")], bayesian_head=True)
    (factor,) = model.factors
    torch.manual_seed(2)
    point = {
        "fixed_effect": torch.randn(1, 4).double(),
        "site_effect": 0.3 * torch.randn(SITES, 7).double(),
    }
    base = model.predictor(rows, point)
    z = sensitivities(model, rows, factor, base.activations, point)
    for term in range(7):
        step = torch.zeros(SITES, 7).double()
        step[:, term] = 1e-6
        moved = model.predictor(rows, point | {"site_effect": point["site_effect"] + step}).eta
        slope = (moved - base.eta) / 1e-6 / model.data_facts().spread
        torch.testing.assert_close(z[:, term], slope, rtol=1e-4, atol=1e-5)


# --- fits -----------------------------------------------------------------------------------------

TRUE_SD, NOISE = 0.3, 0.1


@pytest.fixture(scope="module")
def fitted():
    """Images of 24 sites whose contrast and brightness differ, and a network that is held."""
    rng = np.random.default_rng(3)
    sites, n = 24, 60
    torch.manual_seed(0)
    # One filter: with several, who shifts the outcome is hard to tell for any method.
    layers = [nn.Conv2d(1, 1, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(4, 1))
    with torch.no_grad():
        net[0].weight.mul_(2)
        net[4].weight.mul_(5)
    net.requires_grad_(False)
    site = np.repeat(np.arange(sites), n)
    x = rng.normal(size=(len(site), 1, 6, 6))
    data = ClusteredData.from_arrays(
        x.astype("float32"), rng.normal(size=len(site)), {"site": site}
    )
    training, new = data.take(np.flatnonzero(site < 20)), data.take(np.flatnonzero(site >= 20))
    # The outcome is drawn from the program that is fitted, laid out for a placeholder.
    model = MixedEffects(net, FilterScaleBias("site", at="0"), "gaussian").bind(training)
    effects = torch.tensor(TRUE_SD * rng.normal(size=(sites, 2))).float()
    drawn = []
    for part, own in ((training, effects[:20]), (new, effects[20:])):
        rows = model.encode(part, model.data_facts().levels_with(part)).all()
        known = torch.cat([torch.zeros(20, 2), own]) if part is new else own
        with torch.no_grad():
            eta = model.predictor(rows, {"site_effect": known}).eta[:, 0]
        y = eta + NOISE * torch.tensor(rng.normal(size=len(eta)))
        drawn.append(dataclasses.replace(part, outcome=y.double()))
    schedule = Schedule(steps=1500)
    result = Fit(train(model, drawn[0], schedule=schedule, seed=1, progress=False))
    return result, effects.numpy(), drawn[1]


def test_effects_and_their_sds_are_recovered(fitted):
    result, effects, _ = fitted
    draws = result.draws(400)["site_effect"].numpy()
    mean, sd = draws.mean(0), draws.std(0)
    found = [np.corrcoef(mean[:, c], effects[:20, c])[0, 1] for c in range(2)]
    assert min(found) > 0.9, found
    # Of forty z-scores with sd 1, the root mean square is within 0.11 of 1.
    z = np.sqrt((((mean - effects[:20]) / sd) ** 2).mean())
    assert 0.65 < z < 1.35, z
    table = result.variance_components()
    sds = table[table["statistic"].eq("sd") & table["factor"].eq("site")]
    # Known to about 16% from twenty clusters.
    assert (sds["median"] / TRUE_SD).between(0.6, 1.5).all(), sds


def test_the_network_was_held(fitted):
    result, _, _ = fitted
    assert result.history.settled is not None
    assert not any(one.requires_grad for one in result.model.network.parameters())


def test_a_trained_network_is_free_again_after_the_fit():
    data = images()
    model = MixedEffects(network(), FilterScaleBias("site", at="0"))
    found = fit(model, data, schedule=Schedule(steps=6, window=2, stages=1), progress=False)
    assert all(one.requires_grad for one in found.model.network.parameters())


def test_new_clusters_are_adapted_to(fitted):
    result, effects, new = fitted
    codes = new.grouping("site").codes.numpy()
    place = np.arange(new.n_rows) % 60
    support, query = new.take(np.flatnonzero(place < 50)), new.take(np.flatnonzero(place >= 50))
    errors = {}
    truth = query.outcome.numpy()
    for mode in ("population", "marginal"):
        mean = result.predict(query, unseen=mode, draws=100).expected.mean(0)
        errors[mode] = np.sqrt(np.mean((mean - truth) ** 2))
    adapted = result.adapt(support, draws=100)
    prediction = adapted.predict(query)
    errors["adapt"] = np.sqrt(np.mean((prediction.expected.mean(0) - truth) ** 2))
    assert set(prediction.unseen) == {"adapt"}
    assert errors["adapt"] < 1.3 * NOISE < 2 * NOISE < errors["population"], errors
    table = adapted.table()
    found = table.pivot_table(index="cluster", columns="term", values="mean")
    terms = list(result.model.factors[0].terms)
    wide = found[terms].to_numpy()
    labels = new.grouping("site").levels
    assert list(found.index) == list(labels)
    true = effects[np.asarray(labels, dtype=int)]
    assert np.corrcoef(wide.ravel(), true.ravel())[0, 1] > 0.9
    assert codes.max() == 3


@pytest.mark.parametrize("mode", ["population", "marginal", "membership", "nearest"])
def test_every_mode_reaches_into_convolutions(fitted, mode):
    result, _, new = fitted
    found = result.predict(new, unseen=mode, draws=20)
    assert np.isfinite(found.expected).all()
    assert set(found.unseen) == {mode}
    fixed = result.predict(new, unseen="population", draws=20).expected
    assert np.allclose(found.expected, fixed) is (mode == "population")


def test_shares_are_those_of_draws(fitted):
    """The first-order share of the filters, against the variance of what new clusters add."""
    result, _, _ = fitted
    model, data = result.model, result.data.take(range(100))
    table = result.variance_components(draws=200)
    share = table[table["statistic"].eq("share") & table["factor"].eq("site")]["mean"].iloc[0]
    latents = result.draws(200)
    rows = model.encode(data).all()
    torch.manual_seed(0)
    fresh = latents["site_sd"] * torch.randn_like(latents["site_effect"])
    with torch.no_grad():
        found = model.predictor(rows, dict(latents) | {"site_effect": fresh})
    added = float((found.eta - found.fixed).var())
    fixed = float(found.fixed.var())
    residual = float((latents["residual_sd"] * model.data_facts().spread).square().mean())
    # To first order only: effects of this size bend the filters' tanh.
    assert share == pytest.approx(added / (added + fixed + residual), abs=0.15)


def test_known_sds_are_taken():
    prior = Priors(sd=Known(dict.fromkeys([f"0.{k}[{c}]" for k in ("scale", "bias")
                                           for c in range(FILTERS)], 0.4)))  # fmt: skip
    model, _ = program(priors=prior)
    torch.testing.assert_close(
        model.known()["site_sd"], torch.full((2 * FILTERS,), 0.4, dtype=torch.float64)
    )


def test_a_table_of_effects_names_the_filters(fitted):
    result, _, _ = fitted
    tree = result.to_datatree(draws=10, groups=["posterior"])
    terms = [str(one) for one in tree["posterior"]["site_effect"].coords["site_term"].to_numpy()]
    assert terms[0] == "0.scale[0]"
    result.summary()
