"""All that the rows say of a process in time and of effects beside it, as sums by cell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from armed_pyro.guides.row_sums import effects_part, fixed_part
from armed_pyro.program.linearize import curvature, mean_draws, sensitivities
from armed_pyro.program.model import MixedEffects
from armed_pyro.program.predictor import modulates
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.random_effects.process import CellProcess
from armed_pyro.rows.batch import Rows
from armed_pyro.rows.source import RowSource

__all__ = ["ProcessSums", "split_factors"]

# Values of designs and draws in a block of rows.
BLOCK_VALUES = 2**21
# Units of the link by which a refresh may move the predictor of a row.
LONGEST_STEP = 3.0

Sums = dict[str, Tensor]


def split_factors(model: MixedEffects) -> tuple[Factor, tuple[Factor, ...]]:
    """The factor with a process, and the others, those with most clusters first.

    ValueError for a program with several processes, or with effects inside the network.
    """
    processes = [factor for factor in model.factors if factor.process is not None]
    if len(processes) != 1:
        names = ", ".join(str(term) for term in model.terms)
        raise ValueError(f"a program has at most one process in time, found {names}: leave one out")
    if modulates(model):
        raise ValueError(
            "a process in time and effects on filters of the network are not possible together: "
            "leave one of them out"
        )
    levels = model.data_facts().levels
    others = [factor for factor in model.factors if factor.process is None]
    return processes[0], tuple(sorted(others, key=lambda factor: -len(levels[factor.name])))


class ProcessSums(nn.Module):
    r"""Each cell's weighted mean row, and the spread of the rows within cells.

    The program is :math:`y = X \beta + \sum_m Z_m u_m + f_{c(i)} + W^{-1/2} e / \sqrt\tau`, with f
    the process at the row's cell c(i), the factors m around each other from the inside out, and
    every chain (the cells of a cluster of the process) in one cluster of every factor. y and W are
    the outcomes and weights of a gaussian program, or the working responses and weights of other
    families at the present state.

    `information` is :math:`W_c = \sum_{i \in c} W_i`, and `columns` are the weighted means of
    :math:`C = (Z_1, Z_2, \dots, X, y)` in every cell. Rows of a cell differ by
    :math:`C_i - \bar C_c`, which the process cannot explain; `within` are the sums of their
    products over the clusters of factor 1, or of all rows without one.

    `inside` is each cell's cluster of factor 1, and `parents` give each cluster's cluster in the
    next factor. `count` and `constant` are the rows' number or frequencies, and the part of the
    log-density without parameters.
    """

    information: Float[Tensor, " cells"]
    columns: Float[Tensor, "columns cells"]
    within: Float[Tensor, "columns columns clusters"]
    inside: Int[Tensor, " cells"]
    count: Float[Tensor, ""]
    constant: Float[Tensor, ""]

    def __init__(self, model: MixedEffects) -> None:
        super().__init__()
        facts, device = model.data_facts(), model.reference().device
        self.factor, self.factors = split_factors(model)
        process = self.factor.process
        assert process is not None  # for mypy
        self.process: CellProcess = process
        self.terms = [len(factor.terms) for factor in self.factors]
        self.clusters = [len(facts.levels[factor.name]) for factor in self.factors]
        self.fixed = len(model.fixed_terms()) if model.has_fixed_effects else 0
        like = torch.zeros((), dtype=torch.float64, device=device)
        cells, columns = len(facts.levels[self.factor.name]), sum(self.terms) + self.fixed + 1
        self.register_buffer("information", like.new_zeros(cells))
        self.register_buffer("columns", like.new_zeros(columns, cells))
        clusters = self.clusters[0] if self.factors else 1
        self.register_buffer("within", like.new_zeros(columns, columns, clusters))
        self.register_buffer("inside", torch.zeros(cells, dtype=torch.long, device=device))
        for m in range(1, len(self.factors)):
            codes = torch.zeros(self.clusters[m - 1], dtype=torch.long, device=device)
            self.register_buffer(f"parents_{m}", codes)
        self.register_buffer("count", like.clone())
        self.register_buffer("constant", like.clone())

    @property
    def parents(self) -> list[Int[Tensor, " clusters"]]:
        """For each factor but the outermost, its clusters' clusters in the next factor."""
        return [getattr(self, f"parents_{m}") for m in range(1, len(self.factors))]

    @property
    def ends(self) -> Float[Tensor, "fixed_and_1 cells"]:
        """Mean rows of X and y."""
        return self.columns[sum(self.terms) :]

    @property
    def z(self) -> Float[Tensor, "terms cells"]:
        """Mean rows of all Z, the innermost factor's first."""
        return self.columns[: sum(self.terms)]

    def in_order(self, values: Shaped[Tensor, "... cells"]) -> Shaped[Tensor, "... cells"]:
        """Values of the cells in the order of the chains' steps."""
        return values.index_select(-1, self.process.timeline.chains.steps)

    def place(self, model: MixedEffects, source: RowSource) -> None:
        """Set the clusters of the cells, in place; ValueError unless clusters hold whole chains."""
        chain = self.process.timeline.cluster
        n_chains = int(chain.max()) + 1 if len(chain) else 0
        codes = [
            torch.full((n_chains,), -1, device=chain.device, dtype=torch.long) for _ in self.factors
        ]
        for rows in source.chunks(BLOCK_VALUES):
            of_row = chain[rows.memberships[self.factor.name].clusters()]
            for factor, code in zip(self.factors, codes, strict=True):
                cluster = rows.memberships[factor.name].clusters()
                code[of_row] = torch.where(code[of_row] < 0, cluster, code[of_row])
                # Rows of a chain in one block may differ, too: the last one written is compared.
                if bool((code[of_row] != cluster).any()):
                    raise ValueError(
                        f"clusters of the process {self.factor.terms[0]!r} of {self.factor.name!r} "
                        f"lie in several clusters of {factor.name!r}: a process is possible beside "
                        "random effects of its own clusters and of groups of these"
                    )
        codes = [code.clamp(min=0) for code in codes]
        if codes:
            self.inside.copy_(codes[0][chain])
        for target, inner, outer in zip(self.parents, codes, codes[1:], strict=False):
            target.scatter_(0, inner, outer)
            if bool((target[inner] != outer).any()):
                raise ValueError(
                    "grouping factors beside a process must be nested in each other; "
                    f"{', '.join(factor.name for factor in self.factors)} are crossed"
                )

    @torch.no_grad()
    def observe(
        self, model: MixedEffects, source: RowSource, latents: Mapping[str, Tensor]
    ) -> None:
        """Set all sums from the rows at these draws, or at this point, in place."""
        sums = self._zeros(len(source) > len(self.process))
        means = mean_draws(model, latents)
        draws = max([1, *(len(value) for value in latents.values() if value.dim() > 1)])
        size = max(1, BLOCK_VALUES // max(len(self.columns) ** 2, draws))
        for rows, weight, residual, activations in curvature(model, source, latents, size):
            x, response = fixed_part(model, means, weight, residual, rows, activations)
            z = []
            for factor in self.factors:
                part = sensitivities(model, rows, factor, activations, means)
                response = response + effects_part(factor, means, rows, part, weight)
                z.append(part[..., 0].double())
            known = self.factor
            ones = sensitivities(model, rows, known, activations, means)
            response = response + effects_part(known, means, rows, ones, weight)
            inputs = [*z, *([] if x is None else [x[..., 0].double()])]
            self._add(model, sums, rows, inputs, weight[:, 0].double(), response[:, 0].double())
        for name, value in sums.items():
            sums[name] = source.total(value)
        self._set(model, sums)

    def _zeros(self, replicated: bool) -> Sums:
        """Sums over no rows; products within clusters only if cells have several rows."""
        sums = {
            name: torch.zeros_like(getattr(self, name))
            for name in ("information", "columns", "count", "constant")
        }
        return sums | ({"within": torch.zeros_like(self.within)} if replicated else {})

    def _add(
        self,
        model: MixedEffects,
        sums: Sums,
        rows: Rows,
        inputs: Sequence[Float[Tensor, "rows terms"]],
        weight: Float[Tensor, " rows"],
        response: Float[Tensor, " rows"],
    ) -> None:
        """Add a block of rows, in place; their response is W y."""
        cell = rows.memberships[self.factor.name].clusters()
        y = torch.where(weight > 0, response / weight.clamp(min=1e-300), 0.0)
        columns = torch.cat([*inputs, y[:, None]], 1)
        weighted = columns * weight[:, None]
        sums["information"].index_add_(0, cell, weight)
        sums["columns"].index_add_(1, cell, weighted.mT.contiguous())
        if "within" in sums:
            products = weighted[:, :, None] * columns[:, None, :]
            sums["within"].index_add_(2, self.inside[cell], products.movedim(0, -1))
        frequency = model.frequencies(rows)
        sums["count"] += len(rows) if frequency is None else frequency.double().sum()
        if frequency is None and rows.weights is not None:
            sums["constant"] += 0.5 * rows.weights.double().log().sum()

    def _set(self, model: MixedEffects, sums: Sums) -> None:
        information = sums["information"]
        means = sums["columns"] / information.clamp(min=1e-300)
        self.information.copy_(information)
        self.columns.copy_(torch.where(information > 0, means, 0.0))
        self.within.zero_()
        if "within" in sums:
            between = information * self.columns[:, None] * self.columns[None]
            self.within.copy_(sums["within"].index_add(2, self.inside, -between))
        spread = model.data_facts().spread
        self.count.copy_(sums["count"])
        size = 0.5 * math.log(2 * math.pi) + math.log(spread)
        self.constant.copy_(sums["constant"] - sums["count"] * size)
