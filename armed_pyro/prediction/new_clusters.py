"""Effects of the clusters of labelled rows, given all other sites of every posterior draw."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import scipy
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.inference.posterior import Posterior
from armed_pyro.prediction.label_noise import label_noise
from armed_pyro.prediction.laplace import Conditional, GroupDraws
from armed_pyro.program.linearize import mean_draws, sensitivities
from armed_pyro.program.predictor import modulates
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.rows.censoring import Censoring
from armed_pyro.rows.in_memory import HeldRows
from armed_pyro.rows.inputs import JoinedInputs

__all__ = ["Conditioned", "condition"]

Levels = Mapping[str, pd.Index]  # seen clusters, then new ones, by factor
Node = tuple[int, int]  # factor, cluster
# Groups of clusters that share no rows, and the rows of each group.
Groups = tuple[list[list[Node]], list[Tensor]]
# Effects in one joint conditional, whose dense precision matrix grows with their square.
MOST_EFFECTS = 500
# Rows times draws in one batch of groups.
MOST_VALUES = 2**25
# The predictor is linearised this many times more, around the last estimate, if there are effects
# on filters.
LINEARISED = 3


@dataclass(frozen=True)
class Conditioned:
    """Posterior draws whose effects of the support's clusters are drawn given its rows."""

    latents: Latents
    effects: Mapping[str, Float[Tensor, "draws new terms"]]  # of the new clusters, by factor
    log_weights: Float[Tensor, " draws"]  # log p(y_support | draw)
    efficiency: float  # the lowest of any group's particles
    # For each batch its groups, and log p(y of the group | draw) "draws groups".
    evidence: list[tuple[list[list[Node]], Tensor]]


