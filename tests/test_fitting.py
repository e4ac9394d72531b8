"""fit(): what it leaves alone, what it repeats, when it stops, and how it fails."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from armed_pyro import (
    Adversary,
    ClusteredData,
    DivergenceError,
    Known,
    MixedEffects,
    Priors,
    Schedule,
    fit,
)
from armed_pyro.engine.checkpoint import module_tensors
from armed_pyro.engine.processes import ALONE
from armed_pyro.engine.shards import Share
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.inference.train import train
from armed_pyro.inference.training_run import Run
from armed_pyro.inference.training_task import TrainingTask
from armed_pyro.rows.in_memory import HeldRows

SHORT = Schedule(steps=6, window=3, stages=0)


def make_data(seed=0, n_sites=8, per_site=5, noise=0.5):
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(n_sites), per_site)
    x = rng.normal(size=(len(site), 2))
    effects = np.random.default_rng(99).normal(size=n_sites)
    y = x[:, 0] + effects[site] + noise * rng.normal(size=len(site))
    return ClusteredData.from_arrays(x, y, {"site": site})


def make_net(*middle, seed=0, outputs=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 4), *middle, nn.ReLU(), nn.Linear(4, outputs))


def make_model(net=None, **options):
    return MixedEffects(make_net() if net is None else net, "(1 | site)", **options)


def run(model=None, data=None, **options):
    settings = {"schedule": SHORT, "progress": False} | options
    data = make_data() if data is None else data
    return fit(make_model() if model is None else model, data, **settings)


def state(result):
    return module_tensors("model", result.model) | module_tensors("guide", result.guide)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def validation_loss(result, data):
    """-log p(y | training rows) a row, over 100 draws of the guide."""
    rows = result.model.encode(data).all()
    with result.model.seeded(result.seed):
        latents = result.guide.draws(result.model.clusters(), 100)
        by_draw = result.model.log_likelihood(rows, latents)
        return float(np.log(100) - by_draw.logsumexp(0).mean())


# ------------------------------------------------------------------- what is left alone, repeats


def test_the_users_model_and_network_stay_as_they_were():
    net = make_net(nn.BatchNorm1d(4)).eval()
    model = make_model(net, adversary=Adversary("site", ["0"], weight=2.0))
    before = module_tensors("", net)
    result = run(model)
    assert same(module_tensors("", net), before)
    assert not net.training
    assert model.net is net
    assert model.facts is None
    assert model.factors == ()
    assert model.adversaries[0].classifier is None
    hooks = [len(one._forward_hooks) + len(one._forward_pre_hooks) for one in net.modules()]
    assert not any(hooks)
    assert not same(module_tensors("", result.model.net), before), "nothing was trained"


@pytest.mark.parametrize("game", [False, True], ids=["plain", "adversary"])
@pytest.mark.parametrize("batch_size", [None, 16], ids=["full", "batches"])
def test_the_seed_alone_decides_the_result(game, batch_size):
    def once(seed, surroundings):
        net = make_net(nn.Dropout(0.3))
        model = make_model(net, adversary=Adversary("site", ["0"]) if game else ())
        torch.manual_seed(surroundings)
        schedule = Schedule(steps=6, window=3, stages=0, batch_size=batch_size)
        return run(model, seed=seed, schedule=schedule)

    one, again, other = once(0, 1), once(0, 2), once(1, 1)
    assert same(state(one), state(again))
    assert one.history == again.history
    assert not same(state(one), state(other))


@pytest.mark.parametrize("game", [False, True], ids=["plain", "adversary"])
def test_global_random_states_stay_as_they_were(game):
    model = make_model(adversary=Adversary("site", ["0"]) if game else ())
    data = make_data()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    result = run(model, data)
    result.predict(data, draws=5)
    result.variance_components(draws=5)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_two_fits_do_not_share_parameters():
    model, data = make_model(), make_data()
    one = run(model, data)
    before = state(one)
    run(model, data, seed=1)
    assert same(state(one), before)


# ----------------------------------------------------------------------------------- the optimum


def linear(random="(1 | site)", family="gaussian", **options):
    return MixedEffects(nn.Linear(2, 1), random, family, bayesian_head=True, **options)


def unsettled(monkeypatch):
    """Linear programs are trained as networks are, on mini-batches of rows."""
    monkeypatch.setattr("armed_pyro.inference.training_run.trains_network", lambda model: True)


def assert_same_posterior(fits, others, *, mean, sd):
    """Means within `mean` posterior sds, and sds within a factor."""
    fits = [one.draws(4000, seed=1) for one in fits]
    others = [one.draws(4000, seed=2) for one in others]
    for name in fits[0]:
        one, other = (torch.cat([draws[name] for draws in each]) for each in (fits, others))
        center, scale = one.mean(0), one.std(0)
        assert ((other.mean(0) - center).abs() / scale).max() < mean, name
        assert (torch.log(other.std(0) / scale)).abs().max() < np.log(sd), name


@pytest.fixture(scope="module")
def full_batch():
    return run(linear(), make_data(), schedule=Schedule(steps=400, window=50, stages=0))


@pytest.mark.slow
def test_mini_batches_reach_the_full_batch_optimum(full_batch, monkeypatch):
    unsettled(monkeypatch)
    schedule = Schedule(steps=500, window=50, stages=0, batch_size=10)
    # One run's sds end up to 1.4 times too small, by the noise of its gradients.
    batches = [run(linear(), make_data(), schedule=schedule, seed=seed) for seed in range(3)]
    assert all(one.history.settled is None for one in batches)
    # A likelihood without its factor of 4 would double the sds.
    assert_same_posterior([full_batch], batches, mean=0.5, sd=1.4)


def test_training_raises_the_evidence_lower_bound(full_batch, monkeypatch):
    unsettled(monkeypatch)
    history = run(linear(), schedule=Schedule(steps=400, window=50, stages=0)).history
    elbo = np.array(history.elbo)
    assert elbo[-50:].mean() > elbo[:5].mean() + 0.3
    np.testing.assert_allclose(history.loss, -elbo, rtol=1e-6)
    # From the mode of the hyperparameters, a linear program starts close to where that ends.
    settled = np.array(full_batch.history.elbo)
    assert settled[:5].mean() > elbo[-50:].mean() - 0.05
    assert settled[-50:].mean() > elbo[-50:].mean() - 0.005
    assert settled[-50:].mean() > settled[:5].mean()
    np.testing.assert_allclose(full_batch.history.loss, -settled, rtol=1e-6)


def test_the_fixed_effects_likelihood_enters_the_loss():
    history = run(make_model(fixed_weight=2.0)).history
    assert np.all(np.array(history.loss) + np.array(history.elbo) > 0.1)


# -------------------------------------------------------------------------------------- stopping


def test_a_flat_loss_stops_as_converged():
    schedule = Schedule(steps=5000, window=25, stages=2)
    result = run(linear(), schedule=schedule)
    assert (result.stopped, result.converged) == ("converged", True)
    assert len(result.history.loss) < 2000
    rates = np.array(result.history.rate)
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(schedule.decay), "one cut before the last"


def test_steps_that_run_out_are_not_convergence():
    result = run(schedule=Schedule(steps=7, window=3, stages=3))
    assert (result.stopped, result.converged) == ("steps", False)
    assert len(result.history.loss) == len(result.history.elbo) == 7
    assert result.history.step == [3, 6, 7]


@pytest.mark.filterwarnings("ignore:there are fewer rows")
def test_validation_stops_the_network_at_its_best_and_lets_the_guide_settle(monkeypatch):
    networks, close = [], Run.close_window

    def recorded(self, losses):
        networks.append(module_tensors("model", self.task.model))
        close(self, losses)

    monkeypatch.setattr(Run, "close_window", recorded)
    data, validation = make_data(noise=1.5), make_data(seed=1, noise=1.5)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 1))
    schedule = Schedule(steps=2000, window=4, stages=1, patience=5, net_learning_rate=0.02)
    result = run(make_model(net), data, validation=validation, schedule=schedule)
    losses = result.history.validation
    assert (result.stopped, result.converged) == ("validation", True)
    assert len(losses) == len(result.history.step) < 500
    best = int(np.argmin(losses))
    overfitted = losses[best + schedule.patience]
    assert losses[best] < overfitted, "an overfitting network must get worse"
    assert len(losses) - 1 > best + schedule.patience, "the guide must go on"
    trained = module_tensors("model", result.model)
    assert same(trained, networks[best])
    assert not same(trained, networks[best + 1])
    hyper = result.guide.hyperparameters
    assert not torch.equal(hyper.frame, torch.eye(hyper.size)), "the guide is not that of then"
    assert hyper.skew.any()


def test_validation_rows_may_lie_in_new_clusters():
    result = run(validation=make_data(seed=1, n_sites=11))
    assert np.isfinite(result.history.validation).all()


# --------------------------------------------------------------------------- the settled network

QUICK = Schedule(steps=2000, window=20, stages=1, net_learning_rate=0.02)


def record_networks(monkeypatch):
    """The network's tensors after every window of steps."""
    networks, close = [], Run.close_window

    def recorded(self, losses):
        networks.append(module_tensors("", self.task.model.network))
        close(self, losses)

    monkeypatch.setattr(Run, "close_window", recorded)
    return networks


