"""The models that are compared: one interface, and those that are programs around one network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import nn

from armed_pyro import Adversary, ClusteredData, MixedEffects, Schedule, Slopes, fit
from armed_pyro.analysis.architectures import Architecture
from armed_pyro.data.grouping import Grouping
from armed_pyro.prediction.chunks import predict_chunks
from armed_pyro.prediction.sources import effect_source
from armed_pyro.program.data_spec import Facts
from armed_pyro.random_effects.terms import Term

__all__ = [
    "DRAWS",
    "Program",
    "Rival",
    "Setting",
    "Trained",
    "cluster_shifts",
    "feature_use",
    "outcomes",
    "programs",
    "shuffled",
]

# Of probabilities; and of images rebuilt, for each of which the decoder runs.
DRAWS, IMAGE_DRAWS = 200, 20


@dataclass(frozen=True)
class Setting:
    """Network, outcome and training that all models share.

    Attributes
    ----------
    name, title : str
        In files, and in tables and figures.
    architecture : Architecture
        The network.
    schedule : Schedule
        Length and rates.
    factor : str
        Grouping factor.
    family : str
        Of the outcome.
    slopes : bool
        Whether random effects include slopes on the penultimate layer beside the intercept.
    adversary_weight, fixed_weight : float
        lambda_A, of the models with an adversary; lambda_F, of those with random effects.
    unseen : str
        Mode in which programs with random effects predict clusters not seen in training.
    """

    name: str
    title: str
    architecture: Architecture
    schedule: Schedule
    factor: str = "site"
    family: str = "bernoulli"
    slopes: bool = True
    adversary_weight: float = 0.1
    fixed_weight: float = 1.0
    unseen: str = "marginal"

    def network(self, feature_shape: Sequence[int], seed: int) -> nn.Module:
        """The network with weights drawn from this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.architecture.build(feature_shape)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model.

    Attributes
    ----------
    predict : callable
        E[y | x, cluster] of every row, P(y = 1) of a binary outcome; outcomes are not used.
        Clusters that were not in training are dealt with in the model's own way, which its
        `Rival` states.
    net : torch.nn.Module
        Fixed effects: standardised features to the linear predictor.
    data : ClusteredData
        Training rows as the network takes them.
    facts : Facts
        Their names and scales.
    steps : int
        Training steps taken.
    rebuild : callable or None
        Every row's features as the model rebuilds them; None of models that do not.
    """

    predict: Callable[[ClusteredData], Float[np.ndarray, " rows"]]
    net: nn.Module
    data: ClusteredData
    facts: Facts
    steps: int
    rebuild: Callable[[ClusteredData], Float[np.ndarray, "rows ..."]] | None = None


class Rival(ABC):
    """One of the models compared.

    Attributes
    ----------
    name : str
    setting : Setting
        What it shares with the others.
    """

    name: str
    setting: Setting

    @property
    @abstractmethod
    def clustered(self) -> bool:
        """Whether its predictions depend on a row's cluster."""

    @abstractmethod
    def train(self, data: ClusteredData, validation: ClusteredData | None, seed: int) -> Trained:
        """Train on these rows; the validation rows, if any, decide when to stop."""


