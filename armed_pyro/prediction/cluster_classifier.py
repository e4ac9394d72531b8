"""Classifier of the cluster given the features, trained on the training rows of a fit."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from armed_pyro.inference.posterior import Posterior
from armed_pyro.networks.taps import head_path, run
from armed_pyro.program.model import MixedEffects

__all__ = ["Classifiers", "ClusterClassifier", "calibration_error", "train_classifier"]

STEPS, BATCH, RATE = 1500, 256, 0.01
# Training stops once the held-out loss has not fallen in PATIENCE checks, one every EVERY steps.
EVERY, PATIENCE = 25, 6
# Share of the rows held out, and bins of the calibration error.
HELD_OUT, BINS = 0.3, 10
# Hidden units of the classifier if the architecture of the fit cannot be reused.
WIDTH = 32
Logits = Float[Tensor, "rows clusters"]
Codes = Int[Tensor, " rows"]
# With more features than this, only hidden activations are compared and not the features too.
MOST_FEATURES = 100
# The tensors of a classifier that are not weights of its network.
STATISTICS = ("log_prior", "centers", "whiten", "counts")


@dataclass(frozen=True, eq=False)
class ClusterClassifier:
    r"""p(k | x) = softmax(net(x) / temperature), and the centre of each cluster's features.

    n rows of one cluster count as 1 + (n - 1) `pooling` independent rows, with pooling between 0
    and 1. Temperature and pooling are chosen on rows that the network was not trained on (Guo,
    Pleiss, Sun, Weinberger 2017, "On calibration of modern neural networks", ICML).

    `report` has scores on rows used for nothing else: rows (their number), accuracy, chance (share
    of the largest cluster), log_loss, ece (expected calibration error) and ece_before (the same at
    temperature 1).
    """

    factor: str
    net: nn.Module  # the fit's architecture, trained anew, with one output per cluster
    temperature: float
    pooling: float
    log_prior: Float[Tensor, " clusters"]  # logarithms of their shares of the training rows
    centers: Float[Tensor, "clusters q"]  # mean features, with unit variance within clusters
    whiten: Float[Tensor, "q q"]  # matrix that transforms features to these coordinates
    counts: Float[Tensor, " clusters"]  # number of training rows
    report: Mapping[str, float]

    @torch.no_grad()
    def log_prob(self, x: Float[Tensor, "rows ..."]) -> Logits:
        """Return log p(k | x) of standardised features."""
        logits, _ = run(self.net, x.to(next(self.net.parameters()).dtype))
        return torch.log_softmax(logits.flatten(1) / self.temperature, -1).double()

    @torch.no_grad()
    def position(self, x: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows q"]:
        """Features in the coordinates of `centers`."""
        return _coordinates(self.net, x.to(self.whiten.dtype)) @ self.whiten

    def tensors(self) -> dict[str, Tensor]:
        """All trained tensors by name, from which `restore` makes the classifier again."""
        weights = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        return {name: getattr(self, name) for name in STATISTICS} | weights

    @classmethod
    def restore(
        cls,
        model: MixedEffects,
        factor: str,
        temperature: float,
        pooling: float,
        report: Mapping[str, float],
        tensors: Mapping[str, Tensor],
    ) -> ClusterClassifier:
        """The classifier with the tensors that `tensors` returned."""
        net = _architecture(model, len(tensors["log_prior"]))
        weights = {k.removeprefix("net."): v for k, v in tensors.items() if k not in STATISTICS}
        net.load_state_dict(weights)
        statistics = {name: tensors[name] for name in STATISTICS}
        return cls(factor, net.eval(), temperature, pooling, **statistics, report=dict(report))


class Classifiers(dict[str, ClusterClassifier]):
    """Trained classifiers by factor; `of` trains a missing one."""

    def of(self, posterior: Posterior, factor: str) -> ClusterClassifier:
        """The classifier of a factor's clusters, trained at the first call."""
        if factor not in self:
            self[factor] = train_classifier(posterior, factor)
        return self[factor]