@pytest.mark.parametrize("random", ["(1 | site)", ()], ids=["effects", "none"])
@pytest.mark.parametrize("family", ["gaussian", "bernoulli"])
def test_a_linear_program_is_settled_from_the_first_step(random, family):
    data = make_data()
    if family == "bernoulli":
        data = dataclasses.replace(data, outcome=(data.outcome > 0).to(data.outcome))
    history = run(linear(random, family), data, schedule=Schedule(steps=30, window=10)).history
    assert history.settled == 0
    assert history.step == [10, 20, 30]
    assert len(history.r_hat) == len(history.drift) == 3
    assert history.particles == (16 if family == "bernoulli" and random else 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"random": ()}, {"random": (), "priors": Priors(residual_sd=Known(1.0))}],
    ids=["effects", "none", "nothing-latent"],
)
def test_a_network_settles_at_its_plateau_and_is_held_from_then_on(options, monkeypatch):
    networks = record_networks(monkeypatch)
    model = MixedEffects(make_net(), **{"random": "(1 | site)"} | options)
    result = run(model, make_data(n_sites=20), schedule=QUICK, validation=None)
    history = result.history
    assert result.stopped == "converged"
    assert 0 < history.settled < len(history.loss)
    plateau = history.step.index(history.settled)
    assert len(history.r_hat) == len(history.drift) == len(history.step) - plateau - 1
    assert not same(networks[0], networks[plateau])
    assert all(same(networks[plateau], one) for one in networks[plateau:])
    assert same(networks[plateau], module_tensors("", result.model.network))


