"""Exact likelihoods of the processes that generated synthetic event sequences: the best that any model can reach.

Each takes the arrival times (n,) of one sequence, which began empty at time 0, and gives (n − 1,) negative
log-likelihoods in nats of its gaps, the first event excepted: −log λ(tᵢ) + ∫ λ(t) dt over the gap, λ the conditional
intensity. Parameters are those of Shchur et al. 2020, *Intensity-free learning of temporal point processes*, appendix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Times = np.ndarray[Any, Any]


def hawkes1(times: Times, base: float = 0.2, jump: float = 0.8, decay: float = 1.0) -> Times:
    """λ(t) = base + Σ jump · exp(−decay (t − tⱼ)) over past events (Hawkes 1971)."""
    gaps = np.diff(times)
    faded = np.exp(-decay * gaps)
    excitation = np.empty(len(times))  # right after each event
    excitation[0] = jump
    for event, share in enumerate(faded):
        excitation[event + 1] = excitation[event] * share + jump
    before = excitation[:-1] * faded
    integral = base * gaps + excitation[:-1] * (1 - faded) / decay
    result: Times = integral - np.log(base + before)
    return result


def poisson(times: Times, rate: float = 1.0) -> Times:
    """λ(t) = rate."""
    return rate * np.diff(times) - math.log(rate)


def renewal(times: Times, mean: float = 1.0, deviation: float = 6.0) -> Times:
    """Gaps independent and log-normal with this mean and standard deviation."""
    variance = math.log1p((deviation / mean) ** 2)
    return log_normal_nll(np.diff(times), math.log(mean) - variance / 2, math.sqrt(variance))


def self_correcting(times: Times) -> Times:
    """λ(t) = exp(t − number of past events) (Isham & Westcott 1979)."""
    # Exponents relative to the number of events: exp(t) alone overflows.
    excess = times[:-1] - np.arange(1, len(times))
    gaps = np.diff(times)
    result: Times = np.exp(excess) * np.expm1(gaps) - (excess + gaps)
    return result


TRUTHS: dict[str, Callable[[Times], Times]] = {
    "hawkes1": hawkes1, "renewal": renewal, "poisson": poisson, "self_correcting": self_correcting,
}  # fmt: skip


def log_normal_nll(gaps: Times, location: float, scale: float) -> Times:
    """−log density of gaps whose logarithms have this mean and standard deviation."""
    logs = np.log(gaps)
    result: Times = logs + 0.5 * ((logs - location) / scale) ** 2 + math.log(scale) + 0.5 * math.log(2 * math.pi)
    return result
