"""Optimizers: each cluster's own Adam, and steps whose cost does not grow with their number."""

import numpy as np
import pyro
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from armed_pyro import (
    Adversary,
    ClusteredData,
    MixedEffects,
    Schedule,
    Slopes,
    StructuredGuide,
    fit,
)
from armed_pyro.distributions.whitened import Pushforward
from armed_pyro.engine.adam import BETAS, Adam
from armed_pyro.engine.compiled_step import Steps
from armed_pyro.engine.processes import ALONE
from armed_pyro.engine.shards import Share
from armed_pyro.guides.crossed import CrossedGuide
from armed_pyro.inference.objective import Objective
from armed_pyro.inference.optimizers import LazyAdam, Optimizers
from armed_pyro.inference.training_run import Run
from armed_pyro.inference.training_task import TrainingTask

K, N = 60, 120
pytestmark = pytest.mark.filterwarnings("ignore:there are fewer rows")
RANDOM = {
    "intercept": "(1 | site)",
    "slopes": "(1 + x0 | site)",
    "hidden": ["(1 | site)", Slopes("site", on="1")],
    "wide": [Slopes("site", on="1")],
}


def bind(random="slopes", clusters=K, rows=2, seed=0, **settings):
    rng = np.random.default_rng(seed)
    site = rng.permutation(np.repeat(np.arange(clusters), rows))
    x = rng.normal(size=(len(site), 2))
    y = x[:, 0] + rng.normal(size=clusters)[site] + rng.normal(size=len(site))
    data = ClusteredData.from_arrays(x, y, {"site": site, "batch": site % 3})
    torch.manual_seed(0)
    width = 20 if random == "wide" else 3
    net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1)).double()
    model = MixedEffects(net, RANDOM.get(random, random), **settings).bind(data)
    source = model.encode(data)
    return data, model, source, StructuredGuide(model, source)


def gradients_of(module, prefix):
    return {f"{prefix}.{name}": one.grad for name, one in module.named_parameters()}


def step(lazy, rate):
    """What is made of the gradients of the clusters read last."""
    parameters = dict(lazy.guide.named_parameters("guide"))
    for table in lazy.tables.values():
        gradient = table.joined(gradients_of(lazy.guide, "guide"))
        table(parameters, gradient, torch.tensor(rate))


def test_joined_parameters_see_the_adam_of_torch():
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (3, 4), "vector": (5,), "number": (), "unused": (2,)}
    expected = {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.double))
        for name, shape in shapes.items()
    }
    mine = {name: one.detach().clone() for name, one in expected.items()}
    reference = torch.optim.Adam(expected.values(), lr=0.03, betas=BETAS)
    adam = Adam(mine)
    for _ in range(20):
        for name, one in expected.items():
            if name != "unused":
                one.grad = torch.randn(one.shape, generator=generator, dtype=torch.double)
        reference.step()
        adam(mine, adam.joined({k: v.grad for k, v in expected.items()}), torch.tensor(0.03))
    for name, one in expected.items():
        torch.testing.assert_close(mine[name], one.detach())


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_gradients_are_clipped_apart_for_network_and_guide(clip):
    """Beside torch's own clipping and AdamW, whose decay is for the network's weights only."""
    _, model, _, guide = bind("slopes")
    rates = {"learning_rate": 0.03, "net_learning_rate": 0.01}
    schedule = Schedule(clip=clip, weight_decay=0.5, **rates)
    optimizers = Optimizers(model, LazyAdam(guide, {}, 0), schedule, 1e-4)
    modules = {"guide": guide, "model": model}
    groups, modulewise, expected = [], [], {}
    for (prefix, module), rate, eps in zip(
        modules.items(), (0.03, 0.01), (1e-4, 1e-8), strict=True
    ):
        trained = [pair for pair in module.named_parameters(prefix) if pair[1].requires_grad]
        copies = {name: nn.Parameter(one.detach().clone()) for name, one in trained}
        modulewise.append(list(copies.values()))
        for name, one in copies.items():
            decay = 0.5 * (name.startswith("model.net.") and one.dim() > 1)
            settings = {"lr": 0.7 * rate, "eps": eps, "weight_decay": decay}
            groups.append({"params": [one], **settings})
        expected |= copies
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    reference = torch.optim.AdamW(groups, betas=BETAS)
    both = [m.named_parameters(p) for p, m in modules.items()]
    parameters = {k: v for some in both for k, v in some if v.requires_grad}
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        gradients = {
            name: torch.randn(one.shape, generator=generator, dtype=one.dtype)
            for name, one in parameters.items()
        }
        for name, one in expected.items():
            one.grad = gradients[name].clone()
        lengths = [nn.utils.clip_grad_norm_(parts, clip) for parts in modulewise]
        reference.step()
        norm = optimizers(parameters, gradients, torch.tensor(0.7))
        torch.testing.assert_close(norm, torch.stack(lengths).norm())
    for name, one in expected.items():
        torch.testing.assert_close(parameters[name].detach(), one.detach())


