"""A classifier of the cluster given the features, fitted to a fit's training rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from armed_pyro.inference.posterior import Posterior
from armed_pyro.networks.taps import head_path, tapped
from armed_pyro.program.model import MixedEffects

__all__ = ["Classifiers", "ClusterClassifier", "calibration_error", "train_classifier"]


STEPS, BATCH, EVERY, PATIENCE, RATE = 1500, 256, 25, 6, 0.01
HELD_OUT, BINS = 0.3, 10
# Hidden units where the fit's own network has no hidden layer to follow.
WIDTH = 32
# Features up to which they are compared themselves, beside hidden layers.
MOST_FEATURES = 100


@dataclass(frozen=True, eq=False)
class ClusterClassifier:
    r"""p(k | x) = softmax(net(x) / temperature), and where each cluster's features lie.

    Attributes
    ----------
    factor : str
        Grouping factor.
    net : torch.nn.Module
        The fit's own architecture, trained anew, with one output a cluster.
    temperature : float
        Chosen on rows that the classifier was not trained on.
    pooling : float
        Between 0 and 1: n rows of one cluster are worth 1 + (n - 1) pooling independent ones, as
        held-out rows pooled by cluster have it.
    log_prior : Float[Tensor, "clusters"]
        Logarithms of the clusters' shares of the training rows.
    centers : Float[Tensor, "clusters q"]
        Mean features of each cluster, in coordinates in which rows have unit variance within
        clusters.
    whiten : Float[Tensor, "q q"]
        What takes features to these coordinates.
    counts : Float[Tensor, "clusters"]
        Training rows of each cluster.
    report : mapping of str to float
        Of rows used for nothing else: accuracy, chance (share of the largest cluster), log_loss,
        ece (expected calibration error) and ece_before (at temperature 1), and their number.

    Examples
    --------
    ``fit.classifier("site").report["ece"]``

    References
    ----------
    Guo, Pleiss, Sun, Weinberger (2017), "On calibration of modern neural networks", ICML.
    """

    factor: str
    net: nn.Module
    temperature: float
    pooling: float
    log_prior: Float[Tensor, " clusters"]
    centers: Float[Tensor, "clusters q"]
    whiten: Float[Tensor, "q q"]
    counts: Float[Tensor, " clusters"]
    report: Mapping[str, float]

    @torch.no_grad()
    def log_prob(self, x: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows clusters"]:
        """log p(k | x) of standardised features."""
        pieces = [
            torch.log_softmax(self.net(part).flatten(1) / self.temperature, -1)
            for part in x.split(4096)
        ]
        return torch.cat(pieces).double()

    @torch.no_grad()
    def position(self, x: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows q"]:
        """Features in the coordinates of `centers`."""
        pieces = [_coordinates(self.net, part) for part in x.split(4096)]
        return torch.cat(pieces) @ self.whiten

    def tensors(self) -> dict[str, Tensor]:
        """All that is trained, by name; `restore` takes it back."""
        own = {name: getattr(self, name) for name in ("log_prior", "centers", "whiten", "counts")}
        return own | {f"net.{name}": one for name, one in self.net.state_dict().items()}

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
        """The classifier with these `tensors`."""
        net = _architecture(model, len(tensors["log_prior"]))
        start = "net."
        own = {name[len(start) :]: one for name, one in tensors.items() if name.startswith(start)}
        net.load_state_dict(own)
        names = ("log_prior", "centers", "whiten", "counts")
        log_prior, centers, whiten, counts = (tensors[name] for name in names)
        settings = factor, net.eval(), temperature, pooling
        return cls(*settings, log_prior, centers, whiten, counts, dict(report))


class Classifiers(Mapping[str, ClusterClassifier]):
    """Trained classifiers by factor; `of` trains those that are still missing.

    Parameters
    ----------
    trained : mapping of str to ClusterClassifier, optional
        Those of a saved fit.

    Examples
    --------
    >>> len(Classifiers())
    0
    """

    def __init__(self, trained: Mapping[str, ClusterClassifier] | None = None) -> None:
        self._trained = dict(trained or {})

    def __getitem__(self, factor: str) -> ClusterClassifier:
        return self._trained[factor]

    def __iter__(self) -> Iterator[str]:
        return iter(self._trained)

    def __len__(self) -> int:
        return len(self._trained)

    def of(self, posterior: Posterior, factor: str) -> ClusterClassifier:
        """The classifier of a factor's clusters; it is trained when it is first asked for."""
        if factor not in self._trained:
            self._trained[factor] = train_classifier(posterior, factor)
        return self._trained[factor]