def test_a_program_with_an_adversary_settles_only_after_the_game():
    model = linear(adversary=Adversary("site", [""]))
    history = run(model, schedule=QUICK).history
    assert history.settled > 0
    after = history.step.index(history.settled)
    logged = [one[0] for one in history.adversary_accuracy]
    assert all(0 <= one <= 1 for one in logged)
    assert set(logged[after:]) == {logged[after]}, "the last word of the game"


def test_iterates_that_still_move_are_told_from_those_that_rest(monkeypatch):
    schedule = Schedule(steps=150, window=50, stages=0, learning_rate=0.01)
    rests = run(linear(), schedule=schedule).history
    monkeypatch.setattr("armed_pyro.inference.phases.start_at_mode", lambda *arguments: None)
    moves = run(linear(), schedule=schedule).history
    assert moves.drift[0] > 0.5 > 0.2 > max(rests.drift[1:])
    assert moves.r_hat[0] > 1.05 > max(rests.r_hat[1:])


def test_only_the_hyperparameters_are_trained_once_the_network_is_settled():
    result = run(linear(), schedule=SHORT)
    trained = {name for name, one in result.guide.named_parameters() if one.requires_grad}
    every = {
        f"hyperparameters.{name}" for name, _ in result.guide.hyperparameters.named_parameters()
    }
    assert trained == every


