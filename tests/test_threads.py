"""Several threads get the results of one."""

import asyncio
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from armed_pyro import ClusteredData, MixedEffects, Schedule, fit
from armed_pyro.engine.checkpoint import module_tensors


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def data():
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(6), 10)
    x = rng.normal(size=(60, 1))
    y = x[:, 0] + rng.normal(size=6)[site] + rng.normal(size=60)
    return ClusteredData.from_arrays(x, y, {"site": site})


def program():
    """A program; its network draws from torch's global generator, which no fit may share."""
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(0.3)
    return MixedEffects(net, "(1 | site)")


def quick(seed=0, model=None):
    schedule = Schedule(steps=40, window=10, stages=0, batch_size=20)
    model = program() if model is None else model
    return fit(model, data(), schedule=schedule, compile="never", seed=seed, progress=False)


@pytest.fixture(scope="module")
def fitted():
    return quick()


def tensors(result):
    return module_tensors("model", result.model) | module_tensors("guide", result.guide)


def test_predictions_in_four_threads_are_those_of_one(fitted):
    seeds = list(range(10)) * 4
    expected = {seed: fitted.predict(fitted.data, draws=20, seed=seed).outcome for seed in seeds}
    before = torch.get_rng_state()
    with ThreadPoolExecutor(4) as pool:
        made = pool.map(lambda s: fitted.predict(fitted.data, draws=20, seed=s).outcome, seeds)
        for seed, outcome in zip(seeds, made, strict=True):
            np.testing.assert_array_equal(outcome, expected[seed])
    assert torch.equal(torch.get_rng_state(), before)


def test_fits_in_threads_are_those_of_one():
    expected = {seed: tensors(quick(seed)) for seed in (0, 1)}
    seeds = [0, 1, 0]
    with ThreadPoolExecutor(3) as pool:
        results = pool.map(quick, seeds, [program() for _ in seeds])
        for seed, result in zip(seeds, results, strict=True):
            mine = tensors(result)
            assert all(torch.equal(mine[name], value) for name, value in expected[seed].items())


def test_different_verbs_may_run_at_once(fitted):
    table, draws = fitted.variance_components(draws=200), fitted.draws(20)
    model = program()

    async def together():
        return await asyncio.gather(
            asyncio.to_thread(fitted.variance_components, draws=200),
            asyncio.to_thread(fitted.draws, 20),
            asyncio.to_thread(quick, 1, model),
            asyncio.to_thread(fitted.posterior.draws, 20),
            asyncio.to_thread(fitted.predict, fitted.data, draws=20),
        )

    its_table, its_draws, _, own, _ = asyncio.run(together())
    assert its_table.equals(table)
    for name, values in draws.items():
        assert torch.equal(values, its_draws[name])
        assert torch.equal(values, own[name])
