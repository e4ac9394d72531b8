"""A report as data: sections of paragraphs, tables and pictures, which HTML and Word show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    *(
        "Block",
        "Bullets",
        "Gallery",
        "Heading",
        "Mood",
        "Pairs",
        "Paragraph",
        "Picture",
        "Pictures",
    ),
    *("Report", "Section", "Table"),
]

Mood = Literal["", "good", "warn", "bad", "small"]


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; its mood colours a verdict."""

    text: str
    mood: Mood = ""


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Pairs:
    """Names with their values, one pair a line."""

    values: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Table:
    """A table; columns of sentences, by name, may break their lines."""

    frame: pd.DataFrame
    sentences: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Picture:
    """A figure, and the words that stand for it; a wide one is scrolled on a narrow screen."""

    figure: Figure
    alt: str
    wide: bool = False


@dataclass(frozen=True, eq=False)
class Gallery:
    """Pictures side by side, as far as there is room."""

    pictures: tuple[Picture, ...]


Block = Paragraph | Heading | Bullets | Pairs | Table | Gallery


@dataclass(frozen=True, eq=False)
class Section:
    """A part of a report under its title."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, eq=False)
class Report:
    """A whole report: a title, a line below it, and sections."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of a fit for its report.

    `effects` are the expected outcomes over single variables, `fit` the predictive check and the
    residuals. `notes` say which pictures there are not, and why.
    """

    effects: tuple[Picture, ...] = ()
    fit: tuple[Picture, ...] = ()
    notes: Mapping[Literal["effects", "fit"], str] = field(default_factory=dict)