def test_the_shape_of_the_hyperparameters_is_trained_only_once_the_network_is_settled():
    moving = run(make_model(), schedule=SHORT).guide.hyperparameters
    settled = run(linear(), schedule=SHORT).guide.hyperparameters
    names = {name for name, _ in moving.named_parameters()} - {"shift", "log_scale", "coupling"}
    assert len(names) >= 3
    for name in names:
        assert not getattr(moving, name).any(), name
        assert getattr(settled, name).any(), name


@pytest.mark.parametrize("model", [linear(), make_model()], ids=["linear", "network"])
def test_what_was_fitted_can_be_fitted_again(model, monkeypatch):
    first = run(model, schedule=QUICK)
    assert first.history.settled is not None
    assert all(one.requires_grad for one in first.model.network.parameters())
    again = train(first.model, first.data, schedule=QUICK, progress=False)
    assert again.history.settled is not None
    if first.model.linear:
        assert_same_posterior([first], [again], mean=0.5, sd=1.5)


CROSSED = "(1 | site) + (1 | batch)"


def larger_data(family="gaussian"):
    """40 sites of 5 rows, crossed with 5 batches."""
    rng = np.random.default_rng(5)
    site, batch = np.repeat(np.arange(40), 5), rng.permutation(np.arange(200) % 5)
    x = rng.normal(size=(200, 2))
    eta = x[:, 0] + rng.normal(size=40)[site] + 0.7 * rng.normal(size=5)[batch]
    y = eta + 0.5 * rng.normal(size=200)
    y = y if family == "gaussian" else (rng.random(200) < 1 / (1 + np.exp(-2 * eta))).astype(float)
    return ClusteredData.from_arrays(x, y, {"site": site, "batch": batch})


def limit_steps(monkeypatch, step, search):
    """At most so many log-likelihoods in one evaluation; the mini-batches that this makes."""
    batches, whole = [], HeldRows.whole_clusters

    def recorded(self, factor, chosen):
        rows = whole(self, factor, chosen)
        batches.append(rows)
        return rows

    # A closed form needs no steps over rows.
    for phase in ("phases", "importance_sampling"):
        monkeypatch.setattr(f"armed_pyro.inference.{phase}.exact_likelihood", lambda *_: None)
    monkeypatch.setattr("armed_pyro.inference.phases.LARGEST_STEP", step)
    monkeypatch.setattr("armed_pyro.inference.marginal_mode.LARGEST_STEP", search)
    monkeypatch.setattr(HeldRows, "whole_clusters", recorded)
    return batches


@pytest.mark.parametrize(
    ("family", "random"),
    [("gaussian", "(1 | site)"), ("bernoulli", "(1 | site)"), ("gaussian", CROSSED)],
    ids=["gaussian", "bernoulli", "crossed"],
)
def test_data_too_large_for_a_step_are_taken_in_whole_clusters(family, random, monkeypatch):
    data, model = larger_data(family), linear(random, family)
    particles, draws = 1 if family == "gaussian" else 16, 8 if random == CROSSED else 1
    schedule = Schedule(particles=particles)
    whole = run(model, data, refine=False, schedule=schedule)
    # Room for 199 of the 200 rows: with their particles, and the search's draws of other factors.
    batches = limit_steps(monkeypatch, step=2 * 199 * particles, search=199 * draws)
    parts = []
    for seed in (1, 2, 3):
        one = run(model, data, refine=False, schedule=schedule, seed=seed)
        used = batches[-len(one.history.loss) :]
        assert {len(rows) for rows in used} == {95}, "19 of the sites, all their rows"
        drawn = {tuple(rows.memberships["site"].index.tolist()) for rows in used}
        assert len(drawn) == len(used)
        parts.append(one)
    # Each run ends in the noise of its last steps: means of 0.15 posterior sds, sds of up to 0.3.
    assert_same_posterior([whole], parts, mean=0.2, sd=1.25)


