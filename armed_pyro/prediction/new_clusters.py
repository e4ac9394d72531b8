"""Effects of the clusters of labelled rows, given all other sites of every posterior draw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pandas as pd
import scipy
import torch
from jaxtyping import Float, Int
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.laplace import Conditionals, conditionals
from armed_pyro.prediction.unseen import label_noise
from armed_pyro.program.linearize import mean_draws, sensitivities
from armed_pyro.program.predictor import modulates
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.in_memory import HeldRows

__all__ = ["condition"]


Latents = Mapping[str, Tensor]
Node = tuple[int, int]  # factor, cluster
# Effects in one joint conditional, whose dense precision matrix grows with their square.
MOST_EFFECTS = 500
# Rows times draws in one batch of groups.
MOST_VALUES = 2**25
# The predictor is linearised this many times more, around the last estimate, if there are effects
# on filters.
LINEARISED = 3


def condition(
    posterior: Posterior,
    support: ClusteredData,
    latents: dict[str, Tensor],
    effects: dict[str, Tensor],
    new: Mapping[str, pd.Index],
    seed: int,
    update_seen: bool,
    quality: dict[str, float],
    evidence: list[tuple[list[list[Node]], Tensor]] | None = None,
) -> Tensor:
    """Draw the effects of all clusters of the support given each posterior draw.

    `latents`, `effects`, `quality` and `evidence` are updated in place.

    Parameters
    ----------
    posterior : Posterior
        The fitted program.
    support : ClusteredData
        Rows with outcomes.
    latents : dict of str to Tensor
        Draws of the fit. If `update_seen` is set, effects of seen clusters are replaced.
    effects : dict of str to Float[Tensor, "draws new terms"]
        Effects of the new clusters by factor; those of clusters in the support are replaced.
    new : mapping of str to pandas.Index
        Labels of the new clusters.
    seed : int
        Seed of the noise.
    update_seen : bool
        Whether the effects of seen clusters in the support are drawn anew, too.
    quality : dict of str to float
        Its efficiency is lowered to the lowest efficiency of any group's particles.
    evidence : list, optional
        Gets one entry per batch: groups of clusters, as pairs of factor and cluster number, and
        log p(y of the group | draw).

    Returns
    -------
    Float[Tensor, "draws"]
        log p(y_support | draw), the draws' log-weights.

    Examples
    --------
    `Fit.adapt` calls it: ``fit.adapt(rows).effects``.
    """
    model, facts = posterior.model, posterior.model.data_facts()
    levels = facts.levels_with(support)
    source = model.encode(support, levels)
    first_new = {f.name: len(facts.levels[f.name]) for f in model.factors}
    free = {
        f.name: torch.arange(len(levels[f.name])) >= (0 if update_seen else first_new[f.name])
        for f in model.factors
    }
    if update_seen:
        for name, is_free in free.items():
            is_free &= source.counts[name].cpu() > 0
        source = _with_training(posterior, source, levels, free)
    source = model.compute(source)
    trained = torch.arange(len(source)) >= support.n_rows
    extended = dict(latents)
    for f in model.factors:
        zero = latents[f.effect_site]
        both = torch.cat([zero, zero.new_zeros(len(zero), len(new[f.name]), zero.shape[-1])], -2)
        both[:, free[f.name].to(both.device)] = 0.0
        extended[f.effect_site] = both
    total = torch.zeros(())
    noise = {f.name: _noise(f, levels[f.name], latents, seed) for f in model.factors}
    most = max(1, MOST_VALUES // max(site.shape[0] for site in latents.values()))
    for nodes, rows in _in_batches(_components(model.factors, source, free), most):
        solved = _solve(posterior, extended, source, nodes, rows, noise, seed)
        total = total + solved.evidence.sum(1).double().cpu()
        if evidence is not None:
            evidence.append((nodes, solved.evidence))
        quality["efficiency"] = min(quality["efficiency"], float(solved.efficiency.min()))
        old = [index[trained[index]] for index in rows]
        if any(map(len, old)):  # the draws are already conditional on training rows
            before = _solve(posterior, extended, source, nodes, old, noise, seed)
            total = total - before.evidence.sum(1).double().cpu()
        for group, members in enumerate(nodes):
            start = 0
            for number, cluster in members:
                factor = model.factors[number]
                stop = start + len(factor.terms)
                value, k = solved.effects[:, group, start:stop], first_new[factor.name]
                if cluster >= k:
                    effects[factor.name][:, cluster - k] = value
                else:
                    updated = latents[factor.effect_site].clone()
                    updated[:, cluster] = value
                    latents[factor.effect_site] = updated
                start = stop
    return total


def _noise(
    factor: Factor, labels: pd.Index, latents: Latents, seed: int
) -> Callable[[list[int]], Tensor]:
    """A function from cluster numbers to their noise."""

    def noise_of(clusters: list[int]) -> Tensor:
        return label_noise(seed, factor.name, labels[clusters], latents[factor.effect_site])

    return noise_of


def _components(
    factors: tuple[Factor, ...], source: HeldRows, free: Mapping[str, Tensor]
) -> Iterator[tuple[list[list[Node]], list[Tensor]]]:
    """Connected components of free clusters, where an edge is a row that two clusters share.

    Yields
    ------
    list of list of Node
        Clusters of every component. All components of one item have the same factors, so that
        their arrays have the same shape.
    list of Tensor
        Rows of every component.
    """
    offset, start = {}, 0
    for f, factor in enumerate(factors):
        offset[f] = start
        start += len(free[factor.name])
    pairs = []
    row_node = torch.full((len(source),), -1)
    for f, factor in enumerate(factors):
        codes = source.codes[factor.name].cpu()
        node = torch.where(free[factor.name][codes], codes + offset[f], -1)
        both = (node >= 0) & (row_node >= 0)
        pairs.append(torch.stack([row_node[both], node[both]]))
        row_node = torch.where(row_node >= 0, row_node, node)
    edges = torch.cat(pairs, 1).numpy()
    graph = scipy.sparse.coo_array(
        (np.ones(edges.shape[1]), (edges[0], edges[1])), shape=(start, start)
    )
    _, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    members: dict[int, list[Node]] = defaultdict(list)
    present = np.unique(label[row_node[row_node >= 0].numpy()])
    for f, factor in enumerate(factors):
        for cluster in free[factor.name].nonzero()[:, 0].tolist():
            component = int(label[offset[f] + cluster])
            members[component].append((f, cluster))
    row_label = np.where(row_node.numpy() >= 0, label[row_node.numpy()], -1)
    order = np.argsort(row_label, kind="stable")
    left = np.searchsorted(row_label[order], present)
    right = np.searchsorted(row_label[order], present, side="right")
    alike: dict[tuple[int, ...], tuple[list[list[Node]], list[Tensor]]] = {}
    for component, begin, end in zip(present, left, right, strict=True):
        nodes = members[int(component)]
        kind = tuple(f for f, _ in nodes)
        size = sum(len(factors[f].terms) for f in kind)
        if size > MOST_EFFECTS and len(kind) > 1:
            raise ValueError(
                f"rows of the support connect {len(kind)} clusters of {len(set(kind))} factor(s), "
                f"whose joint posterior has {size} effects; at most {MOST_EFFECTS} are possible: "
                "adapt to fewer clusters at a time, or fit again with these rows"
            )
        groups, rows = alike.setdefault(kind, ([], []))
        groups.append(nodes)
        rows.append(torch.from_numpy(order[begin:end].copy()))
    yield from alike.values()


def _in_batches(
    alike: Iterator[tuple[list[list[Node]], list[Tensor]]], most: int
) -> Iterator[tuple[list[list[Node]], list[Tensor]]]:
    """The same groups, with at most `most` rows at a time, or a single group."""
    for nodes, rows in alike:
        start, held = 0, 0
        for place, index in enumerate(rows):
            if held and held + len(index) > most:
                yield nodes[start:place], rows[start:place]
                start, held = place, 0
            held += len(index)
        yield nodes[start:], rows[start:]


def _solve(
    posterior: Posterior,
    latents: Latents,
    source: HeldRows,
    nodes: list[list[Node]],
    rows: list[Tensor],
    noise: Mapping[str, Callable[[list[int]], Tensor]],
    seed: int,
) -> Conditionals:
    """The conditionals of groups of clusters with the same factors."""
    solved = _linearised(posterior, latents, source, nodes, rows, noise, seed)
    if modulates(posterior.model):
        # The predictor is not linear in effects on filters: a linearisation holds only locally.
        for _ in range(LINEARISED):
            around = solved.effects.mean(0)
            solved = _linearised(posterior, latents, source, nodes, rows, noise, seed, around)
    return solved


def _linearised(
    posterior: Posterior,
    latents: Latents,
    source: HeldRows,
    nodes: list[list[Node]],
    rows: list[Tensor],
    noise: Mapping[str, Callable[[list[int]], Tensor]],
    seed: int,
    around: Float[Tensor, "groups terms"] | None = None,
) -> Conditionals:
    """The conditionals for the predictor linearised in the effects.

    Parameters
    ----------
    around : Float[Tensor, "groups terms"], optional
        Effects at which the predictor is linearised; by default zero.
    """
    model = posterior.model
    spread = model.data_facts().spread
    index = torch.cat(rows).to(source.x.device)
    place = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(r) for r in rows]))
    place = place.to(index)
    batch = source.batch(index, dense_up_to=max(map(len, source.counts.values())))
    point = mean_draws(model, latents) if modulates(model) else {}
    if around is not None:
        latents = dict(latents)
        sizes = [len(model.factors[f].terms) for f, _ in nodes[0]]
        for slot, (value, (f, _)) in enumerate(zip(around.split(sizes, -1), nodes[0], strict=True)):
            site, clusters = model.factors[f].effect_site, [group[slot][1] for group in nodes]
            latents[site] = latents[site].clone()
            latents[site][:, clusters] = value
            point[site] = latents[site].mean(0)
    base = model.predictor(batch, latents)
    pieces, normal = [], []
    for slot, (f, _) in enumerate(nodes[0]):
        factor = model.factors[f]
        members: Int[Tensor, " groups"] = torch.tensor([group[slot][1] for group in nodes]).to(
            index
        )
        in_cluster = source.codes[factor.name][index] == members[place]
        z = sensitivities(model, batch, factor, base.activations, point)
        pieces.append(z * in_cluster[:, None, None])
        normal.append(noise[factor.name](members.tolist()))
    scales = [model.factors[f].scale_matrix(latents) for f, _ in nodes[0]]
    lower = [scale.reshape(-1, *scale.shape[-2:]) for scale in scales]
    eta = base.eta if base.eta.dim() == 3 else base.eta[None]
    z = torch.cat(pieces, 1)
    if around is not None:
        eta = eta - spread * torch.einsum("ntc,nt->nc", z, around[place])
    with model.seeded(seed + 13):
        return conditionals(
            model,
            latents,
            batch,
            eta,
            z,
            _block_diagonal(lower),
            place,
            len(nodes),
            torch.cat(normal, -1),
        )


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    draws, size = max(map(len, blocks)), sum(block.shape[-1] for block in blocks)
    matrix, start = blocks[0].new_zeros(draws, size, size), 0
    for block in blocks:
        stop = start + block.shape[-1]
        matrix[:, start:stop, start:stop] = block
        start = stop
    return matrix


def _with_training(
    posterior: Posterior,
    source: HeldRows,
    levels: Mapping[str, pd.Index],
    free: Mapping[str, Tensor],
) -> HeldRows:
    """The rows, followed by the training rows of the free clusters."""
    if posterior.sampled:
        raise ValueError(
            "seen clusters cannot be updated: the fit keeps only a sample of its training rows"
        )
    training = posterior.model.encode(posterior.data, levels)
    wanted = torch.zeros(len(training), dtype=torch.bool)
    for name, is_free in free.items():
        wanted |= is_free[training.codes[name].cpu()]
    index = wanted.nonzero()[:, 0].to(training.x.device)

    def both(name: str) -> Tensor | None:
        first, second = getattr(source, name), getattr(training, name)
        if first is None and second is None:
            return None
        first = second.new_ones(len(source)) if first is None else first
        second = first.new_ones(len(training)) if second is None else second
        return torch.cat([first, second[index]])

    codes = {
        name: torch.cat([values, training.codes[name][index]])
        for name, values in source.codes.items()
    }
    counts = {
        name: torch.bincount(values, minlength=len(levels[name])) for name, values in codes.items()
    }
    x = torch.cat([source.x, training.x[index]])
    y, trials, offset, weights = (both(name) for name in ("y", "trials", "offset", "weights"))
    return HeldRows(x, y, codes, counts, trials, offset, weights)
