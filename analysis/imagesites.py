"""Images by site: a file of the user's, or real digits seen through sites of known effects.

The stand-in takes scikit-learn's real 8x8 images of digits, upsampled. Every image is used once. A
site changes contrast, brightness and blur of its images, lights them from one side, and sees one
class more often than another: a network that reads the site off an image knows something of the
label that does not hold elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits

from armed_pyro import ClusteredData
from armed_pyro._messages import unknown
from armed_pyro.fitting import Fit

__all__ = [
    "SiteEffects",
    "Study",
    "digit_study",
    "file_study",
    "read_images",
    "recovered_appearance",
    "recovered_shifts",
]

# Sd of the pixels' noise; grey levels lie between 0 and 1.
NOISE = 0.05
SHARE_VALIDATION = 0.25


@dataclass(frozen=True)
class SiteEffects:
    """What the sites do to their images and labels; one row a site.

    An image z becomes ``(1 + contrast) blur(z) (1 + light w) + brightness`` plus noise, with w
    from -1 on the left to 1 on the right.

    Attributes
    ----------
    table : pandas.DataFrame
        Indexed by site, with the columns contrast, brightness, blur (sd of a Gaussian, in pixels
        of the 8x8 original), light, and shift: the logit of the share of class 1.
    """

    table: pd.DataFrame


@dataclass(frozen=True)
class Study:
    """Rows for training, validation rows of the same sites, and rows of sites never seen.

    Attributes
    ----------
    factor : str
        The grouping factor.
    train, validation, unseen : ClusteredData
        Images "rows channels height width" and labels.
    effects : SiteEffects or None
        The truth, where it is known.
    """

    factor: str
    train: ClusteredData
    validation: ClusteredData
    unseen: ClusteredData
    effects: SiteEffects | None = None

    @property
    def image(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        channels, height, width = self.train.features.shape[1:]
        return int(channels), int(height), int(width)


def digit_study(
    positive: Sequence[int],
    *,
    factor: str = "site",
    seen: int = 12,
    unseen: int = 6,
    rows: int = 80,
    size: int = 32,
    contrast: float = 0.3,
    brightness: float = 0.15,
    blur: float = 0.0,
    light: float = 0.0,
    shift: float = 1.0,
    grain: float = 0.0,
    seed: int = 0,
) -> Study:
    """Digits in sites of known effects; class 1 are the digits of `positive`.

    Parameters
    ----------
    positive : sequence of int
        Digits of class 1, about half of the ten.
    factor : str
        Name of the grouping factor.
    seen, unseen, rows : int
        Sites of either kind, and images in each.
    size : int
        Height and width of the images.
    contrast, brightness, light, shift : float
        Sds of the effects over sites.
    blur : float
        Largest blur; sites' are evenly distributed from 0.
    grain : float
        Sd of noise on the 8x8 originals, which makes digits hard to tell apart for anyone: at 0.5
        a conventional network's AUROC is about 0.8, as on the paper's images.
    seed : int
        Seed of sites and images.

    Raises
    ------
    ValueError
        If more images are asked for than there are.
    """
    digits = load_digits()
    label = np.isin(digits.target, list(positive)).astype(int)
    n_sites = seen + unseen
    if n_sites * rows > len(label):
        raise ValueError(
            f"{n_sites} sites of {rows} images need {n_sites * rows} of them, but there are "
            f"{len(label)} digits, each used once: ask for fewer sites or rows"
        )
    rng = np.random.default_rng(seed)
    effects = pd.DataFrame(
        {
            "contrast": np.maximum(contrast * rng.normal(size=n_sites), -0.8),
            "brightness": brightness * rng.normal(size=n_sites),
            "blur": blur * rng.permutation((np.arange(n_sites) + 0.5) / n_sites),
            "light": light * rng.normal(size=n_sites),
            "shift": np.clip(shift * _centred(rng.normal(size=n_sites), seen), -2.5, 2.5),
        },
        index=pd.Index([f"{factor}{k + 1:02d}" for k in range(n_sites)], name=factor),
    )
    chosen, site = _shares(label, effects["shift"].to_numpy(), rows, rng)
    effects["shift"] = [_logit(label[chosen[site == k]]) for k in range(n_sites)]
    originals = digits.images[chosen] / 16
    originals = originals + grain * rng.normal(size=originals.shape)
    images = _seen_through(originals, effects.iloc[site], size, rng)
    data = ClusteredData.from_arrays(
        images[:, None],
        label[chosen].astype(float),
        {factor: effects.index.to_numpy()[site]},
        outcome_name="label",
    )
    new = effects.index[seen:].to_numpy()
    return _split(data, factor, new, seed, SiteEffects(effects))


def file_study(
    path: str | Path, *, factor: str, unseen: Sequence[str] | float = 1 / 3, seed: int = 0
) -> Study:
    """A user's images, with whole sites held out.

    Parameters
    ----------
    path : path
        The file; see `read_images`.
    factor : str
        Grouping factor, as in the file's array ``<factor>s``.
    unseen : sequence of str, or float
        Sites to hold out, or their share.
    """
    data = read_images(path, factor=factor)
    levels = data.grouping(factor).levels
    if isinstance(unseen, float):
        count = max(1, round(unseen * len(levels)))
        held = levels[np.random.default_rng(seed).permutation(len(levels))[:count]].to_numpy()
    else:
        for label in unseen:
            if label not in levels.astype(str):
                raise unknown(f"{factor} called", label, levels)
        held = levels[levels.astype(str).isin(list(unseen))].to_numpy()
    return _split(data, factor, held, seed, None)


def read_images(path: str | Path, *, factor: str) -> ClusteredData:
    """Images, labels and sites from an .npz file.

    The file holds the arrays

    - ``images``: numbers of shape "rows height width" or "rows channels height width";
    - ``labels``: 0 and 1, or two texts, of shape "rows";
    - ``<factor>s`` (``sites``, ``batches``): text or whole numbers of shape "rows".

    ``numpy.savez_compressed("scans.npz", images=..., labels=..., sites=...)`` writes one. Object
    arrays are not read, as that could execute code.

    Raises
    ------
    ValueError
        If the file is no .npz file, an array is missing, or shapes or values are wrong; the
        message says which and what was expected.
    """
    path, name = Path(path), "batches" if factor == "batch" else f"{factor}s"
    if not path.is_file():
        raise ValueError(f"there is no file {path}: expected an .npz file of images")
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it holds a single array")
        with file:
            arrays: dict[str, Any] = {key: file[key] for key in file.files}
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as an .npz file of numbers and text ({error}): write it with "
            f"numpy.savez(path, images=..., labels=..., {name}=...), text as type str, not object"
        ) from error
    for key in ("images", "labels", name):
        if key not in arrays:
            raise ValueError(f"{path} has no array {key!r}; it has {', '.join(arrays) or 'none'}")
    images, labels, sites = arrays["images"], arrays["labels"], arrays[name]
    if images.ndim not in (3, 4) or images.dtype.kind not in "fiu":
        raise ValueError(
            f"'images' in {path} must be numbers of shape (rows, height, width) or (rows, "
            f"channels, height, width), not {images.dtype} of shape {images.shape}"
        )
    for key, one in (("labels", labels), (name, sites)):
        if one.shape != (len(images),):
            raise ValueError(
                f"{key!r} in {path} must have the shape ({len(images)},), one value an image, not "
                f"{one.shape}"
            )
    found = np.unique(labels)
    if len(found) != 2:
        raise ValueError(f"'labels' in {path} must have two values, not {found[:5].tolist()}")
    values = images if images.ndim == 4 else images[:, None]
    scale = 255 if images.dtype == np.uint8 else 1
    return ClusteredData.from_arrays(
        (values / scale).astype("float32"),
        labels if labels.dtype.kind in "US" else (labels == found[1]).astype(float),
        {factor: sites},
        outcome_name="label",
    )


def recovered_shifts(fit: Fit, study: Study, *, draws: int = 200) -> pd.Series:
    """Every seen site's mean shift of the logit by its random effects, posterior mean."""
    model = fit.model
    rows = model.encode(study.train).all()
    latents = fit.draws(draws)
    with torch.no_grad():
        whole = model.predictor(rows, latents).eta[..., 0]
        fixed = model.predictor(rows, {}).eta[..., 0]
    added = pd.Series((whole - fixed).reshape(-1, len(rows)).mean(0).cpu().numpy())
    return added.groupby(study.train.grouping(study.factor).labels()).mean()