# ------------------------------------------------------------------------------ device, progress


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_missing_cuda_device_is_a_clear_error(device):
    with pytest.raises(ValueError, match=rf"{device}.*no CUDA device"):
        run(device=device)


def test_the_progress_bar_can_be_turned_off(capfd):
    run(progress=False)
    assert capfd.readouterr() == ("", "")
    run(make_model(adversary=Adversary("site", ["0"])), progress=True)
    shown = "".join(capfd.readouterr())
    for text in ("step 6/6", "loss", "adversary of site at weight 1"):
        assert text in shown


# -------------------------------------------------------------------------------------- failures


class Breaks(nn.Module):
    """Gives `value` from the training call after `calls` on."""

    def __init__(self, calls, value):
        super().__init__()
        self.inner, self.left, self.value = make_net(nn.BatchNorm1d(4)), calls, value

    def forward(self, x):
        if self.training:
            self.left -= 1
        return self.inner(x) * (self.value if self.left < 0 else 1.0)


class BreaksBackward(nn.Module):
    """Finite outputs whose gradient is not."""

    def __init__(self):
        super().__init__()
        self.inner = make_net()

    def forward(self, x):
        y = self.inner(x)
        return y + torch.sqrt(0.0 * y)


def assert_usable(result, data):
    """A fit after divergence has finite parameters and predicts."""
    assert (result.stopped, result.converged) == ("diverged", False)
    broken = [name for name, one in state(result).items() if not torch.isfinite(one).all()]
    assert not broken
    assert not result.model.training
    if not isinstance(result.model.net, Breaks):
        assert np.isfinite(result.predict(data, draws=5).expected).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_network_that_breaks_is_reported_with_step_and_cause(value):
    data = make_data()
    with pytest.raises(
        DivergenceError, match=r"step 6.*(lower bound|gradient) is not finite"
    ) as caught:
        run(make_model(Breaks(5, value)), data, schedule=Schedule(steps=20, window=2))
    assert_usable(caught.value.fit, data)
    assert len(caught.value.fit.history.loss) == 5


def test_a_gradient_that_is_not_finite_is_reported():
    with pytest.raises(DivergenceError, match=r"step 1: .*gradient is not finite") as caught:
        run(make_model(BreaksBackward()))
    assert not [n for n, one in state(caught.value.fit).items() if not torch.isfinite(one).all()]


@pytest.mark.parametrize("name", ["learning_rate", "net_learning_rate"])
@pytest.mark.parametrize("rate", [1e4, 1e15, 1e30])
def test_an_absurd_learning_rate_is_divergence(name, rate):
    data = make_data()
    schedule = Schedule(steps=60, window=3, stages=0, **{name: rate})
    net = make_net(nn.BatchNorm1d(4))
    with pytest.raises(DivergenceError, match=r"at step \d+: .*learning rate") as caught:
        run(make_model(net), data, schedule=schedule)
    assert_usable(caught.value.fit, data)


def test_divergence_with_validation_gives_the_best_state():
    data, validation = make_data(), make_data(seed=1)
    schedule = Schedule(steps=60, window=3, stages=0)
    with pytest.raises(DivergenceError) as caught:
        run(make_model(Breaks(10, float("nan"))), data, validation=validation, schedule=schedule)
    result = caught.value.fit
    result.model.net.left = 10**6
    best = min(result.history.validation)
    assert validation_loss(result, validation) == pytest.approx(best, rel=1e-5)


