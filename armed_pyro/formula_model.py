"""`model`: data and program from one formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

from torch import nn

from armed_pyro.data.clustered import ClusteredData
from armed_pyro.data.columns import Missing
from armed_pyro.data.files import as_pandas
from armed_pyro.data.schema import WeightsKind
from armed_pyro.engine.schedule import Schedule
from armed_pyro.families.family import Family
from armed_pyro.families.registry import family_named
from armed_pyro.fit_result import Fit
from armed_pyro.fitting import fit
from armed_pyro.networks.adversary import Adversary
from armed_pyro.networks.by_name import hidden_activations, made_network
from armed_pyro.priors import Priors
from armed_pyro.program.between import BetweenChoice
from armed_pyro.program.model import MixedEffects
from armed_pyro.random_effects.model_formula import ModelFormula

__all__ = ["Model", "model"]

Net = str | nn.Module | Callable[..., nn.Module]


@final
@dataclass(frozen=True, eq=False)
class Model:
    """A formula with the rows and the program that it stands for; made by `model`.

    Attributes
    ----------
    formula : str
        The formula as it was given.
    data : ClusteredData
        The encoded rows.
    program : MixedEffects
        Network, random effects and family.
    seed : int
        Seed of the network's initial weights, and of fits.
    """

    formula: str
    data: ClusteredData
    program: MixedEffects
    seed: int = 0

    def fit(self, **settings: Any) -> Fit:
        """Fit the program to the rows.

        Parameters
        ----------
        **settings
            Arguments of `armed_pyro.fit`, such as ``validation`` or ``progress``, and of
            `armed_pyro.Schedule`, such as ``steps`` or ``batch_size``. `seed` is that of the model
            unless there is another.

        Returns
        -------
        Fit
            Variance components, predictions, effects, checks.

        Raises
        ------
        TypeError
            For an unknown setting.
        ValueError, DivergenceError, FitInterrupted
            As `armed_pyro.fit`.

        Examples
        --------
        ``armed_pyro.model("y ~ x + (1 | g)", table).fit(steps=500, progress=False)``
        """
        names = {member.name for member in fields(Schedule) if member.init}
        chosen = {name: settings.pop(name) for name in sorted(names & settings.keys())}
        if chosen and "schedule" in settings:
            raise TypeError(f"give either schedule=, or its parts: {', '.join(chosen)}")
        if chosen:
            settings["schedule"] = Schedule(**chosen)
        return fit(self.program, self.data, **{"seed": self.seed, **settings})

    def __repr__(self) -> str:
        rows, name = self.data.n_rows, self.program.family.name
        return f"Model({self.formula!r}, {rows} rows, family {name!r}); call .fit()"


def model(
    formula: str,
    data: Any,
    *,
    family: str | Family = "gaussian",
    priors: Priors | None = None,
    net: Net = "linear",
    adversary: str | Adversary | Sequence[Adversary] = (),
    between: BetweenChoice | None = None,
    bayesian_head: bool | None = None,
    fixed_weight: float = 0.0,
    categorical: Sequence[str] = (),
    trials: str | None = None,
    offset: str | None = None,
    weights: str | None = None,
    weights_kind: WeightsKind = "frequency",
    se: str | None = None,
    status: str | None = None,
    upper: str | None = None,
    entry: str | None = None,
    event: Any = None,
    missing: Missing = "error",
    seed: int = 0,
) -> Model:
    r"""Mixed-effects model :math:`y = f(x) + Z u` from one formula, ready to fit.

    ``y ~ x + (x | g)`` are fixed effects of x, and a random intercept and slope by g. With
    ``net="linear"`` f is linear with latent coefficients, as in lme4; with a network the fixed
    part of the formula names its inputs. docs/formulas.md describes the language.

    Parameters
    ----------
    formula : str
        ``outcome ~ features + (slopes | group)``. The outcome is a column; ``y | trials(n)``,
        ``y | weights(w)`` and ``y | se(s)`` name columns with these roles. Censored outcomes are
        ``event(time, status)`` or ``interval(lower, upper)``, with a late entry
        ``event(time, status, entry)``.
    data
        A pandas, polars or pyarrow table.
    family : str or Family
        Distribution of the outcome, as in `MixedEffects`.
    priors : Priors, optional
        Priors of all latent sites; by default weakly informative ones.
    net : str, torch.nn.Module or callable
        ``"linear"``, ``"dense"``, a network, or a class or function that is told the number of
        inputs (and of outputs, if it has two arguments) and makes one.
    adversary : str, Adversary or sequence of Adversary
        A grouping factor to keep out of all hidden layers, or adversaries with settings.
    between : {"auto", True, False}, optional
        Clusters' means of features as fixed effects, as in `MixedEffects`.
    bayesian_head : bool, optional
        Whether the last linear layer gets a posterior; by default with ``net="linear"`` only.
    fixed_weight : float
        As in `MixedEffects`.
    categorical, trials, offset, weights, weights_kind, se, status, upper, entry, event, missing
        As in `ClusteredData.from_frame`.
    seed : int
        Seed of the network's initial weights, and of `Model.fit`.

    Returns
    -------
    Model
        Its ``fit()`` returns the `Fit`; ``data`` and ``program`` are the parts.

    Raises
    ------
    ValueError
        If the formula cannot be read, a column is missing or unfit for its role, or a name is
        unknown.

    References
    ----------
    Bates, Maechler, Bolker, Walker (2015), Journal of Statistical Software 67(1), section 2.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> rng = np.random.default_rng(0)
    >>> table = pd.DataFrame({"g": np.arange(60) % 10, "x": rng.normal(size=60)})
    >>> table["y"] = table["x"] + rng.normal(size=10)[table["g"]] + rng.normal(size=60)
    >>> fitted = model("y ~ x + (1 | g)", table).fit(steps=50, progress=False)
    >>> fitted.model.terms[0].factor
    'g'
    """
    read, table, chosen = ModelFormula.read(formula), as_pandas(data), family_named(family)
    adversaries = [adversary] if isinstance(adversary, str | Adversary) else list(adversary)
    watched = [other if isinstance(other, str) else other.factor for other in adversaries]
    roles: dict[str, Any] = {"trials": trials, "weights": weights, "se": se}
    roles |= {"status": status, "upper": upper, "entry": entry}
    for role, column in read.roles.items():
        if roles[role] is not None:
            raise ValueError(
                f"{role}={roles[role]!r} stands beside {role}({column}) in the formula"
            )
        roles[role] = column
    rows = ClusteredData.from_frame(
        table,
        outcome=read.outcome,
        **read.random_columns(table.columns, *watched),
        features=read.features,
        categorical=categorical,
        offset=offset,
        weights_kind=weights_kind,
        event=event,
        missing=missing,
        **roles,
    )
    chosen.check(rows)
    linear = isinstance(net, str) and net == "linear"
    arguments = {"bias": False} if linear and not rows.intercept else {}
    sizes = rows.n_features, chosen.outputs(len(chosen.columns(rows)))
    network = made_network(net, *sizes, seed=seed, **arguments)
    program = MixedEffects(
        network,
        read.random,
        chosen,
        [_adversary(other, network) for other in adversaries],
        priors=Priors() if priors is None else priors,
        bayesian_head=linear if bayesian_head is None else bayesian_head,
        fixed_weight=fixed_weight,
        between=between,
    )
    return Model(formula, rows, program, seed)


def _adversary(adversary: str | Adversary, network: nn.Module) -> Adversary:
    """An adversary as it is, or one of a factor on all hidden layers."""
    if isinstance(adversary, Adversary):
        return adversary
    return Adversary(adversary, hidden_activations(network))
