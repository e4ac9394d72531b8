"""The image applications' stand-ins, with the models that make sense of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from armed_pyro.analysis import ad_diagnosis, imagesites, melanoma
from armed_pyro.analysis.architectures import Autoencoder, Convolution
from armed_pyro.analysis.comparison import Fold, Study
from armed_pyro.analysis.rivals import Setting

__all__ = ["ad_diagnosis_study", "melanoma_study"]

# Those that take images, and those that train a decoder, too.
OF_IMAGES = (
    "conventional",
    "domain adversarial",
    "meta-learning",
    "MeNet",
    "LMMNN",
    "ARMED",
    "without adversary",
)
OF_DECODERS = ("conventional", "domain adversarial", "ARMED", "without adversary")


def ad_diagnosis_study(seed: int, *, smoke: bool) -> Study:
    """The stand-in of `ad_diagnosis`; every fold draws its sites, and their images, anew.

    Examples
    --------
    ``next(ad_diagnosis_study(0, smoke=True).folds(2, 0)).train``
    """
    architecture = Convolution((3, 4), 6) if smoke else Convolution((8, 16, 32), 32)
    schedule = replace(ad_diagnosis.APPLICATION.schedule, steps=1500)
    setting = Setting("ad_diagnosis", "AD diagnosis (digits of 12 sites)", architecture, schedule)
    folds = partial(_folds, ad_diagnosis.study, seed, smoke)
    return Study("ad_diagnosis", setting, folds, OF_IMAGES)


def melanoma_study(seed: int, *, smoke: bool) -> Study:
    """The stand-in of `melanoma`; every fold draws its batches, and their images, anew.

    Examples
    --------
    ``next(melanoma_study(0, smoke=True).folds(2, 0)).train``
    """
    architecture = Autoencoder((3, 4), 4, 8) if smoke else Autoencoder((8, 16), 16, 16)
    setting = Setting(
        "melanoma",
        "Melanoma cells (digits of 12 batches)",
        architecture,
        melanoma.APPLICATION.schedule,
        factor="batch",
    )
    folds = partial(_folds, melanoma.study, seed, smoke)
    return Study("melanoma", setting, folds, OF_DECODERS)


def _folds(
    draw: Callable[[int, bool], imagesites.Study], start: int, smoke: bool, n: int, seed: int
) -> Iterator[Fold]:
    for number in range(n):
        images = draw(start + number, smoke)
        kept, validation = images.train.split_rows(0.2, seed=seed)
        yield Fold(number, kept, validation, images.validation, images.unseen, start + number)
