"""Fresh probes of a trained program: whether its adversaries have hidden their clusters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.held_out import HeldOut, StreamedPart
from armed_pyro.inference.posterior import Posterior
from armed_pyro.networks.adversary import Adversary
from armed_pyro.networks.fresh_probe import FreshProbe
from armed_pyro.program.activations import activations
from armed_pyro.program.model import MixedEffects

__all__ = ["fresh_probe", "fresh_probes", "probes_of", "record_probes"]

# Rows that run through the network, at most.
MOST_ROWS = 10_000
# Clusters in the rows held out from each network, on average, from which they are probed. Two
# clusters are too easily confused for the probe to tell a leak from noise.
FEWEST_CLUSTERS = 3


def fresh_probe(
    model: MixedEffects,
    game: Adversary,
    data: ClusteredData,
    *,
    held_out: bool,
    seed: int,
    network: nn.Module | None = None,
) -> FreshProbe | None:
    """The probe of an adversary's taps; None if its clusters have too few rows.

    `held_out` says whether the rows did not train the network, by default that of the program.
    """
    if data.n_rows > MOST_ROWS:
        order = np.random.default_rng([seed, 41]).permutation(data.n_rows)
        data = data.take(np.sort(order[:MOST_ROWS]))
    features = np.concatenate([*activations(model, data, game.taps, network).values()], 1)
    outcome = None if data.outcome is None or data.outcome.dim() > 1 else data.outcome.numpy()
    codes = data.grouping(game.factor).codes.numpy()
    return FreshProbe.of(game.factor, features, codes, outcome, held_out=held_out, seed=seed)


def fresh_probes(
    model: MixedEffects,
    parts: Sequence[tuple[ClusteredData, nn.Module | None]],
    *,
    held_out: bool,
    seed: int,
) -> list[FreshProbe]:
    """The probes of all adversaries whose clusters have enough rows, pooled over parts.

    A part has rows, and the network that they go through, by default the program's.
    """
    pooled = []
    for game in model.adversaries:
        probes = [
            fresh_probe(model, game, data, held_out=held_out, seed=seed, network=network)
            for data, network in parts
        ]
        usable = [probe for probe in probes if probe is not None]
        pooled += [FreshProbe.pooled(usable)] if usable else []
    return pooled


def record_probes(
    posterior: Posterior, held_out: ClusteredData | HeldOut | StreamedPart | None
) -> None:
    """Put the probes of held-out rows into the history; of the training rows, if these are too few.

    Networks that whole clusters are held out from can be probed for their held-out clusters only.
    """
    model, seed = posterior.model, posterior.seed
    if not model.adversaries:
        return
    # Of streamed rows the posterior keeps a sample, which the network may have seen.
    parts = []
    if held_out is not None and not isinstance(held_out, StreamedPart):
        parts = _parts(posterior, held_out)
    probes = fresh_probes(model, parts, held_out=True, seed=seed)
    enough = [probe.clusters >= FEWEST_CLUSTERS * len(parts) for probe in probes]
    if sum(enough) < len(model.adversaries):
        probes = fresh_probes(model, [(posterior.data, None)], held_out=False, seed=seed)
    posterior.history.probes = [probe.to_json() for probe in probes]


def _parts(
    posterior: Posterior, held_out: ClusteredData | HeldOut
) -> list[tuple[ClusteredData, nn.Module | None]]:
    """Rows that did not train a network, with this network."""
    if isinstance(held_out, ClusteredData):
        return [(held_out, None)]
    fold, networks = held_out.fold.numpy(), posterior.model.fold_networks
    if networks is None:
        return [(posterior.data.take(fold == 0), None)]
    return [(posterior.data.take(fold == n), net) for n, net in enumerate(networks.networks)]


def probes_of(posterior: Posterior) -> list[FreshProbe]:
    """The probes at the end of the training; of training rows, in fits saved without any."""
    if posterior.history.probes:
        return [FreshProbe.from_json(record) for record in posterior.history.probes]
    rows = [(posterior.data, None)]
    return fresh_probes(posterior.model, rows, held_out=False, seed=posterior.seed)
