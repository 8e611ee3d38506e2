"""A picture of what operations reach beside what the machine could do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ttr_kernels.benchmark import Timing

from .figures import save, subplots

_LARGE = 1 << 20
_COLORS = {"forward": "tab:blue", "backward": "tab:orange", "update": "tab:green"}


def draw_roofline(path: Path, timings: Sequence[Timing], *, peak: float, title: str) -> Path:
    """Operations per second over operations per byte (Williams, Waterman, Patterson 2009, *Roofline*), as a PNG.

    The roof is min(peak, intensity × bandwidth), for the slowest and the fastest of the copies measured beside the
    operations: those of a few megabytes stay in the caches. An operation of whose arithmetic nothing is counted has no
    place here.

    Args:
        path: where it is written.
        peak: floating-point operations per second of a large matrix product.
        title: above it.
    """
    figure, axes = subplots(1, 1, figsize=(9, 5.5), dpi=120)
    placed = [timing for timing in timings if timing.flops]
    intensity = np.array([timing.flops / timing.bytes for timing in placed])
    rate = np.array([timing.flops / timing.seconds / 1e9 for timing in placed])
    # A copy of a few kilobytes tells of the call, not of the memory.
    copies = [timing.bytes / timing.copy_seconds for timing in timings if timing.bytes >= _LARGE] or [1.0]
    span = np.geomspace(min([0.1, *intensity]) / 2, max([100.0, *intensity]) * 4, 200)
    for bandwidth, style in ((max(copies), "--"), (min(copies), "-")):
        roof = np.minimum(peak, span * bandwidth) / 1e9
        axes.plot(span, roof, style, color="black", linewidth=1, label=f"copy at {bandwidth / 1e9:.0f} GB/s")
    names = list(dict.fromkeys(timing.operation for timing in placed))
    markers = dict(zip(names, "os^vD<>pP*Xhd8H1234", strict=False))
    for part, color in _COLORS.items():
        for name in names:
            chosen = [t.part == part and t.operation == name for t in placed]
            if any(chosen):
                label = name if part == next(t.part for t in placed if t.operation == name) else None
                axes.scatter(intensity[chosen], rate[chosen], s=30, color=color, marker=markers[name], label=label)
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte of activations and results",
        ylabel="GFLOP/s (blue forward, orange backward, green update)", title=title,
    )  # fmt: skip
    axes.axhline(peak / 1e9, color="tab:gray", linewidth=0.5)
    axes.text(span[0], 1.1 * peak / 1e9, f"matrix product: {peak / 1e9:.0f} GFLOP/s", fontsize=8)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save(figure, (axes,), path)