def places_of(rows, codes):
    """For every cluster of these rows, in order, the place that stands for it."""
    position = rows.memberships["site"].position
    return torch.stack([position[codes == cluster][0] for cluster in codes.unique()])


@pytest.mark.parametrize("random", RANDOM)
def test_with_every_cluster_in_every_batch_it_is_adam(random):
    _, _, _, guide = bind(random)
    whole = guide.clusterwise()["site"]
    expected = {name: nn.Parameter(one.detach().clone()) for name, one in whole.named_parameters()}
    adam = torch.optim.Adam(expected.values(), lr=0.03, betas=BETAS, eps=1e-4)
    source = bind(random)[2]
    lazy = LazyAdam(guide, {"site": source.counts["site"]}, N, eps=1e-4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        rows = lazy.read(source.batch(torch.arange(N), dense_up_to=K))
        places = places_of(rows, source.codes["site"])
        for name, mine in lazy.guide.clusterwise()["site"].named_parameters():
            torch.testing.assert_close(mine.detach()[places], expected[name].detach())
            mine.grad = torch.randn(mine.shape, generator=generator, dtype=mine.dtype)
            expected[name].grad = mine.grad[places].clone()
        step(lazy, 0.03)
        adam.step()
    for name, one in whole.named_parameters():
        torch.testing.assert_close(one, expected[name])


@pytest.mark.parametrize("limit", [0, K])
def test_each_cluster_sees_the_adam_of_its_own_gradients(limit):
    """Whether the batch says which clusters it draws, or a step finds out."""
    _, _, source, guide = bind("slopes")
    whole = guide.clusterwise()["site"]
    before = {name: one.detach().clone() for name, one in whole.named_parameters()}
    lazy = LazyAdam(guide, {"site": source.counts["site"]}, 10, eps=1e-4)
    alone, codes = {}, source.codes["site"]
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        index = torch.randperm(N, generator=generator)[:10]
        rows = lazy.read(source.batch(index, dense_up_to=limit))
        present = codes[index].unique().tolist()
        places = places_of(rows, codes[index])
        for name, mine in lazy.guide.clusterwise()["site"].named_parameters():
            mine.grad = torch.randn(mine.shape, generator=generator, dtype=mine.dtype)
            for place, cluster in zip(places, present, strict=True):
                key = (name, cluster)
                if key not in alone:
                    one = nn.Parameter(before[name][cluster].clone())
                    alone[key] = one, torch.optim.Adam([one], lr=0.03, betas=BETAS, eps=1e-4)
                alone[key][0].grad = mine.grad[place].clone()
                alone[key][1].step()
        step(lazy, 0.03)
    seen = {cluster for _, cluster in alone}
    assert 0 < len(seen) <= K
    for name, one in whole.named_parameters():
        for cluster in range(K):
            expected = alone[name, cluster][0] if cluster in seen else before[name][cluster]
            torch.testing.assert_close(one[cluster].detach(), expected.detach())


@pytest.mark.parametrize("given", ["its clusters", "all clusters"])
@pytest.mark.parametrize("random", RANDOM)
def test_loss_and_gradients_are_those_of_the_whole_guide(random, given, monkeypatch):
    game = Adversary("batch", taps=["1"], weight=2.0)
    sites = Adversary("site", taps=["1"], weight=0.5)
    _, model, source, guide = bind(random, adversary=[game, sites], fixed_weight=0.5)
    with torch.no_grad():
        for one in guide.parameters():
            one.add_(0.3 * torch.randn_like(one))
    lazy = LazyAdam.of(guide, source, 12, 1e-4)
    index = source.codes["site"].argsort()[[3, 8, 5, 20, 21, 40, 41, 60, 77, 76, 99, 2]]
    rows = source.batch(index)
    present = rows.memberships["site"].index
    mine = lazy.read(rows if given == "its clusters" else source.batch(index, dense_up_to=K))
    assert len(present) < len(mine.memberships["site"].index) == 12
    places = places_of(mine, source.codes["site"][index])

    def rsample(self, sample_shape=()):
        noise = torch.randn(len(present), 64, generator=torch.Generator().manual_seed(4)).double()
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        rows = shape[-2] if len(shape) > 1 else 1
        if rows == 12:  # the place of a cluster gets its noise
            noise = torch.zeros(12, 64).double().index_copy(0, places, noise)
        return self.push(noise[:rows, : shape[-1]].reshape(shape))

    monkeypatch.setattr(Pushforward, "rsample", rsample)

    def gradients(module):
        return {
            name: one.grad.clone()
            for name, one in module.named_parameters()
            if one.grad is not None
        }

    found = []
    with pyro.validation_enabled(False):
        for one, which in ((guide, rows), (lazy.guide, mine)):
            model.zero_grad()
            one.zero_grad()
            loss = Objective(model, one)(which)
            loss.total.backward()
            found.append((loss, gradients(model), gradients(one.hyperparameters)))
    for name in ("total", "elbo", "fixed", "adversarial", "accuracy"):
        torch.testing.assert_close(getattr(found[1][0], name), getattr(found[0][0], name))
    for mine_all, expected_all in zip(found[1][1:], found[0][1:], strict=True):
        assert mine_all.keys() == expected_all.keys()
        for name, value in mine_all.items():
            torch.testing.assert_close(value, expected_all[name])
    expected = gradients(guide.clusterwise()["site"])
    for name, value in gradients(lazy.guide.clusterwise()["site"]).items():
        torch.testing.assert_close(value[places], expected[name][present])
        others = torch.ones(12, dtype=torch.bool).index_fill(0, places, False)
        assert not value[others].any()


def test_batches_look_the_same_however_many_of_their_clusters_are_different():
    source, guide = bind("slopes")[2:]
    lazy = LazyAdam.of(guide, source, 12, 1e-4)
    kinds = set()
    for index in (torch.arange(12), source.codes["site"].argsort()[:12]):
        rows = source.batch(index)
        leaves, structure = tree_flatten(lazy.read(rows))
        shapes = [one.shape if isinstance(one, torch.Tensor) else one for one in leaves]
        kinds.add(repr((structure, shapes)))
    assert len(kinds) == 1


def test_small_parameters_stay_where_they_are():
    """A compiled step reads and writes memory that never moves."""
    _, model, source, guide = bind("slopes")
    lazy = LazyAdam.of(guide, source, 12, 1e-4)
    optimizers = Optimizers(model, lazy, Schedule(), 1e-4)
    steps = Steps({"model": model, "guide": lazy.guide}, optimizers, "never")
    where = [one.data_ptr() for one in lazy.guide.parameters()]
    with pyro.validation_enabled(False):
        for _ in range(3):
            objective = lazy.reading(Objective(model, lazy.guide))
            steps(objective, source.batch(torch.randperm(N)[:12], dense_up_to=K))
    assert [one.data_ptr() for one in lazy.guide.parameters()] == where


def test_factors_with_few_clusters_are_left_as_they_are():
    _, _, source, guide = bind("(1 + x0 | site) + (1 | batch)")
    lazy = LazyAdam.of(guide, source, 12, 1e-4)
    whole, small = guide.clusterwise(), lazy.guide.clusterwise()
    assert small["batch"] is whole["batch"]
    assert len(small["site"].location) == 12
    assert lazy.guide.hyperparameters is guide.hyperparameters
    assert LazyAdam.of(guide, source, 30, 1e-4).guide is guide


def test_guides_that_know_all_effects_jointly_are_left_as_they_are():
    _, model, source, _ = bind("(1 + x0 | site) + (1 | batch)")
    guide = CrossedGuide(model, source)
    lazy = LazyAdam.of(guide, source, 12, 1e-4)
    assert lazy.guide is guide
    assert not lazy.tables
    rows = source.batch(torch.arange(12), dense_up_to=N)
    assert lazy.read(rows).memberships == rows.memberships


def test_a_gradient_that_is_not_finite_changes_nothing():
    _, model, source, guide = bind("slopes")
    lazy = LazyAdam.of(guide, source, 12, 1e-4)
    optimizers = Optimizers(model, lazy, Schedule(), 1e-4)
    lazy.read(source.batch(torch.arange(12)))
    before = [one.detach().clone() for one in guide.parameters()]
    parameters = dict(lazy.guide.named_parameters("guide")) | dict(model.named_parameters("model"))
    gradients = {name: torch.ones_like(one) for name, one in parameters.items()}
    gradients["guide.hyperparameters.shift"] *= torch.nan
    assert not torch.isfinite(optimizers(parameters, gradients, torch.tensor(1.0)))
    for one, expected in zip(guide.parameters(), before, strict=True):
        assert torch.equal(one, expected)


def many(seed=0):
    """More clusters than four times the batch."""
    rng = np.random.default_rng(seed)
    site = np.repeat(np.arange(400), 5)
    x = rng.normal(size=(2000, 1))
    y = np.sin(2 * x[:, 0]) + rng.normal(0, 0.8, 400)[site] + rng.normal(0, 0.5, 2000)
    return ClusteredData.from_arrays(x, y, {"site": site})


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


@pytest.mark.slow
def test_lazily_trained_clusters_give_the_same_fit():
    """Beside a fit that draws every cluster in every step: the guide ends at the same posterior."""
    data = many()

    def sds(size):
        """Median and sd of the sites' sd, means of two fits: batches and draws are random."""
        schedule = Schedule(batch_size=size, steps=500, net_learning_rate=0.03)
        found = []
        for seed in (1, 2):
            model = MixedEffects(network(), "(1 | site)")
            options = {"validation": None, "seed": seed, "progress": False}
            fitted = fit(model, data, schedule=schedule, **options)
            table = fitted.variance_components()
            own = table[(table["factor"] == "site") & (table["statistic"] == "sd")]
            found.append(own[["median", "sd"]].astype(float).iloc[0])
        return sum(found) / len(found)

    lazy, dense = sds(64), sds(512)
    assert abs(lazy["median"] - dense["median"]) < 0.5 * dense["sd"]
    assert abs(lazy["median"] - 0.8) < 3 * lazy["sd"]
    assert lazy["sd"] == pytest.approx(dense["sd"], rel=0.2)


def test_a_run_with_lazy_clusters_goes_on_from_its_checkpoint(tmp_path):
    data, path = many(), tmp_path / "run.ckpt"
    schedule = Schedule(batch_size=32, steps=12, window=4, stages=0)

    def run(**options):
        model = MixedEffects(network(), "(1 | site)")
        return fit(model, data, schedule=schedule, progress=False, refine=False, **options)

    class KilledError(Exception):
        pass

    whole = run()
    with pytest.MonkeyPatch.context() as patch:
        from armed_pyro.inference.training_run import Run

        original = Run.close_window

        def closing(self, losses):
            original(self, losses)
            if self.step > 4:
                raise KilledError

        patch.setattr(Run, "close_window", closing)
        with pytest.raises(KilledError):
            run(checkpoint=path)
    resumed = run(checkpoint=path, resume=True)
    for one, other in zip(
        whole.guide.state_dict().values(), resumed.guide.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other)


def test_state_is_that_of_every_factor_read_in_batches():
    _, _, source, guide = bind("slopes")
    lazy = LazyAdam.of(guide, source, 12, 1e-4)
    lazy.read(source.batch(torch.arange(12)))
    for one in lazy.guide.parameters():
        one.grad = torch.ones_like(one)
    step(lazy, 0.1)
    other = LazyAdam.of(guide, source, 12, 1e-4)
    other.restore({name: one.clone() for name, one in lazy.state().items()})
    assert float(lazy.state()["lazy.site.count"].sum()) == len(source.codes["site"][:12].unique())
    for one, expected in zip(other.state().values(), lazy.state().values(), strict=True):
        assert torch.equal(one, expected)


def test_a_settled_step_reads_its_clusters_once(monkeypatch):
    """Of a wide layer's effects those of a batch are trained on: read again, they are others'."""
    monkeypatch.setattr("armed_pyro.inference.phases.LARGEST_STEP", 64)
    data, calls, read = many(), [], LazyAdam.read

    def counted(self, rows):
        calls.append(rows.memberships["site"].complete)
        return read(self, rows)

    monkeypatch.setattr(LazyAdam, "read", counted)
    net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))
    schedule = Schedule(batch_size=32, steps=6, stages=0)
    model = MixedEffects(net, Slopes("site", on="1")).bind(data)
    source = model.encode(data)
    with pyro.validation_enabled(False):
        guide = StructuredGuide(model, source)
        share = Share(ALONE, source, ())
        task = TrainingTask(model, guide, data, source, share, schedule, compile="never")
        run = Run(task)
        run.freeze()
        assert run.phase.lazy.tables
        for _ in range(3):
            run.take_step()
    assert len(calls) == 3
