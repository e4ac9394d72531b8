"""Rivals: what each computes against closed forms and quadrature; all behind one interface."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import multivariate_normal, norm
from sklearn.metrics import davies_bouldin_score

pytest.importorskip("statsmodels")

from armed_pyro import ClusteredData, Schedule
from armed_pyro.analysis.applications import melanoma
from armed_pyro.analysis.rivals.architectures import Autoencoder, Dense
from armed_pyro.analysis.rivals.contenders import programs
from armed_pyro.analysis.rivals.descent import FixedPredictor, descend
from armed_pyro.analysis.rivals.linear_mixed import LinearMixed
from armed_pyro.analysis.rivals.lmmnn import LMMNN, intercepts, log_marginal
from armed_pyro.analysis.rivals.menet import LastLayerEffects, MeNet
from armed_pyro.analysis.rivals.meta_learning import MetaLearning, meta_loss
from armed_pyro.analysis.rivals.rival import (
    Rival,
    Setting,
    cluster_shifts,
    feature_use,
    shuffled,
)
from armed_pyro.analysis.rivals.scores import image_metrics, latents
from armed_pyro.families.simulate import mixed_model

SETTING = Setting("quick", "quick", Dense((6, 5)), Schedule(steps=60, batch_size=64, window=20))
RIVALS: tuple[Rival, ...] = (
    *programs(SETTING),
    MeNet(SETTING),
    LMMNN(SETTING),
    MetaLearning(SETTING),
    LinearMixed(SETTING),
)


def gaussian(setting: Setting = SETTING) -> Setting:
    return replace(setting, family="gaussian")


@pytest.fixture(scope="module")
def split() -> tuple[ClusteredData, ClusteredData, ClusteredData]:
    data, _ = mixed_model("bernoulli", 12, 30, coefficients=[0.3, 1.0, -0.5], seed=1)
    seen, unseen = data.hold_out_clusters("site", labels=[10, 11])
    return *seen.split_rows(0.3, seed=0), unseen


# --------------------------------------------------------------------------- one interface


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_rivals_predict_seen_and_unseen_clusters(rival, split):
    train, test, unseen = split
    state = torch.get_rng_state()
    trained = rival.train(train, test, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    for rows in (test, unseen):
        chance = trained.predict(rows)
        assert chance.shape == (rows.n_rows,)
        assert ((chance > 0) & (chance < 1)).all()
        np.testing.assert_allclose(trained.predict(replace(rows, outcome=None)), chance)
    levels = train.grouping("site").levels
    moved = np.abs(trained.predict(shuffled(test, "site", levels, 0)) - trained.predict(test)).max()
    assert (moved > 1e-4) == rival.clustered
    use = feature_use(trained, train.feature_names)
    assert list(use) == ["x0", "x1"]
    assert all(value > 0 for value in use.values())
    again = rival.train(train, test, seed=3).predict(test)
    np.testing.assert_allclose(again, trained.predict(test))


def test_models_differ_only_in_their_parts():
    models = {rival.name: rival.model((2,), seed=3) for rival in programs(SETTING)}
    first = models["conventional"].net.state_dict()
    for model in models.values():
        for name, value in model.net.state_dict().items():
            assert (value == first[name]).all()
    assert [len(model.terms) for model in models.values()] == [0, 0, 0, 2, 2]
    assert [len(model.adversaries) for model in models.values()] == [0, 0, 1, 1, 0]


@pytest.mark.filterwarnings("ignore:there are fewer rows")
def test_programs_rebuild_images_where_the_network_can():
    study = melanoma.study(0, small=True)
    setting = replace(
        SETTING, architecture=Autoencoder((3, 4), 4, 8), factor="batch", fixed_weight=0.5
    )
    by_name = {one.name: one for one in programs(setting)}
    for name, effects in (("domain adversarial", 0), ("ARMED", 1)):
        model = by_name[name].model(study.image, 0)
        assert [one.at for one in model.others] == ["decoder"]
        assert sum("FilterScaleBias" in str(term) for term in model.terms) == effects
        trained = by_name[name].train(study.train, study.validation, seed=0)
        assert trained.rebuild is not None
        found = {
            kind: image_metrics(trained, rows, setting)
            for kind, rows in (("seen", study.validation), ("unseen", study.unseen))
        }
        rebuilt = trained.rebuild(study.unseen)
        error = np.square(rebuilt - study.unseen.features.numpy()).mean()
        assert found["unseen"]["image mse"] == pytest.approx(error)
        place = latents(trained, study.validation, "latents")
        codes = study.validation.grouping("batch").codes.numpy()
        assert place.shape == (study.validation.n_rows, 4)
        assert found["seen"]["davies-bouldin"] == pytest.approx(davies_bouldin_score(place, codes))
    levels = study.train.grouping("batch").levels
    moved = trained.rebuild(shuffled(study.validation, "batch", levels, 0))
    assert np.abs(moved - trained.rebuild(study.validation)).max() > 1e-4
    assert image_metrics(replace(trained, rebuild=None), study.validation, setting) == {}


def test_predictors_of_rivals_refuse_other_outcomes(split):
    train, _, _ = split
    counts = replace(SETTING, family="poisson")
    for rival in (MeNet(counts), LMMNN(counts), MetaLearning(counts), LinearMixed(counts)):
        with pytest.raises(ValueError, match="bernoulli and gaussian"):
            rival.train(train, None, 0)


# ------------------------------------------------------------------- LMMNN: the integral


def _rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    codes = torch.tensor([0] * 4 + [1] * 9 + [3] * 2)  # the third cluster has no rows
    eta = torch.tensor(rng.normal(size=15))
    return eta, torch.tensor(rng.normal(1.0, 1.5, 15)), codes


def test_gaussian_marginal_likelihood_is_the_multivariate_normals():
    eta, y, codes = _rows()
    sd, residual = torch.tensor(0.8).double(), torch.tensor(1.3).double()
    Z = np.eye(4)[codes]
    covariance = 0.8**2 * Z @ Z.T + 1.3**2 * np.eye(15)
    expected = multivariate_normal(eta.numpy(), covariance).logpdf(y.numpy())
    assert float(log_marginal(eta, y, codes, 4, sd, residual)) == pytest.approx(expected, abs=1e-5)
    blup = 0.8**2 * Z.T @ np.linalg.solve(covariance, (y - eta).numpy())
    known = intercepts(eta, y, codes, 4, sd, residual)
    np.testing.assert_allclose(known.center, blup, atol=1e-6)
    assert float(known.sd[2]) == pytest.approx(0.8)


@pytest.mark.parametrize("sd", [0.3, 2.0])
def test_binary_marginal_likelihood_is_the_integral(sd):
    eta, y, codes = _rows(1)
    y = (y > 1).double()
    expected = 0.0
    for k in (0, 1, 3):
        own = codes == k
        f, sign = eta[own].numpy(), 2 * y[own].numpy() - 1

        def density(b, f=f, sign=sign):
            return np.prod(1 / (1 + np.exp(-sign * (f + b)))) * norm.pdf(b, scale=sd)

        expected += math.log(quad(density, -12, 12, epsabs=1e-12)[0])
    given = torch.tensor(sd).double().requires_grad_(True)
    value = log_marginal(eta, y, codes, 4, given, None)
    assert value.item() == pytest.approx(expected, abs=2e-4)
    value.backward()
    h = 1e-4
    above, below = (
        float(log_marginal(eta, y, codes, 4, torch.tensor(sd + d).double(), None)) for d in (h, -h)
    )
    assert float(given.grad) == pytest.approx((above - below) / (2 * h), abs=2e-3)


def test_lmmnn_recovers_the_variances_of_a_mixed_model():
    data, truth = mixed_model("gaussian", 60, 30, sd=[1.5], dispersion=0.7, seed=2)
    setting = gaussian(
        replace(SETTING, schedule=Schedule(steps=600, batch_size=512, net_learning_rate=0.02))
    )
    trained = LMMNN(setting).train(data, None, seed=0)
    blup = trained.predict(data) - _population(trained, data)
    site = data.grouping("site").codes.numpy()
    means = np.bincount(site, blup) / np.bincount(site)
    assert np.corrcoef(means, truth.effects[:, 0])[0, 1] > 0.98
    # The BLUP of 30 rows is shrunk by 30 * 1.5^2 / (30 * 1.5^2 + 0.7^2) = 0.993.
    slope = np.polyfit(truth.effects[:, 0], means, 1)[0]
    assert slope == pytest.approx(0.993, abs=0.05)


def _population(trained, data):
    new = ClusteredData.from_arrays(
        data.features, None, {"site": np.full(data.n_rows, -1)}, outcome_name="y"
    )
    return trained.predict(new)


# --------------------------------------------------------------------------------- MeNet


def test_e_step_is_the_posterior_of_the_linear_mixed_model():
    data, _ = mixed_model("gaussian", 5, 8, seed=3)
    module = LastLayerEffects(FixedPredictor(gaussian(), data, 0)).double()
    rows = module.predictor.encode(data)
    D = torch.diag(torch.linspace(0.2, 1.0, 6)).double()
    module.covariance.copy_(D)
    module.residual.fill_(0.6)
    with torch.no_grad():
        fixed, hidden = module.predictor(rows)
        r = (module.predictor.target(rows) - fixed).numpy()
    Z = np.column_stack([np.ones(len(r)), hidden.numpy()])
    module.expect(rows)
    second, noise = np.zeros((6, 6)), []
    for k in range(5):
        own = data.grouping("site").codes.numpy() == k
        z, D_ = Z[own], D.numpy()
        gain = D_ @ z.T @ np.linalg.inv(z @ D_ @ z.T + 0.6 * np.eye(own.sum()))
        u, C = gain @ r[own], D_ - gain @ z @ D_
        np.testing.assert_allclose(module.effects[k], u, atol=1e-6)
        second += np.outer(u, u) + C
        noise.append((r[own] - z @ u) ** 2 + np.einsum("ij,jk,ik->i", z, C, z))
    np.testing.assert_allclose(module.covariance, second / 5, atol=1e-6)
    assert float(module.residual) == pytest.approx(np.concatenate(noise).mean())


def test_em_never_lowers_the_likelihood():
    data, _ = mixed_model("gaussian", 8, 12, sd=[1.5], seed=4)
    module = LastLayerEffects(FixedPredictor(gaussian(), data, 0)).double()
    rows = module.predictor.encode(data)
    with torch.no_grad():
        fixed, hidden = module.predictor(rows)
    Z = np.column_stack([np.ones(len(fixed)), hidden.numpy()])
    r = (module.predictor.target(rows) - fixed).numpy()
    codes = data.grouping("site").codes.numpy()

    def likelihood() -> float:
        D, noise = module.covariance.numpy(), float(module.residual)
        return sum(
            multivariate_normal(cov=z @ D @ z.T + noise * np.eye(len(z))).logpdf(r[codes == k])
            for k in range(8)
            for z in [Z[codes == k]]
        )

    values = [likelihood()]
    for _ in range(15):
        module.expect(rows)
        values.append(likelihood())
    assert (np.diff(values) > -1e-8).all()
    assert values[-1] > values[0] + 5


def test_binary_e_step_ends_at_the_mode():
    data, _ = mixed_model("bernoulli", 6, 15, sd=[1.5], seed=5)
    module = LastLayerEffects(FixedPredictor(SETTING, data, 0)).double()
    rows = module.predictor.encode(data)
    D = module.covariance.clone()
    module.expect(rows)
    fixed, hidden = module.predictor(rows)
    Z = torch.cat([torch.ones(len(hidden), 1), hidden], -1).detach()
    u = module.effects.clone().requires_grad_(True)
    eta = fixed.detach() + (Z * u[rows.codes]).sum(-1)
    log_joint = torch.distributions.Bernoulli(logits=eta).log_prob(rows.y).sum()
    log_joint = log_joint - 0.5 * (u @ torch.linalg.inv(D) * u).sum()
    (gradient,) = torch.autograd.grad(log_joint, u)
    assert float(gradient.abs().max()) < 1e-5


# -------------------------------------------------------------------------- meta-learning


@pytest.fixture(scope="module")
def meta() -> tuple[FixedPredictor, object]:
    data, _ = mixed_model("bernoulli", 6, 10, seed=6)
    predictor = FixedPredictor(SETTING, data, 0).double()
    return predictor, predictor.encode(data)


def _meta(predictor, rows, **settings):
    torch.manual_seed(0)
    return meta_loss(predictor, rows, MetaLearning(SETTING, **settings))


def test_without_an_inner_step_the_meta_loss_is_a_weighted_loss(meta):
    predictor, rows = meta
    # Two of six clusters are meta-test: with weight 1/2, every row counts the same.
    loss = _meta(predictor, rows, inner_rate=0.0, test_weight=0.5) / 1.5
    assert loss.item() == pytest.approx(predictor.loss(predictor(rows)[0], rows).item(), abs=1e-12)


@pytest.mark.parametrize("second_order", [True, False])
def test_only_the_second_order_gradient_is_the_meta_losss(meta, second_order):
    predictor, rows = meta
    weight = predictor.net[0].weight
    settings = {"inner_rate": 0.5, "second_order": second_order}
    (gradient,) = torch.autograd.grad(_meta(predictor, rows, **settings), weight)
    h, found = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * h
        found.append(float(_meta(predictor, rows, **settings)))
        with torch.no_grad():
            weight[0, 0] -= sign * h
    numeric = (found[0] - found[1]) / (2 * h)
    assert (abs(float(gradient[0, 0]) - numeric) < 1e-7) is second_order


# -------------------------------------------------------------------- linear mixed model


def test_linear_mixed_model_finds_the_simulated_intercepts():
    data, truth = mixed_model("bernoulli", 15, 60, sd=[1.2], coefficients=[0.2, 0.8], seed=7)
    trained = LinearMixed(SETTING).train(data, None, 0)
    shifts = cluster_shifts(trained, data, "site")
    assert np.corrcoef(shifts, truth.effects[:, 0])[0, 1] > 0.9
    assert trained.net.weight.item() / float(data.features.std()) == pytest.approx(0.8, abs=0.25)
    known = trained.predict(data.take(slice(1)))
    assert known != pytest.approx(_population(trained, data.take(slice(1))))


def test_gaussian_linear_mixed_model_is_reml():
    data, truth = mixed_model("gaussian", 20, 25, sd=[1.0], coefficients=[0.5, 2.0], seed=8)
    trained = LinearMixed(gaussian()).train(data, None, 0)
    slope = trained.net.weight.item() / float(data.features.std())
    assert slope == pytest.approx(2.0, abs=4 / math.sqrt(500))
    shift = trained.predict(data) - _population(trained, data)
    site = data.grouping("site").codes.numpy()
    means = np.bincount(site, shift) / 25
    assert np.corrcoef(means, truth.effects[:, 0])[0, 1] > 0.95


# -------------------------------------------------------------------------------- descent


def test_descent_returns_the_network_with_the_best_validation_loss(split):
    train, test, _ = split
    predictor = FixedPredictor(SETTING, train, 0)
    source, held = predictor.encode(train), predictor.encode(test)
    seen = []

    def loss(rows):
        value = predictor.loss(predictor(rows)[0], rows)
        if rows is held:
            seen.append(float(value))
        return value

    schedule = Schedule(steps=400, batch_size=64, window=20, stages=2, patience=2)
    steps = descend(predictor, source, loss, schedule, 0, held=held)
    assert steps == 20 * len(seen)
    with torch.no_grad():
        assert float(loss(held)) == pytest.approx(min(seen), rel=1e-5)


def test_a_diverging_descent_says_what_to_do(split):
    predictor = FixedPredictor(SETTING, split[0], 0)

    def loss(rows):
        return predictor(rows)[0].sum() * float("nan")

    with pytest.raises(FloatingPointError, match="lower learning rate"):
        descend(predictor, predictor.encode(split[0]), loss, SETTING.schedule, 0)
