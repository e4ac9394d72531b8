"""The check of the adversary: it warns where a fresh probe reads the cluster, and only there."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from armed_pyro import Adversary, ClusteredData, MixedEffects, Schedule, fit
from armed_pyro.checks.adversary_checks import NAME, adversary_checks
from armed_pyro.checks.check import LEVEL
from armed_pyro.engine.schedule import History
from armed_pyro.networks.fresh_probe import FreshProbe

BRIEF = Schedule(steps=4, window=4, stages=0)
SITES, N = 4, 200


def fitted(leak, *games):
    """A fit whose module "0" hands the features on: noise, plus the site times `leak`."""
    rng = np.random.default_rng(0)
    site = np.arange(N) % SITES
    x = rng.normal(size=(N, 3))
    x[:, 0] += leak * site
    groups = {"site": site, "batch": rng.permutation(np.arange(N) % 5)}
    data = ClusteredData.from_arrays(x, rng.normal(size=N), groups)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 1))
    model = MixedEffects(net, "(1 | site)", adversary=games)
    return fit(model, data, schedule=BRIEF, refine=False, progress=False)


SITE = Adversary("site", ["0"], weight=2.0)


def with_history(result, **changes):
    return replace(result.posterior, history=replace(result.history, **changes))


def test_a_cluster_that_is_read_fails_with_its_figures_and_advice():
    result = fitted(4.0, SITE)
    (check,) = adversary_checks(result.posterior)
    probe = FreshProbe.from_json(result.history.probes[0])
    assert check.verdict == "fail"
    assert check.effect == probe.effect
    assert check.effect > 0.8
    assert (check.name, check.part, check.threshold) == (NAME, "model", 0.1)
    assert check.p < LEVEL
    assert f"accuracy {probe.accuracy:.3f}" in check.reason
    assert "weight of the adversary of site (now 2.0)" in check.advice
    verdict = result.diagnostics().model
    assert "a fresh probe reads site" in verdict.sentence


def test_a_hidden_cluster_passes():
    result = fitted(0.0, SITE)
    (check,) = adversary_checks(result.posterior)
    assert (check.verdict, check.advice) == ("pass", "")
    assert check in result.diagnostics().checks


def test_without_an_adversary_there_is_no_check():
    result = fitted(4.0)
    assert list(adversary_checks(result.posterior)) == []
    assert result.history.probes == []
    assert NAME not in [check.name for check in result.diagnostics().checks]


def test_the_worst_of_several_adversaries_is_named():
    result = fitted(4.0, Adversary("batch", ["0"]), SITE)
    (check,) = adversary_checks(result.posterior)
    assert "reads site" in check.reason


@pytest.mark.parametrize(
    ("accuracy", "rows", "verdict"),
    [(0.6, 40, "warn"), (0.34, 40, "pass"), (0.30, 2000, "pass"), (0.40, 2000, "warn")],
)
def test_noise_and_small_effects_pass(accuracy, rows, verdict):
    probe = FreshProbe("site", accuracy, 0.01, 0.25, 0.0, None, rows, 4, held_out=True)
    posterior = with_history(fitted(0.0, SITE), probes=[probe.to_json()])
    (check,) = adversary_checks(posterior)
    assert check.verdict == verdict
    assert check.effect == pytest.approx((accuracy - 0.25) / 0.75)


def test_an_automatic_weight_is_not_said_to_be_too_small():
    tried = [{"adversary": 0, "factor": "site", "weight": weight} for weight in (0.0, 0.3, 1.0)]
    (check,) = adversary_checks(with_history(fitted(4.0, SITE), weights=tried))
    assert "of the weights up to 1 none hid it" in check.advice


def test_clusters_of_single_rows_are_not_checked():
    rng = np.random.default_rng(0)
    data = ClusteredData.from_arrays(
        rng.normal(size=(20, 3)), rng.normal(size=20), {"site": np.arange(20)}
    )
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 1))
    model = MixedEffects(net, (), adversary=SITE)
    result = fit(model, data, schedule=BRIEF, refine=False, progress=False)
    (check,) = adversary_checks(result.posterior)
    assert check.verdict == "not checked"
    assert "too few rows in each cluster of site" in check.reason


def test_histories_have_defaults():
    assert (History().warmup, History().probes, History().weights) == ([], [], [])
