"""What a fit prints: program, priors in the units of the data, sizes, convergence, adversary."""

import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import (
    Adversary,
    ClusteredData,
    DivergenceError,
    Exponential,
    HalfNormal,
    Known,
    MixedEffects,
    Priors,
    Schedule,
    fit,
)
from armed_pyro.report.text import priors, summarize

SHORT = Schedule(steps=4, window=2, stages=3)


def make_frame(n=60):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.normal(4, 2, n), "z": rng.normal(size=n)})
    frame["site"], frame["batch"] = np.arange(n) % 6, np.arange(n) % 5
    frame["Reaction"] = 250 + 30 * frame["x"] + rng.normal(0, 50, n)
    frame["won"] = (rng.random(n) < 0.4).astype(int)
    frame["count"] = rng.poisson(3, n)
    return frame


FRAME = make_frame()


def run(random="(1 + x | site)", outcome="Reaction", family="gaussian", net=None, **options):
    data = ClusteredData.from_frame(
        FRAME, outcome=outcome, clusters=["site", "batch"], features=["x", "z"]
    )
    schedule = options.pop("schedule", SHORT)
    torch.manual_seed(0)
    net = nn.Linear(2, 1) if net is None else net
    settings = {"bayesian_head": True} | options
    model = MixedEffects(net, random, family, **settings)
    return fit(model, data, schedule=schedule, progress=False)


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))


def text(result, prob=0.9):
    return summarize(result.results(prob=prob))


def test_the_summary_says_what_was_fitted_to_what():
    shown = text(run("(1 + x | site) + (1 | batch)"))
    for line in [
        "Outcome: Reaction (gaussian)",
        "Fixed effects: linear, latent coefficients, on 2 feature(s)",
        "Random effects: (1 + x | site) + (1 | batch)",
        "Rows: 60; clusters: site: 6, batch: 5",
    ]:
        assert line in shown


def test_the_summary_prints_to_the_screen_and_holds_the_tables(capsys):
    result = run()
    result.summary(prob=0.8)
    shown = capsys.readouterr().out
    assert shown == text(result, prob=0.8) + "\n"
    assert "80% equal-tailed interval" in shown
    table = result.variance_components(prob=0.8)
    sd = table[(table["statistic"] == "sd") & (table["term"] == "x")].iloc[0]
    assert re.search(rf"site\s+x\s+sd\s+{sd['median']:.4g}\s", shown)
    for word in ("Intercept,x", "icc", "r2_conditional", "Residual"):
        assert word in shown
    slope = result.fixed_effects(prob=0.8).set_index("term").loc["x"]
    assert re.search(rf"x\s+{slope['mean']:.4g}\s", shown)


# ---------------------------------------------------------------------------------------- priors


def test_default_priors_are_in_the_units_of_the_data():
    shown = priors(run().model)
    sd_y, sd_x = FRAME["Reaction"].std(), FRAME["x"].std()
    scaled = "scaled to the data"
    assert shown["site_sd[Intercept]"] == f"HalfStudentT(3, {sd_y:.4g}) at the mean of x, {scaled}"
    assert shown["site_sd[x]"] == f"HalfStudentT(3, {sd_y / sd_x:.4g}), {scaled}"
    assert shown["site_cor"] == "LKJ(1) at the mean of x"
    assert shown["residual_sd"] == f"HalfStudentT(3, {sd_y:.4g}), {scaled}"
    assert shown["fixed_effect"].startswith("Normal(0, 2.5)")


def test_given_priors_are_shown_as_given():
    given = Priors(
        sd={"site": HalfNormal({"x": 0.5, "Intercept": 7.0}), "batch": Exponential(3.0)},
        residual_sd=Known(40.0),
        cor=2.0,
    )
    shown = priors(run("(1 + x | site) + (1 | batch)", priors=given).model)
    assert shown["site_sd[Intercept]"] == "HalfNormal(7)"
    assert shown["site_sd[x]"] == "HalfNormal(0.5)"
    assert shown["batch_sd[Intercept]"] == "Exponential(mean 3)"
    assert shown["site_cor"] == "LKJ(2)"
    assert shown["residual_sd"] == "known: 40"


