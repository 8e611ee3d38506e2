"""A picture of an evaluation: calibration of the gaps and of the types' ranks, the model beside its floors."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UserError
from ..figures import save, subplots
from .evaluation import Evaluation
from .floors import Floor, lowest

_MODEL, _FLOOR = "#2171b5", "#969696"


def plot_evaluation(result: Evaluation, beside: list[Floor], path: Path) -> Path:
    """Draw to a PNG: histogram of the probability integral transform, coverage of central intervals, top-k accuracy.

    Raises UserError if the path cannot be written, or is no .png.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--plot: got {path}, expected a file name that ends in .png")
    panels = 1 if result.gaps is None else 3
    figure, axes = subplots(1, panels, figsize=(4.2 * panels, 3.6), dpi=120, squeeze=False)
    (*gap_axes, last) = axes[0]
    marginal = next((floor.gaps for floor in beside if floor.gaps is not None), None)
    if result.gaps is not None:
        histogram, coverage = gap_axes
        edges = np.linspace(0, 1, len(result.gaps.pit) + 1)
        for name, gaps, color in (("log-normal", marginal, _FLOOR), ("model", result.gaps, _MODEL)):
            if gaps is not None:
                histogram.stairs(len(gaps.pit) * np.array(gaps.pit), edges, color=color, linewidth=1.5, label=name)
                shares = [0.0, *gaps.coverage, 1.0], [0.0, *gaps.coverage.values(), 1.0]
                coverage.plot(*shares, "o-", color=color, markersize=4, label=name)
        histogram.axhline(1.0, color="black", linestyle="--", linewidth=0.8)
        histogram.set_xlabel("P(gap <= the observed one)")
        histogram.set_ylabel("density (1: calibrated)")
        histogram.set_ylim(bottom=0)
        coverage.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=0.8)
        coverage.set_xlabel("nominal share of a central interval")
        coverage.set_ylabel("gaps inside it")
        histogram.legend(frameon=False, fontsize=8)
        histogram.set_title(f"gaps: Kolmogorov-Smirnov {result.gaps.ks:.4f}", fontsize=10)
        coverage.set_title(f"gaps: {result.gaps.nll:.3f} nats", fontsize=10)
    best = lowest(beside, "type")
    for name, shares_of, color in (
        (best.name if best is not None else "", best.top_k if best is not None else None, _FLOOR),
        ("model", result.top_k, _MODEL),
    ):
        if shares_of is not None:
            last.plot(list(shares_of), list(shares_of.values()), "o-", color=color, markersize=4, label=name)
    last.set_xlabel("k")
    last.set_ylabel("right type among the k likeliest")
    last.legend(frameon=False, fontsize=8)
    last.set_title(f"types: {result.cross_entropy:.3f} nats", fontsize=10)
    try:
        return save(figure, tuple(axes[0]), path)
    except OSError as error:
        raise UserError(f"--plot: {path}: cannot be written: {error.strerror}") from None
