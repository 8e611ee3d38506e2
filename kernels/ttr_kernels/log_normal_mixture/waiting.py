"""Quantiles of the gap given that some time has passed already, for predictions that are made between events.

    P(gap <= τ | gap > e) = 1 − S(τ) / S(e)                     S = 1 − F, the survival function of the mixture

Compiled, in float64, on CPUs: a service asks for several quantiles of every stream at every event.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..common.arrays import FLOAT64, Array, check
from ..common.compilation import jit_exact

_ROOT_2 = math.sqrt(2.0)


def waiting_quantiles(
    probabilities: Array, elapsed: Array, weight_logits: Array, means: Array, log_scales: Array
) -> Array:
    """The τ with P(gap <= τ | gap > elapsed) = p, for every row and every p.

    Args:
        probabilities: (P,) float64, in [0, 1].
        elapsed: (N,) float64, at least 0; 0: nothing has passed.
        weight_logits, means, log_scales: (N, K) float64, as for the likelihood.

    Returns:
        (N, P) float64, at least `elapsed`. Where the mixture has left no probability that float64 could hold beyond
        `elapsed`, the event is overdue: `elapsed` itself for p < 1. Infinity for p = 1.

    Raises:
        ValueError: a value out of range; TypeError: another dtype or kind of array.
    """
    check(
        probabilities=(probabilities, "P", [FLOAT64]), elapsed=(elapsed, "N", [FLOAT64]),
        weight_logits=(weight_logits, "N K", [FLOAT64]), means=(means, "N K", [FLOAT64]),
        log_scales=(log_scales, "N K", [FLOAT64]),
    )  # fmt: skip
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities: got a value outside [0, 1]")
    if not (elapsed >= 0).all():
        raise ValueError("elapsed: got a negative value or NaN, expected at least 0")
    out = np.empty((len(elapsed), len(probabilities)))
    with np.errstate(under="ignore"):
        shares = np.exp(weight_logits - weight_logits.max(axis=1, keepdims=True, initial=-np.inf))
    arrays = (probabilities, elapsed, shares, means, np.exp(log_scales))
    _quantiles(*(np.ascontiguousarray(array) for array in arrays), out)
    return out


@jit_exact
def _survival(log_gap: float, shares: Any, means: Any, scales: Any) -> float:
    """Proportional to S: shares need not sum to 1."""
    total = 0.0
    for k in range(shares.shape[0]):
        total += shares[k] * math.erfc((log_gap - means[k]) / (scales[k] * _ROOT_2))
    return total


@jit_exact
def _quantiles(probabilities: Any, elapsed: Any, shares: Any, means: Any, scales: Any, out: Any) -> None:
    for row in range(out.shape[0]):
        # Every component's 40-sigma interval, beyond which float64 has no probability left.
        bottom, top = np.inf, -np.inf
        for k in range(shares.shape[1]):
            bottom = min(bottom, means[row, k] - 40.0 * scales[row, k])
            top = max(top, means[row, k] + 40.0 * scales[row, k])
        past = elapsed[row]
        begin = max(bottom, math.log(past)) if past > 0.0 else bottom
        left = _survival(begin, shares[row], means[row], scales[row])
        for i in range(probabilities.shape[0]):
            p = probabilities[i]
            if p == 1.0:
                out[row, i] = np.inf
            elif p == 0.0 or left == 0.0 or begin >= top:
                out[row, i] = past
            else:
                wanted = left * (1.0 - p)
                low, high = begin, top
                while high - low > 1e-12 * max(1.0, abs(high)):
                    middle = 0.5 * (low + high)
                    if _survival(middle, shares[row], means[row], scales[row]) > wanted:
                        low = middle
                    else:
                        high = middle
                out[row, i] = max(past, math.exp(0.5 * (low + high)))