def condition(
    posterior: Posterior,
    support: ClusteredData,
    latents: Latents,
    seed: int,
    *,
    effects: Mapping[str, Float[Tensor, "draws new terms"]] | None = None,
    update_seen: bool = False,
) -> Conditioned:
    """Draw the effects of all clusters of the support given each posterior draw.

    `effects` are those of the new clusters, zero by default; those of clusters with rows are
    replaced. With `update_seen`, the effects of seen clusters in the support are replaced, too.
    """
    model, facts = posterior.model, posterior.model.data_facts()
    levels = facts.levels_with(support)
    source = model.encode(support, levels)
    first_new = {f.name: len(facts.levels[f.name]) for f in model.factors}
    free = {
        f.name: _free(f, source, levels, first_new[f.name], update_seen=update_seen)
        for f in model.factors
    }
    if update_seen:
        source = _with_training(posterior, source, levels, free)
    source = model.compute(source)
    trained = torch.arange(len(source)) >= support.n_rows
    zeroed, zeros = dict(latents), {}
    for f in model.factors:
        seen, new = latents[f.effect_site], len(levels[f.name]) - first_new[f.name]
        zeros[f.name] = seen.new_zeros(len(seen), new, seen.shape[-1])
        both = torch.cat([seen, zeros[f.name]], -2)
        both[:, free[f.name].to(both.device)] = 0.0
        zeroed[f.effect_site] = both
    solver = _Solver(posterior, zeroed, source, levels, seed)
    sites = {f.effect_site for f in model.factors} if update_seen else set()
    latents = {k: v.clone() if k in sites else v for k, v in latents.items()}
    effects = {name: value.clone() for name, value in (effects or zeros).items()}
    total, efficiency, evidence = torch.zeros(()), 1.0, []
    most = max(1, MOST_VALUES // max(site.shape[0] for site in latents.values()))
    groups = _components(model.factors, source, free, levels)
    if any(factor.process is not None for factor in model.factors):
        most = 0  # groups with cells come alone
    for nodes, rows in _in_batches(groups, most):
        solved = solver.solve((nodes, rows))
        total = total + solved.evidence.sum(1).double().cpu()
        evidence.append((nodes, solved.evidence))
        efficiency = min(efficiency, float(solved.efficiency.min()))
        old = [index[trained[index]] for index in rows]
        if any(map(len, old)):  # the draws are already conditional on training rows
            total = total - solver.solve((nodes, old)).evidence.sum(1).double().cpu()
        for group, members in enumerate(nodes):
            widths = [len(model.factors[f].terms) for f, _ in members]
            values = solved.effects[:, group].split(widths, -1)
            for (number, cluster), value in zip(members, values, strict=True):
                factor = model.factors[number]
                k = first_new[factor.name]
                if cluster >= k:
                    effects[factor.name][:, cluster - k] = value
                else:
                    latents[factor.effect_site][:, cluster] = value
    return Conditioned(latents, effects, total, efficiency, evidence)


def _free(
    factor: Factor, source: HeldRows, levels: Levels, first_new: int, *, update_seen: bool
) -> Bool[Tensor, " clusters"]:
    """Clusters whose effects are drawn: new ones; with `update_seen`, all with rows.

    Of a process, these are all cells of such clusters.
    """
    name, counts = factor.name, source.counts[factor.name].cpu()
    if factor.process is None:
        return counts > 0 if update_seen else torch.arange(len(counts)) >= first_new
    cells = factor.process.cells_of(levels[name])
    chains = cells.cluster[counts.numpy() > 0]
    if not update_seen:
        chains = chains[chains >= len(factor.process.cells.clusters)]
    return torch.as_tensor(np.isin(cells.cluster, chains))


@dataclass(frozen=True)
class _Solver:
    """Conditionals of groups of clusters with the same factors."""

    posterior: Posterior
    latents: Latents  # with the new clusters' effects; the effects that are drawn are zero
    source: HeldRows
    levels: Levels
    seed: int

    def solve(self, groups: Groups) -> GroupDraws:
        """Draws of the groups' effects."""
        solved = self._linearised(groups)
        if modulates(self.posterior.model):
            # The predictor is not linear in effects on filters: a linearisation holds only locally.
            for _ in range(LINEARISED):
                solved = self._linearised(groups, solved.effects.mean(0))
        return solved

    def _linearised(
        self, groups: Groups, around: Float[Tensor, "groups size"] | None = None
    ) -> GroupDraws:
        """The draws if the predictor is linearised at the effects `around`, by default zero."""
        (nodes, rows), source, latents = groups, self.source, dict(self.latents)
        model = self.posterior.model
        index = torch.cat(rows).to(source.x.device)
        lengths = torch.tensor([len(r) for r in rows])
        place = torch.repeat_interleave(torch.arange(len(rows)), lengths).to(index)
        batch = source.dense_batch(index)
        # Every group has one cluster in each slot, all of the slot's factor.
        factors = [model.factors[f] for f, _ in nodes[0]]
        slots = list(torch.tensor([[cluster for _, cluster in group] for group in nodes]).mT)
        point = mean_draws(model, latents) if modulates(model) else {}
        if around is not None:
            parts = around.split([len(factor.terms) for factor in factors], -1)
            for factor, clusters, value in zip(factors, slots, parts, strict=True):
                site = factor.effect_site
                latents[site] = latents[site].clone()
                latents[site][:, clusters] = value
                point[site] = latents[site].mean(0)
        base = model.predictor(batch, latents)
        eta = base.eta if base.eta.dim() == 3 else base.eta[None]
        designs, noise, lower, joined = [], [], [], list[Factor]()
        for factor, clusters in zip(factors, slots, strict=True):
            in_cluster = source.codes[factor.name][index] == clusters.to(index)[place]
            z = sensitivities(model, batch, factor, base.activations, point)
            designs.append(z * in_cluster[:, None, None])
            labels = self.levels[factor.name][clusters.numpy()]
            noise.append(label_noise(self.seed, factor.name, labels, latents[factor.effect_site]))
            if factor.process is None:
                scale = factor.scale_matrix(latents)
                lower.append(scale.reshape(-1, *scale.shape[-2:]))
            elif factor not in joined:  # a group with cells comes alone
                labels = self._labels_of(factor, factors, slots)
                lower.append(factor.process.root(factor.sd(latents), latents, labels))
                joined.append(factor)
        z = torch.cat(designs, 1)
        if around is not None:
            spreads = model.data_facts().spreads(eta)
            eta = eta - spreads * torch.einsum("ntc,nt->nc", z, around[place])
        names = [p.name for p in model.family.parameters if p.name in latents]
        parameters = {name: latents[name].reshape(-1, 1) for name in names}
        draws = max(map(len, lower))
        joint = torch.vmap(torch.block_diag)(*(root.expand(draws, -1, -1) for root in lower))
        conditional = Conditional(model, parameters, batch, eta, z, joint, place, len(nodes))
        with model.seeded(self.seed + 13):
            return conditional.draw(torch.cat(noise, -1))

    def _labels_of(
        self, factor: Factor, factors: list[Factor], slots: list[Int[Tensor, " groups"]]
    ) -> pd.Index:
        """Labels of a single group's clusters of a factor."""
        pairs = zip(factors, slots, strict=True)
        return self.levels[factor.name][[int(s[0]) for other, s in pairs if other is factor]]


def _components(
    factors: tuple[Factor, ...], source: HeldRows, free: Mapping[str, Tensor], levels: Levels
) -> Iterator[Groups]:
    """Connected components of free clusters, where an edge is a row that two clusters share.

    The cells of a process in one cluster are connected, too. All components of one item have the
    same factors, so that their arrays have the same shape.
    """
    *offset, total = np.cumsum([0, *(len(free[factor.name]) for factor in factors)]).tolist()
    pairs = []
    row_node = torch.full((len(source),), -1)
    for f, factor in enumerate(factors):
        codes = source.codes[factor.name].cpu()
        node = torch.where(free[factor.name][codes], codes + offset[f], -1)
        both = (node >= 0) & (row_node >= 0)
        pairs.append(torch.stack([row_node[both], node[both]]))
        row_node = torch.where(row_node >= 0, row_node, node)
    for f, factor in enumerate(factors):
        if factor.process is not None:
            cells = np.flatnonzero(free[factor.name].numpy())
            chains = factor.process.cells_of(levels[factor.name][cells]).cluster
            _, first, inverse = np.unique(chains, return_index=True, return_inverse=True)
            links = np.stack([cells, cells[first[inverse]]]) + offset[f]
            pairs.append(torch.from_numpy(links))
    edges = torch.cat(pairs, 1).numpy()
    graph = scipy.sparse.coo_array((np.ones(edges.shape[1]), tuple(edges)), shape=(total, total))
    _, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    members: dict[int, list[Node]] = defaultdict(list)
    for f, factor in enumerate(factors):
        for cluster in free[factor.name].nonzero()[:, 0].tolist():
            members[int(label[offset[f] + cluster])].append((f, cluster))
    inside = (row_node >= 0).nonzero()[:, 0].numpy()
    of_row = pd.Series(label[row_node[inside].numpy()])
    alike: dict[tuple[int, ...], Groups] = {}
    for component, places in of_row.groupby(of_row).indices.items():
        nodes = members[component]
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
        rows.append(torch.from_numpy(inside[places]))
    yield from alike.values()


def _in_batches(alike: Iterator[Groups], most: int) -> Iterator[Groups]:
    """The same groups, with at most `most` rows at a time, or a single group."""
    for nodes, rows in alike:
        start, held = 0, 0
        for place, index in enumerate(rows):
            if held and held + len(index) > most:
                yield nodes[start:place], rows[start:place]
                start, held = place, 0
            held += len(index)
        yield nodes[start:], rows[start:]


def _with_training(
    posterior: Posterior, source: HeldRows, levels: Levels, free: Mapping[str, Tensor]
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

    codes = {k: torch.cat([v, training.codes[k][index]]) for k, v in source.codes.items()}
    counts = {k: torch.bincount(v, minlength=len(levels[k])) for k, v in codes.items()}
    x = torch.cat([source.x, training.x[index]])
    y, trials, offset, weights = (both(name) for name in ("y", "trials", "offset", "weights"))
    slopes, means, fold = both("slopes"), both("means"), training.fold
    if fold is not None:  # further rows get the mean of the networks
        fold = torch.cat([torch.full_like(fold[:1].expand(len(source)), -1), fold[index]])
    parts = (x, y, codes, counts, trials, offset, weights)
    inputs = None
    if source.inputs is not None and training.inputs is not None:
        inputs = JoinedInputs.of(source.inputs, training.inputs.take(index))
    held = HeldRows(*parts, slopes=slopes, means=means, fold=fold, inputs=inputs)
    return replace(held, censoring=_both_censored(source, training, index))


def _both_censored(first: HeldRows, second: HeldRows, index: Tensor) -> Tensor | None:
    """Censoring of the first rows, and of the second ones at `index`."""
    known = [rows.censoring for rows in (first, second) if rows.censoring is not None]
    if not known or first.y is None or second.y is None:
        return None
    parts = [
        Censoring.exact(rows.y, known[0]) if rows.censoring is None else rows.censoring
        for rows in (first, second)
        if rows.y is not None
    ]
    return torch.cat([parts[0], parts[1][index]])
