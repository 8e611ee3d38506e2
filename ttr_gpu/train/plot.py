"""Plots of runs: loss, gradient norm and throughput over the steps, how attention has learned to decay with age,
and the periods of time features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..figures import save, subplots
from ..model import TransformerModel
from .checkpoint import Checkpoint
from .metrics import read_metrics

_WIDTH, _DPI = 8, 120
# Points of a curve of attention's decay.
_POINTS = 200


def plot_run(folder: Path, floor: tuple[str, float] | None = None) -> Path:
    """Draw `plots/loss.png` from a run's metrics: training loss, validation loss, a floor, and the learning rate."""
    steps, evaluations = _by_step(folder, "step"), _by_step(folder, "validation")
    x = np.array(sorted(steps))
    loss = np.array([steps[s]["loss"] for s in x])
    figure, (upper, lower) = subplots(2, 1, figsize=(_WIDTH, 5.5), dpi=_DPI, sharex=True, height_ratios=[4, 1])
    upper.plot(x, loss, color="#9ecae1", linewidth=0.7, label="training, each step")
    width = max(1, len(x) // 50)
    if len(x) > 2 * width:
        upper.plot(*_smooth(x, loss), color="#2171b5", linewidth=1.5, label=f"training, mean of {width} steps")
    if evaluations:
        at = sorted(evaluations)
        upper.plot(at, [evaluations[s]["loss"] for s in at], "o-", color="#d94801", markersize=4, label="validation")
    if floor is not None:
        upper.axhline(floor[1], color="#636363", linestyle="--", linewidth=1, label=f"{floor[0]}: {floor[1]:.3f}")
    low = min([*np.percentile(loss, [1]), *(r["loss"] for r in evaluations.values()), floor[1] if floor else np.inf])
    upper.set_ylim(low - 0.1 * (loss[0] - low) - 1e-3, loss[0] + 0.05 * (loss[0] - low) + 1e-3)
    upper.set_ylabel("loss (nats)")
    upper.set_title(folder.name)
    upper.legend(frameon=False, fontsize=9)
    lower.plot(x, [steps[s]["lr"] for s in x], color="#31a354", linewidth=1.2)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    return save(figure, (upper, lower), folder / "plots" / "loss.png")


def plot_training(folders: list[Path], path: Path) -> Path:
    """Draw runs beside each other: training and validation loss, gradient norm, and tokens per second, over steps."""
    figure, axes = subplots(3, 1, figsize=(_WIDTH, 8), dpi=_DPI, sharex=True)
    for number, folder in enumerate(folders):
        color = f"C{number % 10}"
        steps, evaluations = _by_step(folder, "step"), _by_step(folder, "validation")
        x = np.array(sorted(steps))
        # A step whose gradients overflowed in float16 has no norm.
        norms = [np.nan if steps[s]["gradient_norm"] is None else steps[s]["gradient_norm"] for s in x]
        pace = [steps[s]["tokens"] / steps[s]["seconds"] for s in x]
        for axis, values in zip(axes, ([steps[s]["loss"] for s in x], norms, pace), strict=True):
            axis.plot(x, values, color=color, linewidth=0.5, alpha=0.3)
            axis.plot(*_smooth(x, np.array(values)), color=color, linewidth=1.5, label=folder.name)
        at = sorted(evaluations)
        axes[0].plot(at, [evaluations[s]["loss"] for s in at], "o", color=color, markersize=4)
    axes[0].set_ylabel("loss (nats)\nline: training, dots: validation")
    axes[1].set_ylabel("norm of the gradient")
    axes[1].set_yscale("log")
    axes[2].set_ylabel("tokens per second")
    axes[2].set_ylim(bottom=0)
    axes[2].set_xlabel("step")
    axes[0].legend(frameon=False, fontsize=9)
    return save(figure, tuple(axes), path)


def plot_decay(checkpoint: Checkpoint, path: Path) -> Path | None:
    """Draw by how much each head of each layer weighs down a key for its age: exp(−rate · φ(Δt / tau)) over Δt.

    Returns None, and draws nothing, if the model has no time bias.
    """
    model = checkpoint.load_model()
    config = model.config
    ages = np.geomspace(0.01 * config.time_scale, max(config.time_span, config.time_scale), _POINTS)
    figure, axes = subplots(
        len(model.blocks), 1, figsize=(_WIDTH, 1 + 2 * len(model.blocks)), dpi=_DPI, sharex=True, squeeze=False,
    )  # fmt: skip
    for index, (block, axis) in enumerate(zip(model.blocks, axes[:, 0], strict=True)):
        decay = block.attention.decay()
        if decay is None:
            return None
        for head, (rate, tau) in enumerate(zip(decay.rate, decay.tau, strict=True)):
            u = ages / float(tau)
            weight = np.exp(-float(rate) * (u if decay.kind == "linear" else np.log1p(u)))
            axis.plot(ages, weight, linewidth=1.3, label=f"head {head}")
        axis.set_xscale("log")
        axis.set_ylim(-0.02, 1.02)
        axis.set_ylabel(f"layer {index}")
        axis.axvline(config.time_scale, color="#636363", linestyle=":", linewidth=1)
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=4)
    axes[0, 0].set_title(f"attention's decay with age ({config.time_bias}); dotted: a typical gap")
    axes[-1, 0].set_xlabel(f"age Δt of a key {_unit(checkpoint)}")
    return save(figure, tuple(axes[:, 0]), path)


