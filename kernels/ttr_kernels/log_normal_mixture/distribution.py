"""The mixture as a distribution: density, distribution function, survival, quantiles, samples, mean. In float64.

Parameters are (..., K) `weight_logits`, `means` and `log_scales` as for the likelihood; gaps broadcast against (...).
"""

from __future__ import annotations

import math

import numpy as np

from ..common.arrays import Array
from ..common.philox import philox_words

_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def pdf(gaps: Array, weight_logits: Array, means: Array, log_scales: Array) -> Array:
    """Density p(τ) per unit of time; 0 for τ <= 0."""
    weights, m, s = _parameters(weight_logits, means, log_scales)
    safe = np.where(gaps > 0, gaps, 1.0).astype(np.float64)[..., None]
    z = (np.log(safe) - m) / s
    density: Array = (weights * np.exp(-0.5 * z * z) / (s * safe * math.sqrt(2 * math.pi))).sum(axis=-1)
    return np.where(gaps > 0, density, 0.0)


def cdf(gaps: Array, weight_logits: Array, means: Array, log_scales: Array) -> Array:
    """P(gap <= τ); 0 for τ <= 0."""
    weights, m, s = _parameters(weight_logits, means, log_scales)
    below: Array = (weights * 0.5 * _erfc(-_deviation(gaps, m, s))).sum(axis=-1)
    return below


def log_survival(gaps: Array, weight_logits: Array, means: Array, log_scales: Array) -> Array:
    """log P(gap > τ), the likelihood of a censored interval; −inf only where P underflows float64."""
    weights, m, s = _parameters(weight_logits, means, log_scales)
    with np.errstate(divide="ignore"):
        above: Array = np.log((weights * 0.5 * _erfc(_deviation(gaps, m, s))).sum(axis=-1))
    return above


def quantile(probability: Array | float, weight_logits: Array, means: Array, log_scales: Array) -> Array:
    """The τ with P(gap <= τ) = probability, by bisection in log τ to 1e-12; 0 <= probability <= 1.

    Raises ValueError for a probability outside [0, 1].
    """
    p = np.asarray(probability, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probability: got a value outside [0, 1]")
    weights, m, s = _parameters(weight_logits, means, log_scales)
    p, _ = np.broadcast_arrays(p, weights[..., 0])
    # Every component's 40-sigma interval, beyond which float64 has no probability left.
    low, high = (m - 40 * s).min(axis=-1) + 0 * p, (m + 40 * s).max(axis=-1) + 0 * p
    for _ in range(100):
        middle = 0.5 * (low + high)
        below = (weights * 0.5 * _erfc(-(middle[..., None] - m) / (s * math.sqrt(2)))).sum(axis=-1) < p
        low, high = np.where(below, middle, low), np.where(below, high, middle)
        if (high - low).max(initial=0.0) < 1e-12:
            break
    return np.where(p == 0, 0.0, np.where(p == 1, np.inf, np.exp(0.5 * (low + high))))


def sample(weight_logits: Array, means: Array, log_scales: Array, *, seed: int, offset: int = 0) -> Array:
    """One gap per row, a pure function of (seed, offset, row): a component by its weight, then Box & Muller 1958."""
    weights, m, s = _parameters(weight_logits, means, log_scales)
    lead = weights.shape[:-1]
    words = philox_words(np.arange(int(np.prod(lead))), seed, offset).reshape(*lead, 4)
    uniform = (words.astype(np.float64) + 0.5) / 2.0**32
    chosen = (weights.cumsum(axis=-1) < uniform[..., :1]).sum(axis=-1, keepdims=True)
    chosen = np.minimum(chosen, weights.shape[-1] - 1)
    normal = np.sqrt(-2 * np.log(uniform[..., 1])) * np.cos(2 * np.pi * uniform[..., 2])
    picked_mean = np.take_along_axis(m, chosen, axis=-1)[..., 0]
    picked_scale = np.take_along_axis(s, chosen, axis=-1)[..., 0]
    gaps: Array = np.exp(picked_mean + picked_scale * normal)
    return gaps


def mean(weight_logits: Array, means: Array, log_scales: Array) -> Array:
    """E[gap] = Σ w_k exp(μ_k + s_k² / 2); inf where that overflows."""
    weights, m, s = _parameters(weight_logits, means, log_scales)
    with np.errstate(over="ignore"):
        average: Array = (weights * np.exp(m + 0.5 * s * s)).sum(axis=-1)
    return average


def _parameters(weight_logits: Array, means: Array, log_scales: Array) -> tuple[Array, Array, Array]:
    """Weights, means and scales in float64."""
    logits, m, log_s = (np.asarray(a).astype(np.float64) for a in (weight_logits, means, log_scales))
    return np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)), m, np.exp(log_s)


def _deviation(gaps: Array, m: Array, s: Array) -> Array:
    """(log τ − μ) / (s √2), −inf for τ <= 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_gaps = np.where(np.asarray(gaps) > 0, np.log(np.asarray(gaps, np.float64)), -np.inf)
    return (log_gaps[..., None] - m) / (s * math.sqrt(2))
