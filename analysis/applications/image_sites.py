"""Images by site: a user's file, or real digits seen through sites with known effects.

The stand-in uses each of scikit-learn's real 8x8 images of digits once, upsampled. A site changes
contrast, brightness and blur of its images, lights them from one side, and sees one class more
often than another. A network that recognises the site in an image therefore learns something about
the label that does not hold at other sites.
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

__all__ = [
    "SiteEffects",
    "Study",
    "digit_study",
    "file_study",
    "read_images",
]

# Sd of the pixels' noise; grey levels lie between 0 and 1.
NOISE = 0.05
SHARE_VALIDATION = 0.25


@dataclass(frozen=True)
class SiteEffects:
    """Effects of the sites on their images and labels.

    An image z becomes ``(1 + contrast) blur(z) (1 + light w) + brightness`` plus noise, where w
    goes from -1 on the left to 1 on the right.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per site, indexed by site, with the columns contrast, brightness, blur (sd of a
        Gaussian, in pixels of the 8x8 original), light, and shift (logit of the share of class 1).
    """

    table: pd.DataFrame


@dataclass(frozen=True)
class Study:
    """Rows for training, validation rows of the same sites, and rows of unseen sites.

    Attributes
    ----------
    factor : str
        The grouping factor.
    train, validation, unseen : ClusteredData
        Images "rows channels height width" and labels.
    effects : SiteEffects or None
        The truth, if it is known.
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
    """Digits at sites with known effects, as images of two classes.

    Parameters
    ----------
    positive : sequence of int
        Digits of class 1, about half of the ten.
    factor : str
        Name of the grouping factor.
    seen, unseen, rows : int
        Number of seen and of unseen sites, and images at each.
    size : int
        Height and width of the images.
    contrast, brightness, light, shift : float
        Sds of the effects over sites.
    blur : float
        Largest blur; the sites' blurs are evenly spread from 0 to it.
    grain : float
        Sd of noise on the 8x8 originals, which makes the classes hard to tell apart. At 0.5 the
        AUROC of a conventional network is about 0.8, as on the paper's images.
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
    seed : int
        Seed of the sites that are held out, if they are not named, and of the validation rows.

    Raises
    ------
    ValueError
        If there is no site of a name; and as `read_images` does.
    """
    data = read_images(path, factor=factor)
    levels = data.grouping(factor).levels
    if isinstance(unseen, float):
        count = max(1, round(unseen * len(levels)))
        held = levels[np.random.default_rng(seed).permutation(len(levels))[:count]].to_numpy()
    else:
        for label in unseen:
            if label not in levels.astype(str):
                listed = ", ".join(map(repr, levels.astype(str)))
                raise ValueError(f"{path} has no {factor} called {label!r}; it has {listed}")
        held = levels[levels.astype(str).isin(list(unseen))].to_numpy()
    return _split(data, factor, held, seed, None)


def read_images(path: str | Path, *, factor: str) -> ClusteredData:
    """Images, labels and sites from an .npz file.

    The file holds the arrays

    - ``images``: numbers of shape "rows height width" or "rows channels height width";
    - ``labels``: 0 and 1, or two texts, of shape "rows";
    - ``<factor>s`` (``sites``, ``batches``): text or whole numbers of shape "rows".

    ``numpy.savez_compressed("scans.npz", images=..., labels=..., sites=...)`` writes such a file.
    Object arrays are refused, because reading them could execute code.

    Raises
    ------
    ValueError
        If the file is not an .npz file, an array is missing, or shapes or values are wrong. The
        message names the array and what was expected.
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
    for key, values in (("labels", labels), (name, sites)):
        if values.shape != (len(images),):
            raise ValueError(
                f"{key!r} in {path} must have the shape ({len(images)},), one value per image, not "
                f"{values.shape}"
            )
    classes = np.unique(labels)
    if len(classes) != 2:
        raise ValueError(f"'labels' in {path} must have two values, not {classes[:5].tolist()}")
    pixels = images if images.ndim == 4 else images[:, None]
    scale = 255 if images.dtype == np.uint8 else 1
    return ClusteredData.from_arrays(
        (pixels / scale).astype("float32"),
        labels if labels.dtype.kind in "US" else (labels == classes[1]).astype(float),
        {factor: sites},
        outcome_name="label",
    )


def _centred(values: np.ndarray, seen: int) -> np.ndarray:
    """Values with mean 0 among the seen sites, and mean 0 among the others."""
    parts = (values[:seen], values[seen:])
    return np.concatenate([part - part.mean() if len(part) else part for part in parts])


def _shares(
    label: Int[np.ndarray, " images"], shift: np.ndarray, rows: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """Positions of the images and the site of each, where `shift` is the logit of class 1's share.

    A site gets a different share if too few images of a class are left.
    """
    pools = [list(rng.permutation(np.flatnonzero(label == c))) for c in (0, 1)]
    chosen: list[int] = []
    for logit in shift:
        wanted = round(rows / (1 + np.exp(-logit)))
        positive = int(np.clip(wanted, rows - len(pools[0]), len(pools[1])))
        chosen += [pools[1].pop() for _ in range(positive)]
        chosen += [pools[0].pop() for _ in range(rows - positive)]
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
