"""`Factor`: the terms of one grouping factor, and the random effects of its clusters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import cast

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor, nn

from armed_pyro._messages import unknown
from armed_pyro.distributions.cholesky_correlation import log_volume
from armed_pyro.distributions.small_matrices import lower_triangular, sheared_diagonal
from armed_pyro.distributions.whitened import WhitenedNormal
from armed_pyro.priors import Known, Priors
from armed_pyro.random_effects.covariance import Correlated, Covariance, Latents, Matrix, TermGroup
from armed_pyro.random_effects.design import Block, FilterBlock, LinearBlock, ProcessBlock
from armed_pyro.random_effects.effect_columns import EffectColumns
from armed_pyro.random_effects.process import CellProcess
from armed_pyro.rows.batch import Membership, Rows

__all__ = ["Factor", "factor_named", "weighted"]

# Initial sd of the guide, in standardised units, for a factor with at most two terms. A factor with
# more terms, such as those of a layer's units, starts with the same sum of variances.
START_SD = 0.5

Effects = Float[Tensor, "... clusters terms"]


class Factor(nn.Module):
    r"""Random effects of one grouping factor, with covariance matrix D = diag(sd) R diag(sd).

    .. math:: sd \sim p(sd), \quad R_b \sim p(R_b), \quad u_k \sim N(0, D), \quad k = 1, \dots, K

    R has one block :math:`R_b`, of a `Covariance`, for each correlated term and column of the
    predictor; elsewhere it is the identity. The sites are ``<factor>_sd``, those of the blocks,
    ``<factor>_cor`` unless R is the identity and, in a plate over clusters, ``<factor>_effect``.

    The effects of an intercept and slopes are those at the features' means: T u, with T of
    `InputBlock.from_zero`. Their sds and R are those of u at x = 0, the quantities of tables and
    priors; but where terms are correlated and the intercept's prior has its default scale, which
    suits the means, they are those of T u (`at_means`).

    Effects are ordered by column of phi, then by column of the predictor. Effects on the predictors
    of `parameters`, which are the last columns, follow those on the outcome's columns. Effects on
    filters come last; all columns of the predictor share them. `default` is the scale of the sds'
    prior, if the prior has none of its own; `spread` is in outcome units per standardised unit, and
    those of parameters are 2.5 and 1. Names of sites start with `label`, by default the factor's
    name. The coefficients of a smooth term share one sd, so that the site of the sds has fewer
    values than there are terms.

    The clusters of a factor with a `process`, which `place_cells` sets, are cells (cluster, time).
    Their effects depend on each other; those of the cells of different clusters do not.
    """

    to_original: Tensor
    from_zero: Tensor | None  # T for all terms; None if it is the identity
    unit: Tensor  # standardised units per original unit of each term
    sd_unit: Tensor  # the same of each sd
    _sd_of_term: Tensor | None  # place of each term's sd; None if each has its own
    prior_scale: Tensor  # of the sds, in standardised units

    def __init__(
        self,
        name: str,
        blocks: Sequence[Block],
        columns: Sequence[str],
        priors: Priors,
        default: float,
        spread: float,
        label: str | None = None,
        parameters: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.name = name
        self.label = name if label is None else label
        self.plate_name = name
        self._columns = EffectColumns(blocks, columns, parameters)
        self._blocks = nn.ModuleList(self._columns.blocks)
        names = [f"{b.parameter} {term}" for b in self.blocks for term in b.names]
        if twice := [term for place, term in enumerate(names) if term in names[:place]]:
            raise ValueError(
                f"two terms of {name!r} have the column {twice[0].strip()!r}: leave it out of one "
                "of them"
            )
        labels = [label for b in self.blocks for label in self._columns.labels(b, default)]
        self.n_linear = len(labels) - sum(len(block.names) for block in self.filters)
        self.terms = tuple(label for _, label, _ in labels)
        matrix = torch.block_diag(*(self._columns.to_original(b, spread) for b in self.blocks))
        unit = 1 / matrix.diagonal()
        self.prior = priors.of(name)
        scales = torch.tensor([scale for *_, scale in labels], dtype=unit.dtype)
        first, self.sd_names, self._names, of_term = self._columns.sds(labels)
        self.first_of_sd = first
        self.register_buffer("_sd_of_term", of_term if self.smooth else None, persistent=False)
        prior_scale = self.prior.scales(self._names, unit[first], scales[first])
        self.register_buffer("sd_unit", unit[first], persistent=False)
        self.register_buffer("to_original", matrix, persistent=False)
        self._place_sites()
        self.register_buffer("unit", unit, persistent=False)
        self.register_buffer("prior_scale", prior_scale, persistent=False)
        self.groups = [
            (group, covariance.with_priors(priors)) for group, covariance in self._correlated()
        ]
        if isinstance(self.prior, Known) and self.groups:
            raise ValueError(
                f"the sds of {name!r} are given as known, but its terms are correlated: write them "
                "as independent, with '||'"
            )
        self._process = nn.ModuleList()
        for _, covariance in self.groups:
            if not covariance.clusters_independent:
                raise ValueError(
                    f"the covariance {covariance.name!r} of {name!r} makes its clusters depend on "
                    "each other, for which there is no guide yet"
                )

    @property
    def smooth(self) -> bool:
        """Whether the factor is that of a smooth term, whose one cluster holds all rows."""
        return any(block.shared for block in self.blocks)

    def place_cells(self, levels: pd.Index) -> None:
        """Set the process, if the factor has one, to the cells with these labels."""
        for block in self.blocks:
            if not isinstance(block, ProcessBlock):
                continue
            self._columns.check_single(f"the process {block.names[0]!r} of {self.name!r}")
            self._process.append(CellProcess(block.kind, self.label, levels, self.name))

    def width_of(self, block: Block) -> int:
        """Number of columns of the predictor that a linear block acts on."""
        return self._columns.width(block)

    def _place_sites(self) -> None:
        """Set T and, by name of an intercept whose prior holds at features' means, `at_means`."""
        parts, self.at_means, start = [], dict[str, tuple[str, ...]](), 0
        self._moved: list[tuple[int, ...]] = []  # places of terms whose sites are at x = 0
        for block in self.linear:
            width = self.width_of(block)
            size = len(block.names) * width
            part = block.from_zero()
            free = part is not None and block.covariance.any_origin
            # Correlations with terms of other predictors stand at the features' means.
            if block.group or (free and not self.prior.sets(self._names[start])):
                intercepts = self.terms[start : start + width]
                if part is not None:
                    self.at_means |= dict.fromkeys(intercepts, block.shifted)
                part = None
            if part is not None:
                columns = range(start, start + width)
                self._moved += [tuple(range(c, start + size, width)) for c in columns]
            by_column = torch.eye(width, dtype=torch.float64)
            parts.append(torch.eye(size) if part is None else torch.kron(part, by_column))
            start += size
        matrix = torch.block_diag(*parts, torch.eye(len(self.terms) - start)).double()
        moved = bool((matrix != torch.eye(len(matrix))).any())
        self.register_buffer("from_zero", matrix if moved else None, persistent=False)

    def _correlated(self) -> Iterator[tuple[TermGroup, Covariance]]:
        """Groups of correlated terms: blocks with one label, or a block; for each column."""
        groups, start = dict[tuple[str, int], tuple[list[int], Covariance]](), 0
        for number, block in enumerate(self.linear):
            width = self.width_of(block)
            stop = start + len(block.names) * width
            for column in range(width):
                # A parameter's terms are correlated with those of the outcome's first column.
                key = (f"|{block.group}|" if block.group else str(number), column)
                places, _ = groups.setdefault(key, ([], block.covariance))
                places += range(start + column, stop, width)
                if block.group:
                    groups[key] = (places, Correlated())
            start = stop
        chosen = [
            (tuple(places), covariance)
            for places, covariance in groups.values()
            if len(places) > 1 and not covariance.diagonal
        ]
        for number, (group, covariance) in enumerate(chosen):
            names = tuple(self.terms[place] for place in group)
            yield TermGroup(self.label, group, names, number if chosen[1:] else None), covariance

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One block per term."""
        return cast("tuple[Block, ...]", tuple(self._blocks))

    @property
    def linear(self) -> tuple[LinearBlock, ...]:
        """Blocks of effects on the linear predictor."""
        return tuple(block for block in self.blocks if isinstance(block, LinearBlock))

    @property
    def filters(self) -> tuple[FilterBlock, ...]:
        """Blocks of effects inside the network."""
        return tuple(block for block in self.blocks if isinstance(block, FilterBlock))

    @property
    def process(self) -> CellProcess | None:
        """The process whose values at the cells are the effects; None for independent clusters."""
        return cast("CellProcess", self._process[0]) if len(self._process) else None

    @property
    def chained(self) -> bool:
        """Whether effects depend on each other: those of a cluster with two or more times."""
        return self.process is not None and len(self.process) > len(self.process.cells.clusters)

    @property
    def on_parameters(self) -> bool:
        """Whether there are effects on predictors of parameters."""
        return any(block.parameter for block in self.linear)

    @property
    def diagonal(self) -> bool:
        """Whether all effects of a cluster are independent given their sds."""
        return not self.groups and self.from_zero is None

    @property
    def sd_site(self) -> str:
        """Name of the site of the sds."""
        return f"{self.label}_sd"

    @property
    def effect_site(self) -> str:
        """Name of the site of the random effects."""
        return f"{self.label}_effect"

    def sites(self) -> tuple[str, ...]:
        """Names of all sites, and of the site that correlated effects would have."""
        of_groups = [site for group, kind in self.groups for site in kind.sites(group)]
        if self.process is not None and self.process.kernel.site is not None:
            of_groups.append(self.process.kernel.site)
        return (self.effect_site, self.sd_site, f"{self.label}_cor", *of_groups)

    # --- priors -----------------------------------------------------------------------------

    def forward(self, membership: Membership) -> Effects:
        """Sample the hyperparameters, and the random effects of the batch's clusters."""
        latents = {self.sd_site: self.prior.sample(self.sd_site, self.prior_scale)}
        for group, covariance in self.groups:
            latents |= covariance.sample(group, self.prior_scale)
        if self.process is not None:
            latents |= self.process.sample(self.prior_scale)
        if self.groups:
            root = self._correlation_cholesky(latents)
            pyro.deterministic(f"{self.label}_cor", root @ root.mT, event_dim=2)
        scale = self.scale(latents)
        with self.plate(membership), weighted(membership):
            if self.process is not None and len(membership.index) == len(self.process):
                prior: dist.TorchDistribution = self.process.prior(scale, latents)
            elif self.diagonal:
                prior = dist.Normal(torch.zeros_like(scale), scale).to_event(1)
            else:
                zeros = scale.new_zeros(scale.shape[:-1])
                unit = torch.eye(scale.shape[-1], dtype=scale.dtype, device=scale.device)
                prior = WhitenedNormal(scale, zeros, unit)
            return pyro.sample(self.effect_site, prior)

    def plate(self, membership: Membership) -> pyro.plate:
        """The plate over the batch's clusters."""
        return pyro.plate(self.plate_name, len(membership.index), dim=-1)

    def known(self) -> dict[str, Tensor]:
        """Values of the hyperparameters that the priors fix."""
        return {self.sd_site: self.prior_scale} if isinstance(self.prior, Known) else {}

    def starts(self) -> dict[str, Tensor]:
        """Initial values of a guide's coordinates, by site; see `Covariance.starts`."""
        size = len(self.sd_names)
        sd = START_SD / math.sqrt(max(1, size / 2))
        sds = torch.full((size,), sd, dtype=torch.float64)
        values = {self.sd_site: sds}
        free = {group.places for group, covariance in self.groups if covariance.any_origin}
        for places in (places for places in self._moved if places not in free):
            index = torch.tensor(places, device=self.unit.device)
            row = cast("Tensor", self.from_zero)[places[0], index].double().cpu()
            # All sds at x = 0 are equal, as far as the intercept's at the means is moderate.
            sds[list(places)] = torch.where(row == 0, sd, 1.0).to(sds)
            sds[places[0]] = sd * row.norm().clamp(max=2)
        for group, covariance in self.groups:
            values |= covariance.starts(group)
        return values if self.process is None else values | self.process.kernel.start()

    def describe_priors(self) -> dict[str, str]:
        """Priors of the terms' sds and of their correlations, in the units of the data."""
        lines = {}
        for term, name, scale, unit in zip(
            self.sd_names, self._names, self.prior_scale, self.sd_unit, strict=True
        ):
            prior = self.prior.describe(float(scale / unit)) + self._means(term)
            default = float(unit) != 1 and not self.prior.sets(name)
            lines[f"{self.sd_site}[{term}]"] = prior + ", scaled to the data" * default
        for group, covariance in self.groups:
            means = self._means(group.terms[0])
            lines |= {site: text + means for site, text in covariance.describe(group).items()}
        return lines if self.process is None else lines | self.process.kernel.describe()

    def _means(self, term: str) -> str:
        """Where an intercept's prior holds, in words, unless it is x = 0."""
        shifted = self.at_means.get(term)
        return f" at the mean{'s' * (len(shifted) > 1)} of {', '.join(shifted)}" if shifted else ""

    # --- the covariance matrix, given the latent sites --------------------------------------

    def sd(self, latents: Latents) -> Float[Tensor, "... terms"]:
        """Standard deviations of the terms: the latent site, unless terms share one."""
        sds = latents[self.sd_site]
        return sds if self._sd_of_term is None else sds[..., self._sd_of_term]

    def effect_sd(self, latents: Latents) -> Float[Tensor, "... terms"]:
        """Standard deviations of the effects, at the features' means."""
        return self.sd(latents) if self.from_zero is None else self.scale(latents).norm(dim=-1)

    def _correlation_cholesky(self, latents: Latents) -> Matrix:
        """Cholesky factor of R, assembled from the groups' factors."""
        if len(self.groups) == 1 and len(self.groups[0][0].terms) == len(self.terms):
            group, covariance = self.groups[0]
            return covariance.cholesky(group, latents)
        sd = self.sd(latents)
        full = torch.eye(len(self.terms), dtype=sd.dtype, device=sd.device)
        full = full.expand(*sd.shape[:-1], *full.shape).clone()
        for group, covariance in self.groups:
            index = torch.tensor(group.places, device=sd.device)
            full[..., index[:, None], index] = covariance.cholesky(group, latents)
        return full

    def scale(self, latents: Latents) -> Float[Tensor, "... terms"] | Matrix:
        """L with u = L z: the vector of sds if effects are independent, else lower triangular."""
        sd = self.sd(latents)
        if self.diagonal:
            return sd
        root = sd[..., :, None] * self._correlation_cholesky(latents)
        if self.from_zero is None:
            return root
        root = root.clone()
        correlated = {place for group, _ in self.groups for place in group.places}
        for places in self._moved:
            index = torch.tensor(places, device=sd.device)
            block = (..., index[:, None], index)
            part = self.from_zero[block].to(sd)
            root[block] = (
                lower_triangular(part @ root[block])
                if correlated.issuperset(places)
                else sheared_diagonal(part[0], sd[..., index])
            )
        return root

    def from_guide(self, values: Latents) -> tuple[dict[str, Tensor], Float[Tensor, "..."] | float]:
        """Sites that stand at x = 0, from a guide's coordinates, and the map's log |det|.

        A guide's posterior should not depend on the origin of x. Its coordinates are sds and
        correlations at the features' means where terms are correlated. Where they are not, they are
        the intercept's sd at the means, about which the rows say most, and the ratio of each
        slope's sd to the intercept's at x = 0: far from zero, the rows know only a sum of squares.
        Slopes on features with mean zero, such as dummies, keep their sds.
        """
        moved: dict[str, Tensor] = {}
        log_det: Tensor | float = 0.0
        kinds = {group.places: (group, covariance) for group, covariance in self.groups}
        for places in self._moved if self.from_zero is not None and self.sd_site in values else ():
            index = torch.tensor(places, device=self.unit.device)
            sd = moved.get(self.sd_site, values[self.sd_site])
            sds = sd[..., index]
            part = cast("Tensor", self.from_zero)[index[:, None], index].to(sd)
            group, covariance = kinds.get(places, (None, None))
            if group is not None and covariance is not None and covariance.any_origin:
                (site,) = covariance.sites(group)
                root = lower_triangular(torch.linalg.inv(part) @ (sds[..., None] * values[site]))
                zero = root.norm(dim=-1)
                moved[site] = root / zero[..., None]
                log_det = log_det + log_volume(sds, values[site]) - log_volume(zero, moved[site])
            else:
                ratios = torch.cat([torch.ones_like(sds[..., :1]), sds[..., 1:]], -1)
                intercept = sds[..., :1] / (ratios * part[0]).norm(dim=-1, keepdim=True)
                zero = torch.where(part[0] == 0, sds, ratios * intercept)
                log_det = log_det + (zero.log() - sds.log()).sum(-1)
            moved[self.sd_site] = sd.index_copy(-1, index, zero)
        return moved, log_det

    def whitened(self, latents: Latents) -> Float[Tensor, "draws clusters terms"]:
        """z = L^-1 u, independent standard normal in every draw if the program is right."""
        u = latents[self.effect_site]
        if self.process is not None:
            return self.process.prior(self.sd(latents), latents).noise(u)
        scale = self.scale_matrix(latents)
        scale = scale.expand(len(u), 1, *scale.shape[-2:])[:, 0]
        return torch.linalg.solve_triangular(scale, u.mT, upper=False).mT

    def scale_matrix(self, latents: Latents) -> Matrix:
        """L as a matrix, even if effects are independent."""
        scale = self.scale(latents)
        return torch.diag_embed(scale) if self.diagonal else scale

    def log_det_scale(self, latents: Latents) -> Float[Tensor, "..."]:
        """log |L|."""
        scale = self.scale(latents)
        diagonal = scale if self.diagonal else scale.diagonal(dim1=-2, dim2=-1)
        return diagonal.log().sum(-1)

    def covariance(self, latents: Latents) -> Matrix:
        """D, in standardised units."""
        scale = self.scale(latents)
        return torch.diag_embed(scale**2) if self.diagonal else scale @ scale.mT

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Positions of every pair of correlated terms."""
        for group, _ in self.groups:
            yield from combinations(group.places, 2)

    def correlations(self, latents: Latents) -> dict[str, Float[Tensor, " draws"]]:
        """Correlation of every pair of terms of a group, in standardised units."""
        values = {}
        for group, covariance in self.groups:
            root = covariance.cholesky(group, latents)
            root = root.reshape(-1, *root.shape[-2:])
            for i, j in combinations(range(len(group.terms)), 2):
                name = f"{self.name}_cor[{group.terms[i]},{group.terms[j]}]"
                values[name] = (root[:, i] * root[:, j]).sum(-1)
        return values

    def quantities(self, latents: Latents) -> Iterator[tuple[TermGroup, str, Tensor]]:
        """Further rows of tables, by group and name; see `Covariance.quantities`."""
        if self.process is not None:
            yield from self.process.quantities(latents, self.terms[0])
        for group, covariance in self.groups:
            for name, values in covariance.quantities(group, latents).items():
                yield group, name, values.reshape(-1)

    # --- effects and their columns ----------------------------------------------------------

    def effects_of(self, latents: Latents, noise: Effects) -> Effects:
        """u = L z for standard normal noise z, with the same draws as the latent sites."""
        scale = self.scale(latents)  # draws come with size 1 in the dimension of the clusters
        if self.diagonal:
            return scale * noise
        return noise @ (scale.squeeze(-3) if scale.dim() > 2 else scale).mT

    def extended(self, latents: Latents, count: int, *, population: bool) -> Effects:
        """Effects of seen clusters, then of new ones up to `count`; see `MixedEffects.extend`."""
        seen = latents[self.effect_site]
        new = count - seen.shape[-2]
        effects = seen.new_zeros(*seen.shape[:-2], new, seen.shape[-1])
        if not population and new:
            effects = self.effects_of(latents, torch.randn_like(effects))
        return torch.cat([seen, effects], -2)

    def design(self, x: Tensor, activations: Latents) -> Float[Tensor, "rows phi_columns"]:
        """phi, the columns of all terms except those on filters."""
        columns = [block.columns(x, activations) for block in self.linear]
        phi = torch.cat(columns, -1) if columns else x.new_zeros(len(x), 0)
        return phi.to(self.unit.dtype)

    def filter_effects(self, latents: Latents, rows: Rows) -> Float[Tensor, "rows filter_terms"]:
        """Each row's effects on filters: those of its cluster, or zeros without a latent site."""
        if self.effect_site not in latents:
            return self.unit.new_zeros(len(rows), len(self.terms) - self.n_linear)
        return latents[self.effect_site][rows.memberships[self.name].position, self.n_linear :]

    def by_layer(
        self, effects: Float[Tensor, "rows filter_terms"]
    ) -> list[tuple[str, Float[Tensor, "rows 2*filters"]]]:
        """Layers with their effects, as `armed_pyro.networks.taps.modulated` takes them."""
        widths = [len(block.names) for block in self.filters]
        paths = [block.path for block in self.filters]
        return list(zip(paths, effects.split(widths, -1), strict=True))

    def contribution(
        self, phi: Float[Tensor, "rows phi_columns"], membership: Membership, effects: Effects
    ) -> Float[Tensor, "... rows columns"]:
        """phi_i' u_{g(i)} for every row and column of the predictor."""
        return self._columns.contribution(phi, membership, effects[..., : self.n_linear])

    def by_column(
        self, phi: Float[Tensor, "rows phi_columns"]
    ) -> Float[Tensor, "rows linear_terms columns"]:
        """Z, the map from a cluster's effects to the columns of the predictor."""
        return self._columns.by_column(phi)


def factor_named(factors: Sequence[Factor], name: str | None) -> Factor:
    """The factor with this name, by default the first; a `ValueError` if there is none."""
    by_name = {factor.name: factor for factor in factors}
    if not by_name:
        raise ValueError("the program has no random effects, so its clusters do not differ")
    if name is not None and name not in by_name:
        raise unknown("grouping factor with random effects", name, by_name)
    return factors[0] if name is None else by_name[name]


def weighted(membership: Membership) -> ScaleMessenger:
    """Handler that multiplies the log-density of each cluster's sites by the cluster's weight."""
    return ScaleMessenger(1.0 if membership.weight is None else membership.weight)
