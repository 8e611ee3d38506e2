"""The likelihood of a censored interval, in which nothing happened, and its gradient. In float64, NumPy or CuPy.

    log S(τ) = log Σ_k w_k Φ(−z_k)        z_k = (log τ − μ_k) / s_k, w = softmax(weight_logits), s = exp(log_scales)

There is one in a sequence at most, its last: so few rows need no kernel of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..common.arrays import FLOAT64, Array, array_module, check, check_same_dtype, takes_cuda_arrays
from .distribution import erfc

# From here on an asymptotic series is exact to 1e-9, long before erfc underflows.
_FAR = 20.0


@dataclass(frozen=True)
class CensoredSaved:
    """What the forward keeps for the backward, (rows, K) float64 each: weights w_k, the components' shares
    r_k = w_k Φ(−z_k) / S, their hazards φ(z_k) / Φ(−z_k), z_k, and 1 / s_k."""

    weights: Array
    shares: Array
    hazards: Array
    deviations: Array
    inverse_scales: Array


@takes_cuda_arrays
def censored_forward(
    ages: Array, weight_logits: Array, means: Array, log_scales: Array
) -> tuple[Array, CensoredSaved]:  # fmt: skip
    """−log P(gap > age) in nats: a probability, so no unit of time enters. Finite however long the wait.

    Args:
        ages: (rows,) float64, not negative; 0 has survived for certain.
        weight_logits, means, log_scales: (rows, K), as for the likelihood.

    Returns:
        (rows,) float64.

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape or dtype.
    """
    check(
        ages=(ages, "rows", [FLOAT64]), weight_logits=(weight_logits, "rows K"), means=(means, "rows K"),
        log_scales=(log_scales, "rows K"),
    )  # fmt: skip
    check_same_dtype(weight_logits=weight_logits, means=means, log_scales=log_scales)
    xp = array_module(means)
    logits, m, log_s = (a.astype(np.float64) for a in (weight_logits, means, log_scales))
    inverse = xp.exp(-log_s)
    positive = (ages > 0)[:, None]
    log_ages = xp.log(xp.where(ages > 0, ages, 1.0))[:, None]
    # −40 is before every component: Φ(40) is 1 in float64, and its density 0.
    z = xp.where(positive, (log_ages - m) * inverse, -40.0)
    log_weights = logits - _log_sum_exp(logits)
    log_above = _log_upper_tail(z)
    joint = log_weights + log_above
    log_survival = _log_sum_exp(joint)
    hazards = xp.exp(-0.5 * z * z - 0.5 * math.log(2 * math.pi) - log_above)
    saved = CensoredSaved(xp.exp(log_weights), xp.exp(joint - log_survival), hazards, z, inverse)
    return -log_survival[:, 0], saved


@takes_cuda_arrays
def censored_backward(dnll: Array, saved: CensoredSaved) -> tuple[Array, Array, Array]:
    """With the hazards h_k = φ(z_k) / Φ(−z_k) and the shares r_k, of dnll (rows,), (rows, K) float64 each:

    dweight_logits_k = dnll (w_k − r_k)    dmeans_k = −dnll r_k h_k / s_k    dlog_scales_k = −dnll r_k h_k z_k
    """
    d = dnll[:, None]
    pull = d * saved.shares * saved.hazards
    return d * (saved.weights - saved.shares), -pull * saved.inverse_scales, -pull * saved.deviations


def _log_upper_tail(z: Array) -> Array:
    """log Φ(−z), to 1e-9 however far out."""
    xp, x = array_module(z), z / math.sqrt(2)
    near = xp.log(0.5 * erfc(xp.minimum(x, _FAR)))
    far = xp.maximum(x, _FAR)
    series = xp.log1p(-0.5 / far**2 + 0.75 / far**4 - 1.875 / far**6)
    tail: Array = xp.where(x < _FAR, near, -far * far - xp.log(2 * math.sqrt(math.pi) * far) + series)
    return tail


def _log_sum_exp(x: Array) -> Array:
    """(rows, 1), of (rows, K)."""
    xp = array_module(x)
    largest = x.max(axis=1, keepdims=True)
    total: Array = largest + xp.log(xp.exp(x - largest).sum(axis=1, keepdims=True))
    return total