def recovered_appearance(
    fit: Fit, study: Study, *, images: int = 40, draws: int = 50
) -> pd.DataFrame:
    """What each seen site's effects make of the same images: their contrast, brightness, light.

    Returns
    -------
    pandas.DataFrame
        Indexed by site, like `SiteEffects.table`: the ratio of the rebuilt images' sd to their
        mean over sites, less 1; the difference of their means; the slope from left to right
        relative to the mean.
    """
    data, sites = study.train.take(slice(0, images)), study.train.grouping(study.factor).levels
    records = []
    for site in sites:
        rows = ClusteredData.from_arrays(
            data.features, None, {study.factor: [site] * len(data)}, outcome_name="label"
        )
        rebuilt = fit.predict(rows, draws=draws).others["image"].mean
        across = np.linspace(-1, 1, rebuilt.shape[-1])
        light = (rebuilt.mean((0, 1, 2)) * across).mean() / (across**2).mean()
        means = {"contrast": rebuilt.std((1, 2, 3)).mean(), "brightness": rebuilt.mean()}
        records.append(means | {"light": light / rebuilt.mean()})
    table = pd.DataFrame(records, index=pd.Index(sites, name=study.factor))
    table["contrast"] = table["contrast"] / table["contrast"].mean() - 1
    table["brightness"] -= table["brightness"].mean()
    return table


