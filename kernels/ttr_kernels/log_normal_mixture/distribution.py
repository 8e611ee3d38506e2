"""The mixture as a distribution: density, distribution function, survival, quantiles, samples, mean. In float64.

Parameters are (..., K) `weight_logits`, `means` and `log_scales` as for the likelihood; gaps broadcast against (...).
NumPy or CuPy arrays, results of the same kind; numbers beside them may be plain.
"""

from __future__ import annotations

import importlib
import math

import numpy as np

from ..common.arrays import Array, array_module, takes_cuda_arrays
from ..common.philox import philox_words


@takes_cuda_arrays
def pdf(gaps: Array, weight_logits: Array, means: Array, log_scales: Array) -> Array:
    """Density p(τ) per unit of time; 0 for τ <= 0."""
    xp = array_module(weight_logits)
    weights, m, s = _parameters(weight_logits, means, log_scales)
    gaps = xp.asarray(gaps, np.float64)
    safe = xp.where(gaps > 0, gaps, 1.0)[..., None]
    z = (xp.log(safe) - m) / s
    density = (weights * xp.exp(-0.5 * z * z) / (s * safe * math.sqrt(2 * math.pi))).sum(axis=-1)
    result: Array = xp.where(gaps > 0, density, 0.0)
    return result


@takes_cuda_arrays
def cdf(gaps: Array, weight_logits: Array, means: Array, log_scales: Array) -> Array:
    """P(gap <= τ); 0 for τ <= 0."""
    weights, m, s = _parameters(weight_logits, means, log_scales)
    below: Array = (weights * 0.5 * erfc(-_deviation(gaps, m, s))).sum(axis=-1)
    return below


@takes_cuda_arrays
def log_survival(gaps: Array, weight_logits: Array, means: Array, log_scales: Array) -> Array:
    """log P(gap > τ), the likelihood of a censored interval; −inf only where P underflows float64."""
    weights, m, s = _parameters(weight_logits, means, log_scales)
    with np.errstate(divide="ignore"):
        above: Array = array_module(weights).log((weights * 0.5 * erfc(_deviation(gaps, m, s))).sum(axis=-1))
    return above


@takes_cuda_arrays
def quantile(probability: Array | float, weight_logits: Array, means: Array, log_scales: Array) -> Array:
    """The τ with P(gap <= τ) = probability, by bisection in log τ to 1e-12; 0 <= probability <= 1.

    Raises ValueError for a probability outside [0, 1].
    """
    xp = array_module(weight_logits)
    p = xp.asarray(probability, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probability: got a value outside [0, 1]")
    weights, m, s = _parameters(weight_logits, means, log_scales)
    p, _ = xp.broadcast_arrays(p, weights[..., 0])
    # Every component's 40-sigma interval, beyond which float64 has no probability left.
    low, high = (m - 40 * s).min(axis=-1) + 0 * p, (m + 40 * s).max(axis=-1) + 0 * p
    for _ in range(100):
        middle = 0.5 * (low + high)
        below = (weights * 0.5 * erfc(-(middle[..., None] - m) / (s * math.sqrt(2)))).sum(axis=-1) < p
        low, high = xp.where(below, middle, low), xp.where(below, high, middle)
        if not p.size or (high - low).max() < 1e-12:
            break
    # Beyond 1e308 it is infinite.
    with np.errstate(over="ignore"):
        result: Array = xp.where(p == 0, 0.0, xp.where(p == 1, np.inf, xp.exp(0.5 * (low + high))))
    return result


@takes_cuda_arrays
def sample(
    weight_logits: Array, means: Array, log_scales: Array, *, seed: int, offset: int = 0, rows: Array | None = None
) -> Array:  # fmt: skip
    """One gap per row, a pure function of (seed, offset, row): a component by its weight, then Box & Muller 1958.

    rows: (...) int64 NumPy array, as which row each is drawn; default: 0, 1, … in order.
    """
    xp = array_module(weight_logits)
    weights, m, s = _parameters(weight_logits, means, log_scales)
    lead = weights.shape[:-1]
    # Drawn on the host, so that a GPU samples the same gaps.
    numbers = np.arange(math.prod(lead)) if rows is None else np.asarray(rows).reshape(-1)
    words = philox_words(numbers, seed, offset).reshape(*lead, 4)
    uniform = xp.asarray((words.astype(np.float64) + 0.5) / 2.0**32)
    chosen = (weights.cumsum(axis=-1) < uniform[..., :1]).sum(axis=-1, keepdims=True)
    chosen = xp.minimum(chosen, weights.shape[-1] - 1)
    normal = xp.sqrt(-2 * xp.log(uniform[..., 1])) * xp.cos(2 * np.pi * uniform[..., 2])
    picked_mean = xp.take_along_axis(m, chosen, axis=-1)[..., 0]
    picked_scale = xp.take_along_axis(s, chosen, axis=-1)[..., 0]
    gaps: Array = xp.exp(picked_mean + picked_scale * normal)
    return gaps


@takes_cuda_arrays
def mean(weight_logits: Array, means: Array, log_scales: Array) -> Array:
    """E[gap] = Σ w_k exp(μ_k + s_k² / 2); inf where that overflows."""
    weights, m, s = _parameters(weight_logits, means, log_scales)
    with np.errstate(over="ignore"):
        average: Array = (weights * array_module(m).exp(m + 0.5 * s * s)).sum(axis=-1)
    return average


def _parameters(weight_logits: Array, means: Array, log_scales: Array) -> tuple[Array, Array, Array]:
    """Weights, means and scales in float64."""
    xp = array_module(weight_logits)
    logits, m, log_s = (xp.asarray(a).astype(np.float64) for a in (weight_logits, means, log_scales))
    shares = xp.exp(logits - logits.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True), m, xp.exp(log_s)


def _deviation(gaps: Array, m: Array, s: Array) -> Array:
    """(log τ − μ) / (s √2), −inf for τ <= 0."""
    xp = array_module(m)
    gaps = xp.asarray(gaps, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_gaps = xp.where(gaps > 0, xp.log(gaps), -np.inf)
    deviation: Array = (log_gaps[..., None] - m) / (s * math.sqrt(2))
    return deviation


def erfc(x: Array) -> Array:
    """1 − erf of a float64 array, on its own device."""
    if isinstance(x, np.ndarray | np.generic):
        # Loaded only here: it loads numba.
        from .cpu import erfc as on_cpu

        return on_cpu(np.asarray(x))
    result: Array = importlib.import_module("cupyx.scipy.special").erfc(x)
    return result
