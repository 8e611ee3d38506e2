"""Time2Vec (Kazemi et al. 2019, eq. 1): feature 0 = ω₀ t + φ₀, feature k = sin(ω_k t + φ_k).

The phase is formed and reduced in float64, so UNIX times keep their sub-second part: as float32 they step by 128 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.arrays import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    Array,
    check,
    check_out,
    check_parameter_gradient,
    implementation,
    is_array,
    takes_cuda_arrays,
)


@dataclass(frozen=True)
class Time2VecSaved:
    """What the forward keeps for the backward: its inputs; the phases are computed again."""

    times: Array  # (rows,) float64
    frequency: Array  # (K,)
    phase: Array  # (K,)


@takes_cuda_arrays
def time2vec_forward(
    times: Array, frequency: Array, phase: Array, *, dtype: Any = None, out: Array | None = None
) -> tuple[Array, Time2VecSaved]:
    """Features of timestamps.

    Args:
        times: (rows,) float64, in any unit.
        frequency: (K,) float32, radians per unit of time (float64 runs the reference).
        phase: (K,) like frequency, radians. |ω t + φ| must stay below 1e12, where float64 still resolves 1e-4.
        dtype: of the features: float32 (the default), bfloat16 or float16.
        out: (rows, K) of that dtype.

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape or dtype; the message names the argument.
    """
    sizes = check(
        times=(times, "rows", [FLOAT64]),
        frequency=(frequency, "K", [FLOAT32, FLOAT64]),
        phase=(phase, "K", [frequency.dtype] if is_array(frequency) else [FLOAT32, FLOAT64]),
    )
    exact = frequency.dtype == FLOAT64
    dtype = np.dtype(frequency.dtype if dtype is None or exact else dtype)
    if dtype not in (FLOAT32, BFLOAT16, FLOAT16, FLOAT64) or (dtype == FLOAT64 and not exact):
        raise TypeError(f"dtype: got {dtype}, expected float32 or bfloat16 or float16")
    out = check_out("out", out, (sizes["rows"], sizes["K"]), dtype, times)
    implementation(frequency, __package__).forward(times, frequency, phase, out)
    return out, Time2VecSaved(times, frequency, phase)


@takes_cuda_arrays
def time2vec_backward(
    dy: Array, saved: Time2VecSaved, *, dfrequency: Array | None = None, dphase: Array | None = None
) -> tuple[Array, Array]:
    """Gradients of frequency and phase, both *accumulated* into (zeros if not given); timestamps have none.

    dφ_k += Σ dy_k cos(ω_k t + φ_k)    dω_k += Σ dy_k cos(ω_k t + φ_k) t    (1 in place of the cosine for k = 0)
    """
    check(dy=(dy, "rows K"))
    expected = len(saved.times), len(saved.frequency)
    if dy.shape != expected:
        raise ValueError(f"dy: got shape {dy.shape}, expected {expected} like y")
    dtype = saved.frequency.dtype
    dfrequency = check_parameter_gradient("dfrequency", dfrequency, saved.frequency.shape, dtype, dy)
    dphase = check_parameter_gradient("dphase", dphase, saved.phase.shape, dtype, dy)
    implementation(saved.frequency, __package__).backward(dy, saved, dfrequency, dphase)
    return dfrequency, dphase
