"""Learning rate over the steps: a linear warm-up, then one of three courses.

cosine: half a cosine down to the least rate (Loshchilov & Hutter 2017, *SGDR*, eq. 5).
wsd: warm-up, stable, decay: the peak until the last part of the steps, then down by 1 − √ (Hägele et al. 2024,
*Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations*, §3): before its decay, a run can be
lengthened.
constant: the peak.
"""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, min_ratio: float, schedule: str = "cosine", decay: float = 0.2
) -> float:
    """Rate of a step, counted from 1: up to `peak` at step `warmup`, down to `peak · min_ratio` at step `total`.

    `decay` is the share of all steps over which "wsd" goes down; "constant" stays at the peak.
    """
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    begin = warmup if schedule == "cosine" else max(warmup, total - round(decay * total))
    share = min(1.0, max(0, step - begin) / max(1, total - begin))
    fall = 0.5 * (1 + math.cos(math.pi * share)) if schedule == "cosine" else 1 - math.sqrt(share)
    return peak * (min_ratio + (1 - min_ratio) * fall)
