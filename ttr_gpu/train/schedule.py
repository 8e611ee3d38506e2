"""Learning rate over the steps: linear warm-up, then half a cosine (Loshchilov & Hutter 2017, *SGDR*, eq. 5)."""

from __future__ import annotations

import math


def learning_rate(step: int, *, peak: float, warmup: int, total: int, min_ratio: float) -> float:
    """Rate of a step, counted from 1: up to `peak` at step `warmup`, down to `peak · min_ratio` at step `total`."""
    if step <= warmup:
        return peak * step / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * share)))
