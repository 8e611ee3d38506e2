"""The loss plot of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .metrics import read_metrics


def plot_run(folder: Path, floor: tuple[str, float] | None = None) -> Path:
    """Draw `plots/loss.png` from a run's metrics: training loss, validation loss, a floor, and the learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records: list[dict[str, Any]] = read_metrics(folder)
    # A resumed run repeats no step, but a crash may have lost some: the last record of a step counts.
    steps = {r["step"]: r for r in records if r["kind"] == "step"}
    evaluations = {r["step"]: r for r in records if r["kind"] == "validation"}
    x = np.array(sorted(steps))
    loss = np.array([steps[s]["loss"] for s in x])
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(8, 5.5), dpi=120, sharex=True, height_ratios=[4, 1], constrained_layout=True
    )
    upper.plot(x, loss, color="#9ecae1", linewidth=0.7, label="training, each step")
    width = max(1, len(x) // 50)
    if len(x) > 2 * width:
        smooth = np.convolve(loss, np.ones(width) / width, "valid")
        upper.plot(x[width - 1 :], smooth, color="#2171b5", linewidth=1.5, label=f"training, mean of {width} steps")
    if evaluations:
        at = sorted(evaluations)
        upper.plot(at, [evaluations[s]["loss"] for s in at], "o-", color="#d94801", markersize=4, label="validation")
    if floor is not None:
        upper.axhline(floor[1], color="#636363", linestyle="--", linewidth=1, label=f"{floor[0]}: {floor[1]:.3f}")
    low = min([*np.percentile(loss, [1]), *(r["loss"] for r in evaluations.values()), floor[1] if floor else np.inf])
    upper.set_ylim(low - 0.1 * (loss[0] - low) - 1e-3, loss[0] + 0.05 * (loss[0] - low) + 1e-3)
    upper.set_ylabel("cross-entropy (nats)")
    upper.set_title(folder.name)
    upper.legend(frameon=False, fontsize=9)
    lower.plot(x, [steps[s]["lr"] for s in x], color="#31a354", linewidth=1.2)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    for axis in (upper, lower):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path = folder / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
