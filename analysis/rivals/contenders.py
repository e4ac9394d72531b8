"""Every model that a comparison can have: programs around one network, and the rivals by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from sklearn.metrics import log_loss

from armed_pyro import Adversary, ClusteredData, FilterScaleBias, MixedEffects, Slopes, fit
from armed_pyro.analysis.rivals.linear_mixed import LinearMixed
from armed_pyro.analysis.rivals.lmmnn import LMMNN
from armed_pyro.analysis.rivals.menet import MeNet
from armed_pyro.analysis.rivals.meta_learning import MetaLearning
from armed_pyro.analysis.rivals.rival import Rival, Setting, Trained, outcomes

__all__ = ["NAMES", "Program", "Tuned", "contenders", "programs"]

# Posterior draws of probabilities, and of rebuilt images, which need a decoder pass per draw.
DRAWS, IMAGE_DRAWS = 200, 20
NAMES = (
    "conventional",
    "cluster input",
    "domain adversarial",
    "meta-learning",
    "MeNet",
    "LMMNN",
    "linear mixed model",
    "ARMED",
    "without adversary",
)


@dataclass(frozen=True)
class Program(Rival):
    """A `MixedEffects` program around the setting's network.

    If the network has a decoder, the features are a second outcome. With random effects, unseen
    clusters are predicted in the setting's mode. Without random effects, they are predicted like
    any other cluster; where the cluster is an input, all of its columns are 0.

    Attributes
    ----------
    random : bool
        Whether clusters have random effects: an intercept, slopes on the penultimate layer, and
        scales and biases of a decoder's filters.
    adversary : bool
        Whether an adversary reads the tapped layers.
    cluster_input : bool
        Whether the cluster is appended to the features, as columns of 0 and 1.

    Examples
    --------
    >>> from armed_pyro import Schedule
    >>> from armed_pyro.analysis.rivals.architectures import Dense
    >>> setting = Setting("s", "small", Dense((4,)), Schedule(steps=10))
    >>> [str(term) for term in Program("ARMED", setting, random=True).model((2,), seed=0).terms]
    ['(1 | site)', "Slopes('site', on='1')"]
    """

    name: str
    setting: Setting
    random: bool = False
    adversary: bool = False
    cluster_input: bool = False

    @property
    def clustered(self) -> bool:
        return self.random or self.cluster_input

    def train(self, data: ClusteredData, validation: ClusteredData | None, seed: int) -> Trained:
        setting, levels = self.setting, data.grouping(self.setting.factor).levels

        def taken(rows: ClusteredData) -> ClusteredData:
            return _with_clusters(rows, setting.factor, levels) if self.cluster_input else rows

        result = fit(
            self.model(taken(data).features.shape[1:], seed),
            taken(data),
            validation=None if validation is None else taken(validation),
            schedule=setting.schedule,
            refine=False,  # point predictions gain nothing from weighted draws
            seed=seed,
            progress=False,
        )
        model, unseen = result.model, setting.unseen if self.random else None

        def predict(rows: ClusteredData) -> Float[np.ndarray, " rows"]:
            # Rebuilding the images would take a decoder pass for each of the draws.
            return result.predict(taken(rows), unseen=unseen, draws=DRAWS, others=False).mean

        def rebuild(rows: ClusteredData) -> Float[np.ndarray, "rows ..."]:
            made = result.predict(taken(rows), unseen=unseen, draws=IMAGE_DRAWS)
            return made.others[model.others[0].name].mean

        return Trained(
            predict,
            model.network,
            result.data,
            model.data_facts().scaling.standardise,
            len(result.history.loss),
            rebuild if model.others else None,
        )

    def model(self, feature_shape: Sequence[int], seed: int) -> MixedEffects:
        """The program, around the network that this seed gives."""
        setting, architecture = self.setting, self.setting.architecture
        decoder = architecture.decoder
        terms: list[str | Slopes | FilterScaleBias] = []
        if self.random:
            terms.append(f"(1 | {setting.factor})")
        if self.random and setting.slopes:
            terms.append(Slopes(setting.factor, on=architecture.last))
        if self.random and decoder is not None:
            terms += decoder.terms(setting.factor)
        game = Adversary(setting.factor, taps=architecture.taps, weight=setting.adversary_weight)
        return MixedEffects(
            setting.network(feature_shape, seed),
            random=terms,
            family=setting.family,
            adversary=game if self.adversary else (),
            fixed_weight=setting.fixed_weight if self.random else 0.0,
            others=() if decoder is None else decoder.outcome(feature_shape),
        )


def programs(setting: Setting) -> tuple[Program, ...]:
    """The five models that are programs around one network.

    Examples
    --------
    >>> from armed_pyro import Schedule
    >>> from armed_pyro.analysis.rivals.architectures import Dense
    >>> [program.name for program in programs(Setting("s", "small", Dense((4,)), Schedule()))][:2]
    ['conventional', 'cluster input']
    """
    return (
        Program("conventional", setting),
        Program("cluster input", setting, cluster_input=True),
        Program("domain adversarial", setting, adversary=True),
        Program("ARMED", setting, random=True, adversary=True),
        Program("without adversary", setting, random=True),
    )


@dataclass(frozen=True)
class Tuned(Rival):
    """The version of a model that has the lowest loss on the validation rows.

    The loss is -log p(y) for a binary outcome, and the squared error for any other.

    Attributes
    ----------
    candidates : tuple of Rival
        Versions of the same model; the first gives the name and the setting.
    """

    candidates: tuple[Rival, ...]

    @property
    def name(self) -> str:
        """Name of the first version."""
        return self.candidates[0].name

    @property
    def setting(self) -> Setting:
        """Setting of the first version."""
        return self.candidates[0].setting

    @property
    def clustered(self) -> bool:
        return self.candidates[0].clustered

    def train(self, data: ClusteredData, validation: ClusteredData | None, seed: int) -> Trained:
        if validation is None:
            raise ValueError("tuning needs validation rows: train(data, validation, seed)")
        versions = [candidate.train(data, validation, seed) for candidate in self.candidates]
        losses = [self._loss(version, validation) for version in versions]
        return versions[int(np.argmin(losses))]

    def _loss(self, trained: Trained, rows: ClusteredData) -> float:
        y, p = outcomes(rows), trained.predict(rows)
        if self.setting.family == "bernoulli":
            return float(log_loss(y, p, labels=[0, 1]))
        return float(np.square(y - p).mean())


def contenders(setting: Setting, names: Sequence[str] = NAMES) -> tuple[Rival, ...]:
    """The models with these names, in this setting.

    Raises
    ------
    ValueError
        If there is no model with one of the names.

    Examples
    --------
    ``contenders(setting, ["conventional", "ARMED"])``
    """
    others = (MetaLearning(setting), MeNet(setting), LMMNN(setting), LinearMixed(setting))
    by_name: dict[str, Rival] = {rival.name: rival for rival in (*programs(setting), *others)}
    for name in names:
        if name not in by_name:
            listed = ", ".join(map(repr, by_name))
            raise ValueError(f"there is no model called {name!r}; the models are {listed}")
    return tuple(by_name[name] for name in names)


def _with_clusters(data: ClusteredData, factor: str, levels: pd.Index) -> ClusteredData:
    """The rows with one column of 0 and 1 per cluster appended to the features."""
    if data.features.dim() != 2:
        raise ValueError(
            f"the cluster can be an input beside a table's features only, not beside features of "
            f"shape {tuple(data.features.shape)}: leave out 'cluster input'"
        )
    labels = data.grouping(factor).labels()
    columns = (labels[:, None] == levels.to_numpy()).astype(float)
    return ClusteredData.from_arrays(
        np.hstack([data.features.numpy(), columns]),
        data.outcome,
        {factor: labels},
        feature_names=[*data.feature_names, *(f"{factor}[{level}]" for level in levels)],
        outcome_name=data.outcome_name,
    )