_KINDS = {"absolute": "timestamps", "gap": "gaps", "pace": "behind the pace"}


def plot_periods(checkpoint: Checkpoint, path: Path) -> Path | None:
    """Draw the periods of the Time2Vec features, of each kind, as they began and as they were learned.

    A period of the gaps is one of log(1 + gap / scale), drawn as the gap from 0 to where it ends. Returns None, and
    draws nothing, if the model has no time features.
    """
    learned = checkpoint.load_model().embedding.time
    first = TransformerModel(checkpoint.config.model, seed=checkpoint.config.train.seed).embedding.time
    if learned is None or first is None:
        return None
    config, count = checkpoint.config.model, len(learned.kinds)
    figure, axes = subplots(count, 1, figsize=(_WIDTH, 1 + 2.2 * count), dpi=_DPI, squeeze=False)
    for kind, axis in zip(learned.kinds, axes[:, 0], strict=True):
        for encoding, color, label in ((first, "#9ecae1", "at the start"), (learned, "#d94801", "learned")):
            periods = np.sort(encoding.periods()[kind])[::-1]
            axis.plot(np.arange(1, len(periods) + 1), periods, "o", color=color, markersize=4, label=label)
        axis.set_yscale("log")
        axis.axhline(config.time_scale, color="#636363", linestyle=":", linewidth=1)
        axis.set_ylabel(f"{_KINDS[kind]}\n({_unit(checkpoint)})")
    axes[0, 0].legend(frameon=False, fontsize=9)
    axes[0, 0].set_title("periods of the Time2Vec features; dotted: a typical gap")
    axes[-1, 0].set_xlabel("features, the slowest first")
    return save(figure, tuple(axes[:, 0]), path)


def _unit(checkpoint: Checkpoint) -> str:
    unit = checkpoint.data["time_unit_seconds"]
    return "in positions" if unit is None else f"in units of {unit:g} s"


def _by_step(folder: Path, kind: str) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in read_metrics(folder) if record["kind"] == kind}


def _smooth(x: Any, values: Any) -> tuple[Any, Any]:
    """A running mean over a fiftieth of all steps, of what is a number."""
    width = max(1, len(x) // 50)
    known = np.isfinite(values)
    window = np.ones(width)
    counts = np.convolve(known, window, "valid")
    sums = np.convolve(np.where(known, values, 0.0), window, "valid")
    return x[width - 1 :], np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
