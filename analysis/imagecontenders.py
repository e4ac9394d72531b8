"""The models compared, around a convolutional network, on images of several sites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from armed_pyro.analysis import ad_diagnosis
from armed_pyro.analysis.comparison import Fold, Study
from armed_pyro.analysis.rivals import Architecture, Setting
from armed_pyro.models.convolutional import convolutional

__all__ = ["Convolution", "ad_diagnosis_study"]


@dataclass(frozen=True)
class Convolution(Architecture):
    """The paper's convolutional network; see `convolutional`.

    Attributes
    ----------
    widths : tuple of int
        Filters of every block.
    units : int
        Width of the dense layer.

    Examples
    --------
    >>> Convolution((4, 8), 6).taps
    ('block1', 'block2')
    """

    widths: tuple[int, ...]
    units: int

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(f"block{number + 1}" for number in range(len(self.widths)))

    @property
    def last(self) -> str:
        return "hidden"

    def build(self, feature_shape: Sequence[int]) -> nn.Module:
        return convolutional(feature_shape, widths=self.widths, units=self.units)


def ad_diagnosis_study(seed: int, *, smoke: bool) -> Study:
    """The stand-in of `ad_diagnosis`; every fold draws its sites, and their images, anew.

    Examples
    --------
    ``next(ad_diagnosis_study(0, smoke=True).folds(2, 0)).train``
    """
    architecture = Convolution((3, 4), 6) if smoke else Convolution((8, 16, 32), 32)
    schedule = replace(ad_diagnosis.APPLICATION.schedule, steps=1500)
    setting = Setting("ad_diagnosis", "AD diagnosis (digits of 12 sites)", architecture, schedule)
    return Study("ad_diagnosis", setting, partial(_folds, seed, smoke))


def _folds(start: int, smoke: bool, n: int, seed: int) -> Iterator[Fold]:
    for number in range(n):
        images = ad_diagnosis.study(start + number, smoke)
        kept, validation = images.train.split_rows(0.2, seed=seed)
        yield Fold(number, kept, validation, images.validation, images.unseen)
