"""Recordings: other inputs, what changes in place, constants, and random numbers."""

import gc

import pytest
import torch

from armed_pyro.engine.compiler import Recording, capture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def step(state: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    state.add_(x.sum() * torch.tensor([1.0, 2.0], device="cuda"))
    return [state + torch.rand(2, device="cuda")]


def recording() -> tuple[Recording, torch.Tensor]:
    state, x = torch.zeros(2, device="cuda"), torch.ones(3, device="cuda")
    made = Recording(capture(step, [state, x]), [state, x], fixed=1)
    state.zero_()
    return made, state


def test_a_recording_does_what_the_function_does():
    made, state = recording()
    other = torch.zeros(2, device="cuda")
    torch.manual_seed(0)
    found = [made(state, torch.full((3,), float(n), device="cuda"))[0] for n in range(4)]
    torch.manual_seed(0)
    wanted = [step(other, torch.full((3,), float(n), device="cuda"))[0] for n in range(4)]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(state, other)


def test_what_it_reads_stays_in_memory():
    made, state = recording()
    gc.collect()
    torch.cuda.empty_cache()
    kept = [torch.full((2,), torch.nan, device="cuda") for _ in range(10_000)]
    made(state, torch.ones(3, device="cuda"))
    torch.testing.assert_close(state, torch.tensor([3.0, 6.0], device="cuda"))
    assert len(kept) == 10_000
