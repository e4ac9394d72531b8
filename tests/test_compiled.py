"""Compiled steps: the eager step's loss and gradients, and what cannot be compiled."""

import warnings

import numpy as np
import pyro
import pytest
import torch
from torch import nn

from armed_pyro import Adversary, ClusteredData, MixedEffects, Schedule, Slopes, fit
from armed_pyro.engine import compiled_step
from armed_pyro.engine.compiled_step import Steps
from armed_pyro.engine.compiler import Recording
from armed_pyro.families.simulate import mixed_model
from armed_pyro.guides.crossed import choose_guide
from armed_pyro.inference.objective import NestedBound, Objective

# Compiling takes half a minute a program: elsewhere the captured graph runs as it is.
COMPILERS = ["graph", pytest.param("inductor", marks=pytest.mark.slow)]
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]


@pytest.fixture(autouse=True)
def _unchecked():
    with pyro.validation_enabled(False):
        yield


@pytest.fixture
def compiler(request, monkeypatch):
    if request.param == "graph":
        monkeypatch.setattr(compiled_step, "compile_graph", lambda graph, *_: graph)


@pytest.fixture
def graph_only(monkeypatch):
    monkeypatch.setattr(compiled_step, "compile_graph", lambda graph, *_: graph)


def deep() -> nn.Module:
    """A network with everything that changes from step to step."""
    layers = [nn.Linear(2, 6), nn.BatchNorm1d(6), nn.PReLU(), nn.Dropout(0.3), nn.Linear(6, 1)]
    return nn.Sequential(*layers)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 1))


def rows(family: str) -> ClusteredData:
    coefficients = np.zeros((3, 2)) if family == "categorical" else (0.0, 0.5, -0.5)
    data, _ = mixed_model(family, 8, 12, sd=(0.5,), coefficients=coefficients, seed=1)
    return data


def crossed() -> ClusteredData:
    rng = np.random.default_rng(0)
    groups = {"g": rng.integers(8, size=96), "h": rng.integers(6, size=96)}
    return ClusteredData.from_arrays(rng.normal(size=(96, 2)), rng.normal(size=96), groups)


def head(n_outputs: int = 1) -> nn.Module:
    return nn.Linear(2, n_outputs)


GAME = Adversary("site", taps=["2"], weight=2.0)
# Programs by what they are to show: network, random effects, family, data, settings.
PROGRAMS = {
    "gaussian": (head, "(1 + x0 | site)", "gaussian", rows, {"bayesian_head": True}),
    "bernoulli": (head, "(1 | site)", "bernoulli", rows, {"bayesian_head": True}),
    "binomial": (head, "(1 + x0 || site)", "binomial", rows, {"bayesian_head": True}),
    "categorical": (lambda: head(3), "(1 | site)", "categorical", rows, {}),
    "poisson": (head, "(1 | site)", "poisson", rows, {"bayesian_head": True}),
    "negative_binomial": (head, "(1 | site)", "negative_binomial", rows, {}),
    "dropout, batch norm, adversary": (
        deep,
        ["(1 | site)", Slopes("site", on="2")],
        "bernoulli",
        rows,
        {"adversary": GAME, "fixed_weight": 0.5},
    ),
    "wide layer": (wide, [Slopes("site", on="1")], "gaussian", rows, {}),
    "crossed factors": (head, ["(1 | g)", "(1 | h)"], "gaussian", lambda _: crossed(), {}),
    "no random effects": (wide, [], "gaussian", rows, {"bayesian_head": True}),
}