def _centred(values: np.ndarray, seen: int) -> np.ndarray:
    """Values with mean 0 among the seen sites, and among the others."""
    parts = (values[:seen], values[seen:])
    return np.concatenate([one - one.mean() if len(one) else one for one in parts])


def _shares(
    label: Int[np.ndarray, " images"], shift: np.ndarray, rows: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """Which image goes where, so that a site's share of class 1 has this logit."""
    pools = [list(rng.permutation(np.flatnonzero(label == c))) for c in (0, 1)]
    chosen: list[int] = []
    for one in shift:
        wanted = round(rows / (1 + np.exp(-one)))
        # As many as there are left of either class.
        ones = int(np.clip(wanted, rows - len(pools[0]), len(pools[1])))
        chosen += [pools[1].pop() for _ in range(ones)]
        chosen += [pools[0].pop() for _ in range(rows - ones)]
    return np.array(chosen), np.repeat(np.arange(len(shift)), rows)


def _seen_through(
    originals: Float[np.ndarray, "rows 8 8"],
    effects: pd.DataFrame,
    size: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "rows size size"]:
    blurred = [
        gaussian_filter(image, sigma) if sigma else image
        for image, sigma in zip(originals, effects["blur"], strict=True)
    ]
    small = torch.tensor(np.stack(blurred))[:, None]
    large = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear")
    columns = {name: effects[name].to_numpy()[:, None, None] for name in effects}
    across = np.linspace(-1, 1, size)[None, None]
    lit = (1 + columns["contrast"]) * large[:, 0].numpy() * (1 + columns["light"] * across)
    noise = NOISE * rng.normal(size=lit.shape)
    return (lit + columns["brightness"] + noise).astype("float32")


def _split(
    data: ClusteredData, factor: str, unseen: Any, seed: int, effects: SiteEffects | None
) -> Study:
    rest, new = data.hold_out_clusters(factor, labels=unseen)
    train, validation = rest.split_rows(SHARE_VALIDATION, seed=seed)
    return Study(factor, train, validation, new, effects)


def _logit(label: np.ndarray) -> float:
    share = (label.sum() + 0.5) / (len(label) + 1)
    return float(np.log(share / (1 - share)))