def train_classifier(posterior: Posterior, factor: str) -> ClusterClassifier:
    """Train p(k | x) on most of the training rows; stop, calibrate and judge by the others.

    Raises
    ------
    ValueError
        If the factor has no random effects, there are no features, or the fit was kept without its
        training rows.
    """
    model, data = posterior.model, posterior.data
    facts = model.data_facts()
    if factor not in facts.levels:
        raise ValueError(f"there is no grouping factor {factor!r}: {', '.join(facts.levels)}")
    if not data.n_rows:
        raise ValueError(
            "the modes 'membership' and 'nearest' need a classifier of the clusters, and the fit "
            "holds neither one nor the training rows to train it on: fit the model again, call "
            f"fit.classifier({factor!r}) and save it, or choose 'marginal'"
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
    source, like = model.encode(data), model.reference()
    x, codes = source.x, source.codes[factor]
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
        position = torch.cat([_coordinates(net, part) for part in x.split(4096)])
        sums = position.new_zeros(len(shares), position.shape[1]).index_add(0, codes, position)
        centers = sums / shares[:, None]
        residual = position - centers[codes]
        freedom = max(1, len(x) - len(shares))
        within = residual.mT @ residual / freedom
        # Features that do not vary within clusters would otherwise be infinitely far apart.
        ridge = 1e-3 * position.var(0).clamp(min=1e-6) if len(x) > 1 else torch.ones(())
        root = torch.linalg.cholesky(within + torch.diag(ridge.expand(len(within))))
        whiten = torch.linalg.inv(root).mT.contiguous()
        log_prior = (shares / shares.sum()).double().log()
        ratio = torch.log_softmax(logits / temperature, -1) - log_prior
        pooling = _pooling(ratio, codes[tune], log_prior)
    settings = factor, net, temperature, pooling
    return ClusterClassifier(*settings, log_prior, centers @ whiten, whiten, shares, report)


def calibration_error(
    probability: Float[np.ndarray, "rows clusters"], codes: Int[np.ndarray, " rows"]
) -> float:
    """Expected calibration error: mean over bins of abs(share right - mean top probability).

    Bins hold equally many rows each.

    Examples
    --------
    >>> calibration_error(np.array([[0.5, 0.5], [0.5, 0.5]]), np.array([0, 1]))
    0.0
    """
    top = probability.max(1)
    right = probability.argmax(1) == codes
    order = np.argsort(top, kind="stable")
    bins = np.array_split(order, max(1, min(BINS, len(order) // 10)))
    gaps = [len(one) * abs(float(right[one].mean() - top[one].mean())) for one in bins if len(one)]
    return sum(gaps) / max(1, len(top))


def _architecture(model: MixedEffects, clusters: int) -> nn.Module:
    """The network's own layers, drawn anew, with one output a cluster; in its precision."""
    facts, like = model.data_facts(), model.reference()
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
        pass  # a network that does more with its last layer than give its output
    width = math.prod(facts.feature_shape)
    layers = [nn.Flatten(), nn.Linear(width, WIDTH), nn.ReLU(), nn.Linear(WIDTH, clusters)]
    return nn.Sequential(*layers).to(like)


def _coordinates(net: nn.Module, x: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows q"]:
    """What the classifier's last layer reads, and the features where they are few.

    Hidden layers tell clusters apart whose mean features are the same; the features show a shift
    that no hidden layer was trained to see.
    """
    path = head_path(net)
    with tapped(net, (), [path]) as record:
        net(x)
    hidden = record[f"<{path}"].flatten(1)
    few = x.dim() == 2 and x.shape[1] <= MOST_FEATURES
    return torch.cat([x, hidden], 1) if few else hidden


def _parts(codes: Int[Tensor, " rows"], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to train on, to stop and calibrate by, and to judge by; by cluster."""
    rng = np.random.default_rng([seed, 11])
    order = rng.permutation(len(codes))
    order = order[np.argsort(codes.cpu().numpy()[order], kind="stable")]
    place = (np.arange(len(order)) + rng.random()) * HELD_OUT
    held = np.diff(np.floor(place), append=math.floor(place[-1])) > 0
    # Alternately, so that both sets have rows of every cluster that is large enough.
    which = np.cumsum(held) % 2

    def rows(chosen: Bool[np.ndarray, " rows"]) -> Tensor:
        # Very few rows serve for everything.
        return torch.as_tensor(np.sort(order[chosen] if chosen.any() else order)).to(codes)

    return rows(~held), rows(held & (which == 0)), rows(held & (which == 1))


def _train(net: nn.Module, x: Tensor, codes: Tensor, x_held: Tensor, codes_held: Tensor) -> None:
    """Adam on the log-loss, back to the state in which the held-out rows' was least."""
    optimizer = torch.optim.Adam(net.parameters(), RATE, weight_decay=1e-4)
    best, state, waited = math.inf, copy.deepcopy(net.state_dict()), 0
    for step in range(1, STEPS + 1):
        net.train()
        some = slice(None) if len(x) <= BATCH else torch.randint(len(x), (BATCH,))
        loss = nn.functional.cross_entropy(net(x[some]).flatten(1), codes[some])
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


def _temperature(logits: Float[Tensor, "rows clusters"], codes: Int[Tensor, " rows"]) -> float:
    """The temperature with the least log-loss."""

    def loss(log_temperature: float) -> float:
        return float(nn.functional.cross_entropy(logits / math.exp(log_temperature), codes))

    return math.exp(minimize_scalar(loss, bounds=(-3.0, 4.0), method="bounded").x)


def _pooling(
    log_ratio: Float[Tensor, "rows clusters"],
    codes: Int[Tensor, " rows"],
    log_prior: Float[Tensor, " clusters"],
) -> float:
    """What makes the evidence of each cluster's rows together least surprised by that cluster.

    Small errors that all rows of a cluster share add up; without it, pooled evidence would be sure
    of a cluster even where features say nothing.
    """
    present, place = torch.unique(codes, return_inverse=True)
    sums = log_ratio.new_zeros(len(present), log_ratio.shape[1]).index_add(0, place, log_ratio)
    counts = torch.bincount(place).to(sums)[:, None]

    def loss(pooling: float) -> float:
        logits = log_prior + sums * (1 + (counts - 1) * pooling) / counts
        return float(nn.functional.cross_entropy(logits, present))

    found = float(minimize_scalar(loss, bounds=(0.0, 1.0), method="bounded").x)
    return min((0.0, found, 1.0), key=loss)


def _report(
    logits: Float[Tensor, "rows clusters"], codes: Int[Tensor, " rows"], temperature: float
) -> dict[str, float]:
    truth = codes.cpu().numpy()
    before, after = (torch.softmax(logits / t, -1).cpu().numpy() for t in (1.0, temperature))
    return {
        "rows": float(len(truth)),
        "accuracy": float((after.argmax(1) == truth).mean()),
        "log_loss": float(nn.functional.cross_entropy(logits / temperature, codes)),
        "ece": calibration_error(after, truth),
        "ece_before": calibration_error(before, truth),
    }