# -------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(4), nn.Dropout(0.5), nn.LayerNorm(4)],
    ids=["batch-norm", "dropout", "layer-norm"],
)
@pytest.mark.parametrize("batch_size", [None, 16], ids=["full", "batches"])
def test_networks_with_modes_train_in_one_and_predict_in_the_other(layer, batch_size):
    data = make_data()
    schedule = Schedule(steps=6, window=3, stages=0, batch_size=batch_size)
    result = run(make_model(make_net(layer)), data, schedule=schedule)
    assert not any(module.training for module in result.model.net.modules())
    one, again = result.predict(data, draws=5), result.predict(data, draws=5)
    np.testing.assert_array_equal(one.expected, again.expected)
    # Eval mode: a row's prediction does not depend on which rows are with it.
    few = result.predict(data.take(slice(3)), draws=5)
    np.testing.assert_allclose(few.expected, one.expected[:, :3], rtol=1e-4, atol=1e-5)
    if isinstance(layer, nn.BatchNorm1d):
        assert int(result.model.net[1].num_batches_tracked) == 6


def test_a_network_in_double_precision_is_fitted_in_it():
    result = run(make_model(make_net().double()))
    assert {one.dtype for one in result.guide.parameters()} == {torch.float64}


# ------------------------------------------------------------------------------------- adversary


def test_the_network_that_is_kept_was_trained_at_the_full_weight():
    """Before the end of the warm-up no window is the best, though the loss falls."""
    data = leaky_data()
    game = Adversary("site", ["0"], weight=1.0, warmup=0.5, warmup_epochs=50)
    schedule = Schedule(steps=60, window=5, net_learning_rate=0.05)
    bound = make_model(adversary=game).bind(data)
    rows = bound.encode(data)
    held = bound.encode(data, bound.data_facts().levels_with(data))
    share, guide = Share.of(ALONE, rows, bound.network), choose_guide(bound, rows)
    run = Run(TrainingTask(bound, guide, data, rows, share, schedule, held))
    assert run.history.warmup == [30]
    kept = []
    for _ in range(12):
        bound.train()
        losses = [run.take_step() for _ in range(5)]
        run.close_window(losses)
        kept.append(bool(run.phase.best))
    assert kept == [False] * 6 + [True] * 6
    assert run.history.validation[1] < run.history.validation[0]
    assert run.phase.plateau.best == min(run.history.validation[6:])


def leaky_data():
    """The first feature says in which of four sites a row is."""
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(4), 10)
    x = np.column_stack([site + 0.05 * rng.normal(size=40), rng.normal(size=40)])
    return ClusteredData.from_arrays(x, x[:, 1] + rng.normal(size=40), {"site": site})


def test_the_adversarys_accuracy_is_logged_and_beats_chance_where_features_leak():
    schedule = Schedule(steps=150, window=30, stages=0, net_learning_rate=0.03)
    game = Adversary("site", ["0"], weight=0.0)
    accuracy = run(make_model(adversary=game), leaky_data(), schedule=schedule)
    logged = np.array(accuracy.history.adversary_accuracy)
    assert logged.shape == (5, 1)
    assert ((logged >= 0) & (logged <= 1)).all()
    # Chance is 0.25, with a standard error of 0.07 for 40 rows.
    assert logged[-1, 0] > 0.6


def test_each_adversary_has_its_own_accuracy():
    games = [Adversary("site", ["0"]), Adversary("site", ["2"])]
    history = run(make_model(adversary=games)).history
    assert np.array(history.adversary_accuracy).shape == (2, 2)
    assert run().history.adversary_accuracy == [[], []]


def test_a_table_without_roles_is_refused_with_the_way_to_give_them():
    with pytest.raises(TypeError, match=r"found a DataFrame.*ClusteredData\.from_frame"):
        fit(make_model(), pd.DataFrame({"y": [1.0]}), progress=False)
    with pytest.raises(TypeError, match=r"a dict.*Pass Priors\("):
        MixedEffects(torch.nn.Linear(1, 1), "(1 | site)", priors={"sd": 1.0})
    with pytest.raises(TypeError, match=r"found None\. Write .*without random effects"):
        MixedEffects(torch.nn.Linear(1, 1), None)