@pytest.fixture
def precise(device):
    """In double precision on a GPU, where some sums are taken otherwise than in its graphs."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if device == "cuda" else before)
    yield
    torch.set_default_dtype(before)


def program(name: str, device: str = "cpu") -> tuple[MixedEffects, torch.nn.Module, object]:
    make, random, family, data, settings = PROGRAMS[name]
    torch.manual_seed(0)
    model = MixedEffects(make(), random, family, **settings).bind(data(family)).to(device)
    source = model.encode(data(family))
    return model, choose_guide(model, source).to(device), source


class Kept(nn.Module):
    """An update that keeps the gradients and changes nothing."""

    def __init__(self, model: nn.Module, guide: nn.Module) -> None:
        super().__init__()
        modules = nn.ModuleDict({"model": model, "guide": guide})
        self.of = {name: name.replace(".", "-") for name, _ in modules.named_parameters()}
        for name, one in modules.named_parameters():
            self.register_buffer(self.of[name], one.detach().clone())

    def forward(self, parameters, gradients, factor):
        for name, one in gradients.items():
            kept = getattr(self, self.of[name])
            kept.copy_(torch.zeros_like(kept) if one is None else one)
        return sum(getattr(self, name).square().sum() for name in self.of.values()).sqrt() * factor


def steps_of(model, guide, mode):
    return Steps({"model": model, "guide": guide}, Kept(model, guide), mode)


def taken(steps, objective, *inputs, n=3):
    """Losses, gradients and buffers of a few steps from the same random state."""
    torch.manual_seed(1)
    losses, gradients = [], []
    for _ in range(n):
        loss, norm = steps(objective, *inputs, factor=0.5, remaining=10)
        losses.append(loss)
        update = steps.modules["optimizer"]
        gradients.append({name: one.clone() for name, one in update.named_buffers()})
        length = sum(one.square().sum() for one in gradients[-1].values()).sqrt()
        torch.testing.assert_close(norm.to(length), 0.5 * length)
    return losses, gradients, dict(steps.modules.named_buffers())


def same(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        for name in ("total", "elbo", "fixed", "adversarial", "accuracy"):
            torch.testing.assert_close(
                getattr(a, name).detach().cpu(),
                getattr(b, name).detach().cpu(),
                rtol=1e-4,
                atol=1e-5,
            )
    for a, b in zip(one[1], other[1], strict=True):
        largest = max(float(value.abs().max()) for value in b.values() if value.numel())
        for name, value in a.items():
            torch.testing.assert_close(value, b[name], rtol=2e-3, atol=1e-4 * largest)
    for name, value in one[2].items():
        torch.testing.assert_close(value, other[2][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiler", COMPILERS, indirect=True)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.usefixtures("compiler", "precise")
def test_a_compiled_step_is_the_eager_one(name, device):
    found = {}
    for mode in ("never", "always"):
        model, guide, source = program(name, device)
        model.train()
        steps = steps_of(model, guide, mode)
        batch = source.batch(torch.arange(0, 96, 2, device=device))
        progress = torch.tensor(0.05, device=device)
        found[mode] = taken(steps, Objective(model, guide), batch, progress)
        assert steps.compiled is (mode == "always"), steps.problem
    same(found["always"], found["never"])


@pytest.mark.parametrize("compiler", COMPILERS, indirect=True)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "crossed factors"])
@pytest.mark.usefixtures("compiler", "precise")
def test_a_compiled_step_of_a_settled_network_is_the_eager_one(name, device):
    found = {}
    for mode in ("never", "always"):
        model, guide, source = program(name, device)
        model.eval()
        guide.settle()
        steps = steps_of(model, guide, mode)
        bound = NestedBound(model, guide, 4)
        found[mode] = taken(steps, bound, model.compute(source).all(), 3)
        assert steps.compiled is (mode == "always"), steps.problem
    same(found["always"], found["never"])


@pytest.mark.usefixtures("graph_only")
def test_a_graph_serves_other_values_and_no_other_shapes():
    model, guide, source = program("bernoulli")
    steps = steps_of(model, guide, "always")
    eager = steps_of(model, guide, "never")
    objective, progress = Objective(model, guide), torch.tensor(1.0)
    for _ in range(2):
        steps(objective, source.batch(torch.arange(10)), progress)
    graph = steps._graph
    assert graph is not None
    other = source.batch(torch.arange(40, 50))
    same(taken(steps, objective, other, progress), taken(eager, objective, other, progress))
    assert steps._graph is graph
    steps(objective, source.batch(torch.arange(12)), progress)
    # Once is no reason to compile: the next may have another shape again.
    assert not steps.compiled
    steps(objective, source.batch(torch.arange(12)), progress)
    assert steps.compiled
    assert steps._graph is not graph


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_fit(device):
    """With the real compiler."""
    data, _ = mixed_model("gaussian", 12, 8, sd=(0.7,), coefficients=(0.3, 0.8), seed=2)
    model = MixedEffects(nn.Linear(1, 1), "(1 | site)", bayesian_head=True)
    tables, schedule = {}, Schedule(steps=400)  # steps of its own, which a fit at its mode takes
    for mode in ("never", "always"):
        options = {"compile": mode, "seed": 3, "device": device, "progress": False}
        found = fit(model, data, schedule=schedule, **options)
        assert found.history.compiled[-1] is (mode == "always")
        tables[mode] = found.variance_components().set_index(["factor", "term", "statistic"])
        stats = found.to_datatree(groups=["sample_stats"])["sample_stats"]
        assert bool(stats["compiled"][-1]) is (mode == "always")
        assert 0 < float(stats["seconds"][-1]) < 1
    eager, graph = tables["never"], tables["always"]
    # Beyond rounding there is no difference; its tolerance is a tenth of a posterior sd.
    assert ((eager["mean"] - graph["mean"]).abs() < 0.1 * eager["sd"] + 1e-6).all()


@NO_GPU
def test_a_gpu_records_steps_first_and_compiles_them_where_that_pays(monkeypatch):
    monkeypatch.setattr(compiled_step, "RECORDING", 0.0)
    monkeypatch.setattr(compiled_step, "COMPILING", 0.5)
    model, guide, source = program("bernoulli", "cuda")
    steps = steps_of(model, guide, "auto")
    objective, progress = Objective(model, guide), torch.tensor(1.0, device="cuda")
    kinds = []
    for remaining in (10, 10**6, 10**6, 0, 10**6):
        steps._seconds = [*[9.0] * compiled_step.WARM_UP, 2.0] if steps._seconds else []
        steps(objective, source.all(), progress, remaining=remaining)
        kinds.append(steps._graph and steps._graph.is_compiled)
    assert kinds == [None, False, True, True, True]
    assert isinstance(steps._graph._run, Recording)


# --- what cannot be compiled ----------------------------------------------------------------------


class DependsOnData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


def test_control_flow_that_depends_on_data_runs_eagerly_and_says_so():
    data = rows("gaussian")
    model = MixedEffects(DependsOnData(), "(1 | site)")
    with pytest.warns(UserWarning, match=r"not compiled \(.+\); they run eagerly") as record:
        found = fit(
            model,
            data,
            validation=None,
            compile="always",
            schedule=Schedule(steps=5),
            progress=False,
        )
    assert sum("not compiled" in str(one.message) for one in record) == 1
    assert len(found.history.loss) == 5
    assert not any(found.history.compiled)


def test_without_a_compiler_steps_run_eagerly(monkeypatch):
    def missing(*_):
        raise OSError("no working C++ compiler\nwas found")

    monkeypatch.setattr(compiled_step, "compile_graph", missing)
    model = MixedEffects(nn.Linear(2, 1), "(1 | site)", bayesian_head=True)
    with pytest.warns(UserWarning, match=r"not compiled \(OSError: no working C\+\+ compiler\)"):
        found = fit(
            model, rows("gaussian"), compile="always", schedule=Schedule(steps=5), progress=False
        )
    assert not any(found.history.compiled)


def test_a_graph_that_gives_something_else_is_not_used(monkeypatch):
    def wrong(graph, *_):
        return lambda *given: [one + 1 for one in graph(*given)]

    monkeypatch.setattr(compiled_step, "compile_graph", wrong)
    model, guide, source = program("bernoulli")
    steps = steps_of(model, guide, "always")
    steps(Objective(model, guide), source.all(), torch.tensor(1.0))
    with pytest.warns(UserWarning, match="the compiled loss is"):
        steps(Objective(model, guide), source.all(), torch.tensor(1.0))
    assert not steps.compiled
    assert "eager" in steps.problem


def test_modes_are_checked():
    model = MixedEffects(nn.Linear(2, 1), "(1 | site)")
    with pytest.raises(ValueError, match="auto, always, never"):
        fit(model, rows("gaussian"), compile="sometimes", progress=False)


# --- whether it pays ------------------------------------------------------------------------------


def test_short_fits_are_not_compiled(monkeypatch):
    monkeypatch.setattr(compiled_step._Graph, "__init__", None)  # would fail
    model = MixedEffects(nn.Linear(2, 1), "(1 | site)", bayesian_head=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = fit(model, rows("gaussian"), schedule=Schedule(steps=30), progress=False)
    assert not any(found.history.compiled)


@pytest.mark.parametrize(
    ("taken", "remaining", "due"),
    [(1.9, 10_000, False), (3.1, 10_000, True), (3.1, 10, False), (0.5, 10_000, False)],
)
def test_steps_are_compiled_when_they_have_taken_as_long(monkeypatch, taken, remaining, due):
    monkeypatch.setattr(compiled_step, "COMPILING", 3.0)
    model, guide, source = program("gaussian")
    steps = steps_of(model, guide, "auto")
    objective = Objective(model, guide)
    steps(objective, source.all())
    steps._seconds = [9.0] * compiled_step.WARM_UP + [taken / 100] * 100
    assert steps._due(remaining) is due