@pytest.mark.parametrize(("outcome", "family"), [("won", "bernoulli"), ("count", "poisson")])
def test_default_priors_of_other_families_are_on_the_link_scale(outcome, family):
    shown = priors(run(outcome=outcome, family=family).model)
    assert shown["site_sd[Intercept]"] == "HalfStudentT(3, 2.5) at the mean of x"
    scale = f"{2.5 / FRAME['x'].std():.4g}"
    assert shown["site_sd[x]"] == f"HalfStudentT(3, {scale}), scaled to the data"
    assert "residual_sd" not in shown
    assert "link scale" in shown["fixed_effect"]


def test_the_shape_of_a_negative_binomial_has_a_prior():
    assert "InverseGamma" in priors(run(outcome="count", family="negative_binomial").model)["shape"]


def test_every_latent_site_has_a_prior_shown():
    shown = priors(run("(1 + x | site) + (1 | batch)").model)
    names = {re.sub(r"\[.*", "", name) for name in shown}
    assert names == {"site_sd", "site_cor", "batch_sd", "fixed_effect", "residual_sd"}
    plain = run((), outcome="won", family="bernoulli", bayesian_head=False)
    assert "no latent site" in text(plain)


# ----------------------------------------------------------------------------------- convergence


def test_running_out_of_steps_is_said_in_capitals():
    result = run()
    assert "NOT CONVERGED" in text(result)
    assert "(4 steps)" in text(result)
    elbo = np.mean(result.history.elbo) * len(FRAME)
    assert f"Evidence lower bound: {elbo:.2f}" in text(result)


def test_convergence_is_said():
    shown = text(run(schedule=Schedule(steps=30, window=1, stages=1, learning_rate=1e-9)))
    assert "converged: the evidence lower bound has stopped improving" in shown
    assert "NOT CONVERGED" not in shown


def test_divergence_is_said():
    class Breaks(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (float("nan") if self.training else 1.0)

    game = Adversary("site", [""])
    with pytest.raises(DivergenceError) as caught:
        run(net=Breaks(2, 1), bayesian_head=False, adversary=game)
    assert "DIVERGED" in text(caught.value.fit)


# ---------------------------------------------------------------------- networks and adversaries


def test_a_network_is_described_by_its_weights():
    shown = text(run(net=dense(), bayesian_head=False, linear_effects=False))
    assert "Fixed effects: network of 17 weights, on 2 feature(s)" in shown
    assert "weights of a network, without uncertainty" in shown
    shown = text(run(net=dense()))
    assert "last layer latent" in shown
    assert "5 latent weights of the last layer" in shown


def test_the_adversary_is_shown_with_its_weight_warm_up_and_fresh_probe():
    result = run(net=dense(), adversary=Adversary("site", ["0", "1"], weight=2.5))
    shown = text(result)
    steps = result.history.warmup[0]
    assert f"Adversary: site, on 0, 1, weight 2.5, warm-up {steps} steps" in shown
    (probe,) = result.history.probes
    assert f"Fresh probe of site: accuracy {probe['accuracy']:.3f}" in shown
    assert "on 60 training rows, chance 0.167" in shown
    assert "Adversary" not in text(run())
    assert "Fresh probe" not in text(run())


def test_a_weight_chosen_automatically_is_shown_with_those_tried():
    result = run(net=dense(), adversary=Adversary("site", ["0"], weight=1.0))
    tried = [{"adversary": 0, "factor": "site", "weight": weight} for weight in (0.0, 0.3, 1.0)]
    result.history.weights = tried
    assert "weight 1 (chosen from 0, 0.3, 1)" in text(result)