def train_classifier(posterior: Posterior, factor: str) -> ClusterClassifier:
    """Train p(k | x) on 70% of the training rows; stop, calibrate and score it on the others.

    ValueError if there is no such factor, there are no features, or the fit holds no training rows
    or only a sample of them.
    """
    model, data = posterior.model, posterior.data
    facts = model.data_facts()
    if factor not in facts.levels:
        raise ValueError(f"there is no grouping factor {factor!r}: {', '.join(facts.levels)}")
    if not data.n_rows:
        raise ValueError(
            "the modes 'membership' and 'nearest' need a classifier of the clusters, and the fit "
            "holds neither one nor the training rows to train it on: fit the model again, call "
            f"fit.classifier({factor!r}) and save the fit, or choose 'marginal'"
        )
    if posterior.sampled:
        raise ValueError(
            f"the modes 'membership' and 'nearest' need rows of every cluster of {factor!r}, and "
            "the fit keeps only a sample of its training rows: choose 'marginal'"
        )
    if not data.n_features:
        raise ValueError(
            "the modes 'membership' and 'nearest' compare features, and the model has none: choose "
            "'marginal'"
        )
    source, like = model.encode(data), model.network_reference()
    x, codes = source.x.to(like.dtype), source.codes[factor]
    shares = source.counts[factor].to(like)
    train, tune, judge = _parts(codes, posterior.seed)
    with model.seeded(posterior.seed + 11), torch.enable_grad():
        net = _architecture(model, len(shares))
        _train(net, x[train], codes[train], x[tune], codes[tune])
    with torch.no_grad():
        logits = net(x[tune]).flatten(1).double()
        temperature = _temperature(logits, codes[tune])
        report = _report(net(x[judge]).flatten(1).double(), codes[judge], temperature)
        report["chance"] = float(shares.max() / shares.sum())
        position = _coordinates(net, x)
        sums = position.new_zeros(len(shares), position.shape[1]).index_add(0, codes, position)
        centers = sums / shares[:, None]
        residual = position - centers[codes]
        within = residual.mT @ residual / max(1, len(x) - len(shares))
        # Without the ridge, features that do not vary within clusters have infinite distances.
        ridge = 1e-3 * position.var(0).clamp(min=1e-6) if len(x) > 1 else torch.ones(())
        root = torch.linalg.cholesky(within + torch.diag(ridge.expand(len(within))))
        whiten = torch.linalg.inv(root).mT.contiguous()
        log_prior = (shares / shares.sum()).double().log()
        ratio = torch.log_softmax(logits / temperature, -1) - log_prior
        pooling = _pooling(ratio, codes[tune], log_prior)
    statistics = log_prior, centers @ whiten, whiten, shares
    return ClusterClassifier(factor, net, temperature, pooling, *statistics, report)