@dataclass(frozen=True)
class Program(Rival):
    """A `MixedEffects` program around the setting's network.

    If the network has a decoder, the features are a second outcome. Without random effects, an
    unseen cluster is predicted as any other; where the cluster is an input, it has a 0 in every
    cluster's column. With them, it goes by the setting's mode.

    Attributes
    ----------
    random : bool
        Whether clusters have random effects: an intercept, slopes on the penultimate layer, and
        scales and biases of a decoder's filters.
    adversary : bool
        Whether an adversary reads the taps.
    cluster_input : bool
        Whether the cluster, as a row of 0 and 1, is appended to the features.

    Examples
    --------
    >>> from armed_pyro.analysis.architectures import Dense
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

        unseen = setting.unseen if self.random else None

        def predict(rows: ClusteredData) -> Float[np.ndarray, " rows"]:
            # Without the images, which would take the decoder as many runs as there are draws.
            posterior, wanted = result.posterior, taken(rows)
            source, _ = effect_source(
                posterior, wanted, unseen, draws=DRAWS, classifiers=result.classifiers
            )
            parts = predict_chunks(posterior, wanted, source, draws=DRAWS, outcomes=False)
            return np.concatenate([part.mean for part in parts])

        def rebuild(rows: ClusteredData) -> Float[np.ndarray, "rows ..."]:
            made = result.predict(taken(rows), unseen=unseen, draws=IMAGE_DRAWS)
            return made.others[result.model.others[0].name].mean

        model = result.model
        steps = len(result.history.loss)
        return Trained(
            predict,
            model.network,
            result.data,
            model.data_facts(),
            steps,
            rebuild if model.others else None,
        )

    def model(self, feature_shape: Sequence[int], seed: int) -> MixedEffects:
        """The program, with the network that this seed gives."""
        setting, architecture = self.setting, self.setting.architecture
        decoder = architecture.decoder
        terms: list[str | Term] = [f"(1 | {setting.factor})"] if self.random else []
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
    >>> from armed_pyro.analysis.architectures import Dense
    >>> [one.name for one in programs(Setting("s", "small", Dense((4,)), Schedule()))][:2]
    ['conventional', 'cluster input']
    """
    return (
        Program("conventional", setting),
        Program("cluster input", setting, cluster_input=True),
        Program("domain adversarial", setting, adversary=True),
        Program("ARMED", setting, random=True, adversary=True),
        Program("without adversary", setting, random=True),
    )


def outcomes(data: ClusteredData) -> Float[np.ndarray, " rows"]:
    """The rows' outcomes; classes as 0 or 1.

    Raises
    ------
    ValueError
        If they are not known.
    """
    if data.outcome is None:
        raise ValueError("the rows have no outcome to compare predictions with")
    return data.outcome.numpy()


def feature_use(trained: Trained, names: Sequence[str]) -> dict[str, float]:
    """|d f / d x_j| at the mean input, per standard deviation of the feature.

    Parameters
    ----------
    trained : Trained
        Of which f is the network of fixed effects.
    names : sequence of str
        The features; columns that say which cluster a row is in can be left out.
    """
    like = next(trained.net.parameters())
    standardised = trained.facts.standardise(trained.data.features).to(like)
    x = standardised.mean(0, keepdim=True).requires_grad_(True)
    (gradient,) = torch.autograd.grad(trained.net.eval()(x).sum(), x)
    use = gradient[0].abs() * standardised.std(0)
    return {name: float(use[trained.data.feature_names.index(name)]) for name in names}


def cluster_shifts(trained: Trained, data: ClusteredData, factor: str) -> pd.Series:
    r"""What a cluster adds to the linear predictor of all rows, on average.

    .. math:: \hat b_k = \frac{1}{n} \sum_i logit \, p(y = 1 | x_i, k)
              - \frac{1}{n K} \sum_{i, l} logit \, p(y = 1 | x_i, l)

    the random intercept and the slopes' effect together, by predicting every row as if it were
    of every cluster.

    Parameters
    ----------
    trained : Trained
        Trained on these rows, with a binary outcome.
    data : ClusteredData
        Rows of the clusters.
    factor : str
        Grouping factor.
    """
    levels = data.grouping(factor).levels
    shifts = []
    for level in levels:
        moved = ClusteredData.from_arrays(
            data.features,
            None,
            {factor: np.full(data.n_rows, level)},
            feature_names=data.feature_names,
            outcome_name=data.outcome_name,
        )
        chance = trained.predict(moved).clip(1e-6, 1 - 1e-6)
        shifts.append(np.log(chance / (1 - chance)).mean())
    return pd.Series(np.array(shifts) - np.mean(shifts), index=levels)


def shuffled(data: ClusteredData, factor: str, levels: pd.Index, seed: int) -> ClusteredData:
    """The rows with clusters drawn at random from the levels, each equally likely."""
    labels = np.random.default_rng(seed).choice(levels.to_numpy(), data.n_rows)
    return replace(data, groupings={**data.groupings, factor: Grouping.from_labels(labels)})


def _with_clusters(data: ClusteredData, factor: str, levels: pd.Index) -> ClusteredData:
    """The rows with a column of 0 and 1 for every cluster appended to the features."""
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
