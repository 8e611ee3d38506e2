"""Mixture of log-normals, the density of the gap to the next event (Shchur et al. 2020, *Intensity-free learning of
temporal point processes*, eq. 2).

    log p(τ) = log Σ_k w_k N(log τ; μ_k, s_k) − log τ        w = softmax(weight_logits), s = exp(log_scales)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..common.arrays import (
    FLOAT64,
    Array,
    array_module,
    check,
    check_out,
    check_same_dtype,
    empty,
    implementation,
    on_gpu,
    takes_cuda_arrays,
)
from .distribution import cdf, log_survival, mean, pdf, quantile, sample

__all__ = [
    "LogNormalMixtureSaved",
    "cdf",
    "log_normal_mixture_backward",
    "log_normal_mixture_forward",
    "log_survival",
    "mean",
    "pdf",
    "quantile",
    "sample",
]


@dataclass(frozen=True)
class LogNormalMixtureSaved:
    """What the forward keeps for the backward: its inputs and its result."""

    log_gaps: Array  # (rows,) float64
    weight_logits: Array  # (rows, K)
    means: Array  # (rows, K)
    log_scales: Array  # (rows, K)
    nll: Array  # (rows,)


@takes_cuda_arrays
def log_normal_mixture_forward(
    gaps: Array, weight_logits: Array, means: Array, log_scales: Array, *, out: Array | None = None
) -> tuple[Array, LogNormalMixtureSaved]:
    """Negative log-likelihood −log p(gap) in nats (of a density per unit of time).

    Args:
        gaps: (rows,) float64, positive; their logarithm is taken in float64.
        weight_logits, means, log_scales: (rows, K) float32, bfloat16 or float16 (float64 runs the reference).
        out: (rows,) float32 (float64 for the reference).

    Raises:
        TypeError, ValueError: an array of the wrong kind, shape or dtype, or a gap that is not positive and finite (its
            position and value are named; on a GPU, where to look would be to wait, its likelihood is not finite).
    """
    sizes = check(
        gaps=(gaps, "rows", [FLOAT64]), weight_logits=(weight_logits, "rows K"), means=(means, "rows K"),
        log_scales=(log_scales, "rows K"),
    )  # fmt: skip
    dtype = check_same_dtype(weight_logits=weight_logits, means=means, log_scales=log_scales)
    if not on_gpu(gaps):
        valid, finite = empty(gaps.shape, bool), empty(gaps.shape, bool)
        np.logical_and(np.greater(gaps, 0, out=valid), np.isfinite(gaps, out=finite), out=valid)
        if not valid.all():
            at = int(valid.argmin())
            raise ValueError(f"gaps: got {gaps[at]} at position {at}, expected positive finite gaps")
    statistics = FLOAT64 if dtype == FLOAT64 else np.dtype(np.float32)
    out = check_out("out", out, (sizes["rows"],), statistics, means)
    log_gaps = array_module(gaps).log(gaps, out=empty(gaps.shape, FLOAT64, gaps))
    implementation(means, __package__).forward(log_gaps, weight_logits, means, log_scales, out)
    return out, LogNormalMixtureSaved(log_gaps, weight_logits, means, log_scales, out)


@takes_cuda_arrays
def log_normal_mixture_backward(
    dnll: Array,
    saved: LogNormalMixtureSaved,
    *,
    dweight_logits: Array | None = None,
    dmeans: Array | None = None,
    dlog_scales: Array | None = None,
) -> tuple[Array, Array, Array]:
    """With responsibilities r_k = w_k N_k / Σ w N and z_k = (log τ − μ_k) / s_k, all *written*:

    dweight_logits_k = dnll (w_k − r_k)    dmeans_k = −dnll r_k z_k / s_k    dlog_scales_k = dnll r_k (1 − z_k²)
    """
    check(dnll=(dnll, "rows"))
    if dnll.shape != saved.nll.shape:
        raise ValueError(f"dnll: got shape {dnll.shape}, expected {saved.nll.shape}")
    like = saved.means
    dweight_logits = check_out("dweight_logits", dweight_logits, like.shape, like.dtype, like)
    dmeans = check_out("dmeans", dmeans, like.shape, like.dtype, like)
    dlog_scales = check_out("dlog_scales", dlog_scales, like.shape, like.dtype, like)
    implementation(like, __package__).backward(dnll, saved, dweight_logits, dmeans, dlog_scales)
    return dweight_logits, dmeans, dlog_scales
