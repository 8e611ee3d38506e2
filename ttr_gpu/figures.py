"""Pictures: matplotlib without pyplot, so that a notebook's own figures stay its own, and one style for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def subplots(rows: int, columns: int, *, figsize: tuple[float, float], dpi: int, **options: Any) -> tuple[Any, Any]:
    """A figure that no display knows of, and its axes; options as of `Figure.subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, dpi=dpi, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def save(figure: Any, axes: tuple[Any, ...], path: Path) -> Path:
    """Write a figure as PNG."""
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