def calibration_error(
    probability: Float[np.ndarray, "rows clusters"], codes: Int[np.ndarray, " rows"]
) -> float:
    """Expected calibration error: mean over bins of abs(accuracy - mean top probability).

    All bins hold the same number of rows.

    >>> calibration_error(np.array([[0.5, 0.5], [0.5, 0.5]]), np.array([0, 1]))
    0.0
    """
    top = probability.max(1)
    right = probability.argmax(1) == codes
    bins = np.array_split(np.argsort(top, kind="stable"), max(1, min(BINS, len(top) // 10)))
    gaps = [len(rows) * abs(float(right[rows].mean() - top[rows].mean())) for rows in bins]
    return sum(gaps) / len(top)


def _architecture(model: MixedEffects, clusters: int) -> nn.Module:
    """The layers of the fit's network with new initial weights and one output per cluster.

    Falls back to a small network with one hidden layer if the last layer's output is not the
    network's output, or if it has a fixed width.
    """
    facts, like = model.data_facts(), model.network_reference()
    probe = torch.zeros(2, *facts.feature_shape).to(like)
    try:
        net = copy.deepcopy(model.network)
        path = head_path(net)
        head = net.get_submodule(path)
        if path:
            parent, _, name = path.rpartition(".")
            setattr(net.get_submodule(parent), name, nn.Linear(int(head.in_features), clusters))  # type: ignore[arg-type]
            for module in net.modules():
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
            net.to(like).eval().requires_grad_(True)
            with torch.no_grad():
                fits = net(probe).flatten(1).shape[1] == clusters
            if fits:
                return net
    except (ValueError, RuntimeError):
        pass  # the last layer's output is not the network's output, or has a fixed width
    width = math.prod(facts.feature_shape)
    layers = [nn.Flatten(), nn.Linear(width, WIDTH), nn.ReLU(), nn.Linear(WIDTH, clusters)]
    return nn.Sequential(*layers).to(like)


def _coordinates(net: nn.Module, x: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows q"]:
    """Input of the classifier's last layer, preceded by the features if they are few.

    Hidden layers tell apart clusters whose mean features are the same. The features show shifts
    that no hidden layer was trained to detect.
    """
    path = head_path(net)
    _, record = run(net, x, (), [path])
    hidden = record[f"<{path}"].flatten(1)
    few = x.dim() == 2 and x.shape[1] <= MOST_FEATURES
    return torch.cat([x, hidden], 1) if few else hidden


def _parts(codes: Codes, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows for training, for stopping and calibration, and for scores; stratified by cluster."""
    rng = np.random.default_rng([seed, 11])
    order = rng.permutation(len(codes))
    order = order[np.argsort(codes.cpu().numpy()[order], kind="stable")]
    place = (np.arange(len(order)) + rng.random()) * HELD_OUT
    held = np.diff(np.floor(place), append=math.floor(place[-1])) > 0
    # The two held-out sets take turns, so that both have rows of every sufficiently large cluster.
    turn = np.cumsum(held) % 2

    def rows(chosen: Bool[np.ndarray, " rows"]) -> Tensor:
        # With very few rows a set would be empty; it then holds all rows.
        return torch.as_tensor(np.sort(order[chosen] if chosen.any() else order)).to(codes)

    return rows(~held), rows(held & (turn == 0)), rows(held & (turn == 1))


def _train(net: nn.Module, x: Tensor, codes: Tensor, x_held: Tensor, codes_held: Tensor) -> None:
    """Minimise the log-loss by Adam, and keep the weights with the lowest held-out loss."""
    optimizer = torch.optim.Adam(net.parameters(), RATE, weight_decay=1e-4)
    best, state, waited = math.inf, copy.deepcopy(net.state_dict()), 0
    for step in range(1, STEPS + 1):
        net.train()
        batch = slice(None) if len(x) <= BATCH else torch.randint(len(x), (BATCH,))
        loss = nn.functional.cross_entropy(net(x[batch]).flatten(1), codes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % EVERY == 0:
            net.eval()
            with torch.no_grad():
                held = float(nn.functional.cross_entropy(net(x_held).flatten(1), codes_held))
            waited += 1
            if held < best - 1e-4:
                best, state, waited = held, copy.deepcopy(net.state_dict()), 0
            if waited >= PATIENCE:
                break
    net.load_state_dict(state)
    net.eval().requires_grad_(False)


def _temperature(logits: Logits, codes: Codes) -> float:
    """The temperature with the lowest log-loss."""

    def loss(log_temperature: float) -> float:
        return float(nn.functional.cross_entropy(logits / math.exp(log_temperature), codes))

    return math.exp(scipy.optimize.minimize_scalar(loss, bounds=(-3.0, 4.0), method="bounded").x)


def _pooling(log_ratio: Logits, codes: Codes, log_prior: Float[Tensor, " clusters"]) -> float:
    """The pooling with the lowest log-loss of each cluster given the sum of its rows' evidence.

    Small errors that all rows of a cluster share add up. Without pooling, the sum would be certain
    of a cluster even if the features carry no information.
    """
    present, place = torch.unique(codes, return_inverse=True)
    sums = log_ratio.new_zeros(len(present), log_ratio.shape[1]).index_add(0, place, log_ratio)
    counts = torch.bincount(place).to(sums)[:, None]

    def loss(pooling: float) -> float:
        logits = log_prior + sums * (1 + (counts - 1) * pooling) / counts
        return float(nn.functional.cross_entropy(logits, present))

    inner = float(scipy.optimize.minimize_scalar(loss, bounds=(0.0, 1.0), method="bounded").x)
    return min((0.0, inner, 1.0), key=loss)


def _report(logits: Logits, codes: Codes, temperature: float) -> dict[str, float]:
    truth = codes.cpu().numpy()
    before, after = (torch.softmax(logits / t, -1).cpu().numpy() for t in (1.0, temperature))
    return {
        "rows": float(len(truth)),
        "accuracy": float((after.argmax(1) == truth).mean()),
        "log_loss": float(nn.functional.cross_entropy(logits / temperature, codes)),
        "ece": calibration_error(after, truth),
        "ece_before": calibration_error(before, truth),
    }
