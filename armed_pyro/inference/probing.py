"""Fresh probes of a trained program: whether its adversaries have hidden their clusters."""

from __future__ import annotations

import numpy as np

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.networks.adversary import Adversary
from armed_pyro.networks.fresh_probe import FreshProbe
from armed_pyro.program.activations import activations
from armed_pyro.program.model import MixedEffects

__all__ = ["fresh_probe", "fresh_probes", "probes_of", "record_probes"]

# Rows that run through the network, at most.
MOST_ROWS = 10_000


def fresh_probe(
    model: MixedEffects, game: Adversary, data: ClusteredData, *, held_out: bool, seed: int
) -> FreshProbe | None:
    """The probe of an adversary's taps; None if its clusters have too few rows.

    `held_out` says whether the rows did not train the network.
    """
    if data.n_rows > MOST_ROWS:
        order = np.random.default_rng([seed, 41]).permutation(data.n_rows)
        data = data.take(np.sort(order[:MOST_ROWS]))
    features = np.concatenate([*activations(model, data, game.taps).values()], 1)
    outcome = None if data.outcome is None or data.outcome.dim() > 1 else data.outcome.numpy()
    codes = data.grouping(game.factor).codes.numpy()
    return FreshProbe.of(game.factor, features, codes, outcome, held_out=held_out, seed=seed)


def fresh_probes(
    model: MixedEffects, data: ClusteredData, *, held_out: bool, seed: int
) -> list[FreshProbe]:
    """The probes of all adversaries whose clusters have enough rows."""
    probes = [fresh_probe(model, a, data, held_out=held_out, seed=seed) for a in model.adversaries]
    return [probe for probe in probes if probe is not None]


def record_probes(posterior: Posterior, held_out: ClusteredData | None) -> None:
    """Put the probes of held-out rows into the history; without any, of the training rows."""
    rows = posterior.data if held_out is None else held_out
    new = held_out is not None
    probes = fresh_probes(posterior.model, rows, held_out=new, seed=posterior.seed)
    posterior.history.probes = [probe.to_json() for probe in probes]


def probes_of(posterior: Posterior) -> list[FreshProbe]:
    """The probes at the end of the training; of training rows, in fits saved without any."""
    if posterior.history.probes:
        return [FreshProbe.from_json(record) for record in posterior.history.probes]
    return fresh_probes(posterior.model, posterior.data, held_out=False, seed=posterior.seed)
