"""Meta-learning for domain generalisation: each step should also help clusters left out of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from armed_pyro import ClusteredData
from armed_pyro.analysis.rivals.descent import FixedPredictor, Rows, descend
from armed_pyro.analysis.rivals.rival import Rival, Setting, Trained

__all__ = ["MetaLearning", "meta_loss"]


@dataclass(frozen=True)
class MetaLearning(Rival):
    r"""MLDG: a gradient step on some of the clusters has to lower the loss of the others too.

    .. math:: L(\theta) = F(\theta) + \beta \, G(\theta - \alpha \nabla F(\theta))

    F is the mean loss of a batch's meta-train clusters and G that of its meta-test clusters, which
    are drawn anew in each step. The gradient passes through the inner step (second order), unless
    `second_order` is False, which treats :math:`\nabla F` as a constant.

    The trained network takes no cluster, so seen and unseen clusters are predicted alike.

    Attributes
    ----------
    inner_rate, test_weight, test_share : float
        :math:`\alpha`, :math:`\beta`, and the share of the clusters that is meta-test.
    second_order : bool

    References
    ----------
    Li, Yang, Song, Hospedales (2018), "Learning to generalize: meta-learning for domain
    generalization", AAAI, algorithm 1.

    Examples
    --------
    ``MetaLearning(setting).train(data, validation, seed=0).predict(rows)``
    """

    setting: Setting
    name: str = "meta-learning"
    inner_rate: float = 0.05
    test_weight: float = 1.0
    test_share: float = 0.3
    second_order: bool = True

    @property
    def clustered(self) -> bool:
        return False

    def train(self, data: ClusteredData, validation: ClusteredData | None, seed: int) -> Trained:
        predictor = FixedPredictor(self.setting, data, seed)
        held = None if validation is None else predictor.encode(validation)
        steps = descend(
            predictor,
            predictor.encode(data),
            lambda rows: meta_loss(predictor, rows, self),
            self.setting.schedule,
            seed,
            held=held,
            held_loss=lambda rows: predictor.loss(predictor(rows)[0], rows),
        )

        def predict(new: ClusteredData) -> Float[np.ndarray, " rows"]:
            with torch.no_grad():
                return predictor.mean(predictor(predictor.encode(new))[0])

        return Trained(predict, predictor.net, data, predictor.scaling.standardise, steps)


def meta_loss(predictor: FixedPredictor, rows: Rows, how: MetaLearning) -> Float[Tensor, ""]:
    """F + beta G: the meta-train clusters' loss, and the others' loss after a step on F.

    The meta-test clusters are drawn from torch's generator. A batch of a single cluster has its
    plain loss.

    Examples
    --------
    ``meta_loss(predictor, rows.take(index), MetaLearning(setting))``
    """
    present = torch.unique(rows.codes)
    if len(present) < 2:
        return predictor.loss(predictor(rows)[0], rows)
    n_test = min(max(1, round(how.test_share * len(present))), len(present) - 1)
    test = torch.isin(rows.codes, present[torch.randperm(len(present))[:n_test]])
    weights = dict(predictor.named_parameters())

    def losses(parameters: Mapping[str, Tensor]) -> Tensor:
        eta, _ = functional_call(predictor, dict(parameters), (rows,))
        y = predictor.target(rows)
        if predictor.binary:
            return torch.nn.functional.binary_cross_entropy_with_logits(eta, y, reduction="none")
        return 0.5 * (y - eta).square()

    train_loss = losses(weights)[~test].mean()
    gradients = torch.autograd.grad(
        train_loss, list(weights.values()), create_graph=how.second_order, retain_graph=True
    )
    moved = {
        name: weight - how.inner_rate * gradient
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    return train_loss + how.test_weight * losses(moved)[test].mean()
