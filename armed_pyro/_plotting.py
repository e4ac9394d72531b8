"""The library's colours and plain axes."""

from __future__ import annotations

from typing import Any

INK, ACCENT, FAINT = "#1f2933", "#2b6cb0", "#a0aec0"


def _clean(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=FAINT, labelcolor=INK)
