"""`Plan`: the parts of a program, before and after it is bound to data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Self, cast

import pyro.distributions as dist
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from armed_pyro._messages import REAL, check_type
from armed_pyro._pyro_module import PYRO_LOCK, LocalModule
from armed_pyro.data.grouping import is_smooth_text
from armed_pyro.families.distributional import family_with_predictors, parameter_named
from armed_pyro.families.family import Eta, Family, Parameters
from armed_pyro.families.reconstruction import Reconstruction
from armed_pyro.families.registry import family_named
from armed_pyro.networks.adversary import Adversary
from armed_pyro.networks.taps import head_path, run
from armed_pyro.priors import Known, Priors
from armed_pyro.program.between import BetweenChoice
from armed_pyro.program.data_spec import Facts
from armed_pyro.program.fold_networks import FoldNetworks
from armed_pyro.random_effects.covariance import Latents
from armed_pyro.random_effects.design import LinearBlock, by_column
from armed_pyro.random_effects.formula import parse_terms
from armed_pyro.random_effects.grouping_factor import Factor
from armed_pyro.random_effects.parameter_formula import (
    ParameterFormula,
    check_parameters_of,
    read_parameters,
)
from armed_pyro.random_effects.terms import Term
from armed_pyro.rows.batch import Rows

__all__ = ["Plan"]


class Plan(LocalModule):
    """Network, terms, family, adversaries and priors of a program.

    Abstract: `MixedEffects` adds the joint density, and documents the parameters. Before
    `MixedEffects.bind` there are no factors, and `data_facts` raises an error.
    """

    facts: Facts | None
    parameter_formulas: tuple[ParameterFormula, ...]  # of the fixed effects on parameters
    # Tapped layers, and "" for the output, that effects inside the network cannot change.
    unreached: frozenset[str] = frozenset()
    mixed_precision: bool = False  # whether the network runs in bfloat16 where that is enough
    # Paths of the network's modules that a training leaves in evaluation mode.
    frozen: frozenset[str] = frozenset()
    # Root of the fixed effects' prior covariance, per `Priors.fixed_sd`; None for the identity.
    fixed_root: Tensor | None

    def __init__(
        self,
        net: nn.Module,
        random: str | Term | Iterable[str | Term] = (),
        family: str | Family = "gaussian",
        adversary: Adversary | Sequence[Adversary] = (),
        *,
        priors: Priors | None = None,
        bayesian_head: bool = False,
        fixed_weight: float = 0.0,
        others: Reconstruction | Sequence[Reconstruction] = (),
        between: BetweenChoice = None,
        linear_effects: bool | None = None,
        output: int | str | Sequence[int | str] = (),
        parameters: Mapping[str, str] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__("program")
        if not isinstance(net, nn.Module):
            raise TypeError(f"the network must be a torch.nn.Module, not {type(net).__name__}")
        terms = "Write '(1 | site)', for example; without random effects, ()."
        check_type(random, (str, Term, Iterable), "random", terms)
        check_type(family, (str, Family), "family")
        check_type(adversary, (Adversary, Sequence), "adversary", "Without one, leave it out.")
        check_type(others, (Reconstruction, Sequence), "others", "Without any, leave it out.")
        advice = "Pass Priors(sd=...), for example."
        check_type(priors, (Priors, type(None)), "priors", advice)
        check_type(bayesian_head, bool, "bayesian_head")
        check_type(fixed_weight, REAL, "fixed_weight")
        if fixed_weight < 0:
            raise ValueError(f"`fixed_weight` must not be negative, not {fixed_weight}")
        if between not in (None, True, False, "auto"):
            raise ValueError(f"`between` must be True, False or 'auto', not {between!r}")
        check_type(linear_effects, (bool, type(None)), "linear_effects")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`dtype` must be torch.float64 or torch.float32, not {dtype}")
        self.net = net
        self.output = (output,) if isinstance(output, (int, str)) else tuple(output)
        self.dtype = dtype
        check_type(parameters, (Mapping, type(None)), "parameters", "Pass {'sigma': '1 + x'}.")
        self._read(parse_terms(random), family_named(family), parameters or {})
        adversaries = [adversary] if isinstance(adversary, Adversary) else list(adversary)
        for member in adversaries:
            check_type(member, Adversary, "every adversary")
        self._adversaries = nn.ModuleList(adversaries)
        self.priors = Priors() if priors is None else priors
        self.bayesian_head = bayesian_head
        self.fixed_weight = float(fixed_weight)
        self.between = between
        self.linear_effects = linear_effects
        self.others = (others,) if isinstance(others, Reconstruction) else tuple(others)
        for other in self.others:
            check_type(other, Reconstruction, "every one of others")
        self._factors = nn.ModuleList()
        self._folds = nn.ModuleList()
        self.facts = None

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; the `frozen` modules stay in evaluation mode."""
        super().train(mode)
        for path in self.frozen:
            self.network.get_submodule(path).training = False
        return self

    def _read(self, terms: tuple[Term, ...], family: Family, parameters: Mapping[str, str]) -> None:
        """Set the terms, the family, and the formulas of its parameters."""
        base = family.without_predictors
        read = read_parameters(parameters)
        names = [parameter_named(base, formula.name) for formula in read]
        labels = [parameter.alias or parameter.name for parameter in names]
        if twice := [label for place, label in enumerate(labels) if label in labels[:place]]:
            raise ValueError(f"{twice[0]!r} has two predictors: give a single formula")
        pairs = list(zip(read, labels, strict=True))
        self.parameter_formulas = tuple(replace(f, name=name, random=()) for f, name in pairs)
        self.terms = terms + tuple(
            replace(term, parameter=name) for formula, name in pairs for term in formula.random
        )
        check_parameters_of(self.terms, labels)
        from_network = sum(formula.from_network for formula in read)
        self.family = family_with_predictors(base, [p.name for p in names], from_network)
        self._designs = nn.ModuleList()

    @property
    def predictors(self) -> dict[str, str]:
        """Formulas of the fixed effects on parameters of the family, by parameter."""
        return {formula.name: formula.fixed for formula in self.parameter_formulas}

    @property
    def outcome_terms(self) -> tuple[Term, ...]:
        """The random effects on the outcome's own predictor and inside the network."""
        return tuple(term for term in self.terms if not getattr(term, "parameter", ""))

    def parameter_texts(self) -> tuple[str, ...]:
        """The predictors of parameters as they are written: ``sigma ~ x + (1 | site)``."""
        return tuple(formula.written(self.terms) for formula in self.parameter_formulas)

    @property
    def designs(self) -> dict[str, LinearBlock]:
        """Columns of the linear predictors of parameters, by parameter."""
        modules: Any = self._modules["_designs"]
        names = [f.name for f in self.parameter_formulas if not f.from_network]
        return dict(zip(names, modules, strict=True))

    @property
    def network_columns(self) -> tuple[str, ...]:
        """The columns of the predictor that the network gives."""
        linear = sum(not formula.from_network for formula in self.parameter_formulas)
        columns = self.data_facts().columns
        return columns[: len(columns) - linear]

    @property
    def network(self) -> nn.Module:
        """The network, without registering its weights as Pyro parameters."""
        return cast("nn.Module", self._modules["net"])

    @property
    def adversaries(self) -> tuple[Adversary, ...]:
        """The adversaries."""
        # Not by attribute, which PyroModule intercepts: their weights are no sites of the density.
        modules: Any = self._modules["_adversaries"]
        return tuple(modules)

    @property
    def fold_networks(self) -> FoldNetworks | None:
        """The cross-fitted networks of a fit, whose outputs take the place of the network's."""
        modules: Any = self._modules["_folds"]
        return modules[0] if len(modules) else None

    def cross_fit(self, networks: FoldNetworks | None) -> None:
        """Let these networks give the outputs from now on; with None, the program's network."""
        self._folds = nn.ModuleList([] if networks is None else [networks])

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The grouping factors with random effects; none before the model is bound."""
        modules: Any = self._modules["_factors"]
        return tuple(modules)

    @property
    def clustered_factors(self) -> tuple[Factor, ...]:
        """The factors whose clusters are a sample of others: those of smooth terms left out."""
        return tuple(factor for factor in self.factors if not factor.smooth)

    def factor_names(self) -> tuple[str, ...]:
        """Grouping factors of the terms and adversaries, in order of appearance."""
        names = [name for term in self.terms for name in term.groupings()]
        names += [adversary.factor for adversary in self.adversaries]
        return tuple(dict.fromkeys(names))

    def grouping_names(self) -> tuple[str, ...]:
        """`factor_names` without those of smooth terms, whose one cluster holds all rows."""
        return tuple(name for name in self.factor_names() if not is_smooth_text(name))

    def layers(self) -> tuple[str, ...]:
        """Module paths whose activations terms, adversaries or other outcomes need."""
        paths = [path for term in self.terms for path in term.layers()]
        paths += [path for adversary in self.adversaries for path in adversary.taps]
        paths += [other.tap for other in self.others]
        return tuple(dict.fromkeys(paths))

    def reference(self) -> Tensor:
        """A tensor of the program's precision, on the device of its network."""
        return torch.zeros((), dtype=self.dtype, device=self.network_reference().device)

    def network_reference(self) -> Tensor:
        """A tensor of the network's precision and device; of the program's without parameters."""
        parameters = self.network.parameters()
        default = torch.zeros((), dtype=self.dtype)
        return next((p for p in parameters if p.is_floating_point()), default)

    def unit(self) -> Float[Tensor, " 1"]:
        """Standardised units per unit of the outcome."""
        return self.reference().new_tensor([1 / self.data_facts().spread])

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """A context without gradients whose draws come from this seed and change no generator."""
        device = self.reference().device
        devices = [device] if device.type == "cuda" else []
        with PYRO_LOCK, torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    def data_facts(self) -> Facts:
        """Facts of the data to which the program is bound, or a `ValueError` before that."""
        if self.facts is None:
            raise ValueError("the model is not bound to data yet: call model.bind(data), or fit it")
        return self.facts

    def clusters(self) -> Rows:
        """No rows, but every cluster of every factor, for draws of random effects only."""
        return self.data_facts().clusters(self.reference())

    @property
    def linear(self) -> bool:
        """Whether the fixed effects are latent coefficients of the input features."""
        net, features = self.network, self.data_facts().feature_names
        linear = isinstance(net, nn.Linear) and net.in_features == len(features)
        return self.bayesian_head and linear

    @property
    def has_intercept(self) -> bool:
        """Whether the latent fixed effects have an intercept."""
        head = self.network.get_submodule(self.head_path())
        return self.data_facts().intercept and getattr(head, "bias", None) is not None

    @property
    def has_fixed_effects(self) -> bool:
        """Whether there are latent fixed effects: see `fixed_terms`."""
        facts = self.data_facts()
        linear = any(not formula.from_network for formula in self.parameter_formulas)
        return self.bayesian_head or linear or bool(facts.linear_names or facts.between_names)

    def head_path(self) -> str:
        """Module path of the network's last linear layer; empty if that is the network itself."""
        return head_path(self.network)

    def fixed_terms(self) -> tuple[str, ...]:
        """Names of the latent fixed effects, by column.

        They are the inputs of the last linear layer, if its weights are latent, followed by the
        features beside a network, ``linear(x)``, the clusters' means, and the terms of parameters,
        ``sigma_x``.
        """
        return self.common_terms() + self.parameter_terms()

    def common_terms(self) -> tuple[str, ...]:
        """The latent fixed effects on columns that the network gives."""
        facts = self.data_facts()
        names = self._head_terms() if self.bayesian_head else []
        names += [f"linear({name})" for name in facts.linear_names]
        names += facts.between_names
        return tuple(f"{name}[{c}]" if c else name for name in names for c in self.network_columns)

    def parameter_terms(self) -> tuple[str, ...]:
        """The latent fixed effects on parameters with a linear predictor."""
        pairs = self.designs.items()
        return tuple(f"{parameter}_{name}" for parameter, b in pairs for name in b.names)

    @property
    def event(self) -> Any:
        """The label whose probability is modelled; None unless the outcome has two labels."""
        classes = self.data_facts().classes
        return None if classes is None or self.family.has_class_probabilities else classes[1]

    def network_terms(self) -> tuple[str, ...]:
        """The latent fixed effects, except those of clusters' means and of parameters."""
        means = len(self.network_columns) * len(self.data_facts().between_names)
        return self.common_terms()[: len(self.common_terms()) - means]

    def _head_terms(self) -> list[str]:
        """Names of the inputs of the last linear layer."""
        facts, path = self.data_facts(), self.head_path()
        head = self.network.get_submodule(path)
        width = int(head.in_features)  # type: ignore[arg-type]
        names = [f"{path or 'input'}[{unit}]" for unit in range(width)]
        if self.linear:
            names = [facts.feature_names[place] for place in facts.kept]
        return ["Intercept"] * self.has_intercept + names

    def known(self) -> dict[str, Tensor]:
        """Latent quantities that are known by their priors, not estimated, by site."""
        known = {site: value for factor in self.factors for site, value in factor.known().items()}
        unit = self.unit()
        for parameter in self.family.parameters:
            value = parameter.known(self.priors, unit)
            if value is not None:
                known[parameter.name] = value
        for other in self.others:
            if isinstance(other.prior, Known):
                known[other.sd_site] = other.prior_scale(unit)
        return known

    def starts(self) -> dict[str, Tensor]:
        """Values at which the guide starts, by latent site, in double precision.

        Sites that are left out, such as fixed effects, start at 0 in unconstrained coordinates.
        """
        starts = {parameter.name: parameter.start for parameter in self.family.parameters}
        starts |= {other.sd_site: other.start for other in self.others}
        values = {name: torch.tensor(start, dtype=torch.float64) for name, start in starts.items()}
        for factor in self.factors:
            values |= factor.starts()
        return values

    def precision(self, latents: Latents) -> Tensor:
        """tau, the family's precision in standardised units; 1 if it depends on eta."""
        names = [parameter.name for parameter in self.family.parameters]
        tau = self.family.precision({name: latents[name] for name in names if name in latents})
        return self.reference().new_ones(()) if tau is None else tau

    def density(self, eta: Eta, latents: Latents, rows: Rows) -> dist.TorchDistribution:
        """p(y | eta, parameters of the family), on the outcome's scale."""
        parameters = self.row_parameters(self.family_parameters(latents), rows)
        return self.family.distribution(eta, parameters, rows)

    def row_parameters(self, parameters: Parameters, rows: Rows) -> Parameters:
        """The family's parameters for these rows: weights as precisions divide the variance."""
        if self.data_facts().weights_kind in ("precision", "se") and rows.weights is not None:
            return self.family.precision_weighted(parameters, rows.weights)
        return parameters

    def by_draw(self, eta: Eta, latents: Latents, rows: Rows) -> Iterator[tuple[Eta, Parameters]]:
        """eta and the family's parameters for these rows, one draw after the other.

        A distribution function of all draws at once could need too much memory.
        """
        values = {
            name: value.reshape(-1, 1).double()
            for name, value in self.family_parameters(latents).items()
        }
        for draw in range(max([len(eta), *map(len, values.values())])):
            drawn = {name: value[min(draw, len(value) - 1)] for name, value in values.items()}
            yield eta[min(draw, len(eta) - 1)], self.row_parameters(drawn, rows)

    def expected(self, eta: Eta, latents: Latents, rows: Rows) -> Tensor:
        """E[y | eta, parameters of the family] "... rows", or "... rows classes"."""
        return self.family.expected(eta, self._by_row(latents), rows)

    def average(self, eta: Eta, latents: Latents, rows: Rows) -> Tensor:
        """E[y | eta, parameters of the family]; ordered classes count as numbers."""
        return self.family.average(eta, self._by_row(latents), rows)

    def _by_row(self, latents: Latents) -> Parameters:
        """The family's parameters, with a 1 in the place of the rows where they have draws."""
        values = self.family_parameters(latents).items()
        return {
            name: value.reshape(-1, 1) if value.numel() > 1 else value.reshape(())
            for name, value in values
        }

    def frequencies(self, rows: Rows) -> Float[Tensor, " rows"] | None:
        """Multipliers of the rows' log-likelihoods; None stands for 1."""
        # Fits that were saved before there were kinds have frequencies.
        return None if self.data_facts().weights_kind in ("precision", "se") else rows.weights

    def family_parameters(self, latents: Latents) -> Parameters:
        """The family's parameters among these latent sites, on the outcome's scale."""
        spread = self.data_facts().spread
        return {
            parameter.name: parameter.original(latents[parameter.name], spread)
            for parameter in self.family.parameters
            if parameter.name in latents
        }

    def other_densities(
        self, means: Mapping[str, Tensor], latents: Latents, rows: Rows
    ) -> dict[Reconstruction, dist.TorchDistribution]:
        """Densities of the other outcomes, without their weights."""
        spread = self.data_facts().feature_spread
        return {
            other: other.distribution(means[other.name], spread * latents[other.sd_site], rows)
            for other in self.others
        }

    def run_network(self, rows: Rows, *, whole: bool = False) -> tuple[Tensor, Latents]:
        """The network's output, and its tapped activations by module path; see `taps.run`.

        They are in the network's precision.
        If the rows carry results of a frozen network, these are returned.
        """
        if rows.computed is not None:
            return rows.computed[""], rows.computed
        like, x = self.network_reference(), rows.network_inputs
        if self.fold_networks is not None:
            output = self.fold_networks.run(rows, x, like=like, element=self.output)
            return output, {"": output}
        head = [self.head_path()] if self.bayesian_head else []
        # The only place where the network's weights become Pyro parameters.
        kind = {"element": self.output, "like": like, "mixed": self.mixed_precision}
        return run(self.net, x, self.layers(), head, whole=whole, **kind)  # type: ignore[arg-type]

    def fixed_predictor(
        self, rows: Rows, output: Tensor, activations: Latents, latents: Latents
    ) -> Eta:
        """Linear predictor without random effects, from the network's output and activations."""
        facts, like, n = self.data_facts(), self.reference(), len(self.network_columns)
        base, spread = like.new_tensor(facts.center), facts.spreads(like)[:n]
        if rows.offset is not None:
            offset = rows.offset[:, None].expand(-1, len(facts.outcome_columns))
            base = base + pad(offset, (0, facts.predicted))
        if not self.bayesian_head:
            output = output.reshape(len(rows), -1).to(self.dtype)
            network = pad(spread * self.family.contrasts(output), (0, len(facts.columns) - n))
            base = base + network
        if not self.has_fixed_effects:
            return base
        latent = latents["fixed_effect"]
        latent = latent.squeeze(-2) if latent.dim() > 1 else latent
        common, *others = latent.split([len(self.common_terms()), *self._widths()], -1)
        weights = common.unflatten(-1, (-1, n))
        parts = [spread * (self.fixed_inputs(rows, activations) @ weights)]
        for design, weight in zip(self.designs.values(), others, strict=True):
            columns = design.columns(rows.slope_inputs(), activations).to(self.dtype)
            parts.append(columns @ weight[..., None])
        return base + (torch.cat(parts, -1) if others else parts[0])

    def _widths(self) -> list[int]:
        """Numbers of fixed effects on each parameter with a linear predictor."""
        return [len(design.names) for design in self.designs.values()]

    def fixed_design(
        self, rows: Rows, activations: Mapping[str, Tensor]
    ) -> Float[Tensor, "rows fixed_terms columns"]:
        """X, the map from the latent fixed effects to the columns of the predictor."""
        n, columns = len(self.network_columns), len(self.data_facts().columns)
        x = by_column(self.fixed_inputs(rows, activations), n)
        if n == columns:
            return x
        parts = [pad(x, (0, columns - n))]
        for place, design in enumerate(self.designs.values(), start=n):
            part = design.columns(rows.slope_inputs(), activations).to(self.dtype)
            parts.append(pad(part[..., None], (place, columns - place - 1)))
        return torch.cat(parts, 1)

    def fixed_inputs(
        self, rows: Rows, activations: Mapping[str, Tensor]
    ) -> Float[Tensor, "rows inputs"]:
        """Regressors of the latent fixed effects on the network's columns, by `common_terms`."""
        parts = [self.head_inputs(activations)] if self.bayesian_head else []
        if self.data_facts().linear_names:
            parts.append(rows.x.to(self.dtype))
        means = self.data_facts().zero_means(len(rows), self.reference())
        if means is not None:
            parts.append(means if rows.means is None else rows.means)
        if not parts:
            return self.reference().new_zeros(len(rows), 0)
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def head_inputs(self, activations: Mapping[str, Tensor]) -> Float[Tensor, "rows inputs"]:
        """Regressors of the latent fixed effects: 1 for an intercept, then the head's inputs."""
        path = self.head_path()
        hidden = activations[f"<{path}"].to(self.dtype)
        facts = self.data_facts()
        if self.linear and facts.dropped:
            hidden = hidden[:, facts.kept]
        if not self.has_intercept:
            return hidden
        return torch.cat([hidden.new_ones(len(hidden), 1), hidden], -1)
