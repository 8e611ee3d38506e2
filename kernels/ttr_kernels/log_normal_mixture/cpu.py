"""Log-normal mixture on CPU cores: one pass over the components of each row, in log space."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.arrays import FLOAT32, Array, contiguous, contiguous_rows, result_rows
from ..common.compilation import jit
from ..common.parallel import parallel_for
from ..common.ranges import jit_ranges
from ..common.storage import load, store
from ..common.tile_multiply import maximum
from ..common.vector_math import exp, exp_of_nonpositive, log

if TYPE_CHECKING:
    from . import LogNormalMixtureSaved

_GRAIN = 256
_HALF = np.float32(0.5)
_HALF_LOG_2PI = np.float32(0.9189385332046727)


def forward(log_gaps: Array, weight_logits: Array, means: Array, log_scales: Array, out: Array) -> None:
    w, rows, w_stride = contiguous_rows(weight_logits)
    m, _, m_stride = contiguous_rows(means)
    s, _, s_stride = contiguous_rows(log_scales)
    parallel_for(_forward, rows, log_gaps, w, w_stride, m, m_stride, s, s_stride, means.shape[1], out, grain=_GRAIN)


def backward(
    dnll: Array, saved: LogNormalMixtureSaved, dweight_logits: Array, dmeans: Array, dlog_scales: Array
) -> None:
    w, rows, w_stride = contiguous_rows(saved.weight_logits)
    m, _, m_stride = contiguous_rows(saved.means)
    s, _, s_stride = contiguous_rows(saved.log_scales)
    dw, _, dw_stride = result_rows("dweight_logits", dweight_logits)
    dm, _, dm_stride = result_rows("dmeans", dmeans)
    ds, _, ds_stride = result_rows("dlog_scales", dlog_scales)
    parallel_for(
        _backward, rows, contiguous(dnll, FLOAT32), saved.log_gaps, w, w_stride, m, m_stride, s, s_stride,
        saved.means.shape[1], dw, dw_stride, dm, dm_stride, ds, ds_stride, grain=_GRAIN,
    )  # fmt: skip


def erfc(x: Array) -> Array:
    """1 − erf of a float64 array, to the last place."""
    flat = np.ascontiguousarray(x, np.float64).reshape(-1)
    out = np.empty_like(flat)
    parallel_for(_erfc, len(flat), flat, out, grain=_GRAIN)
    return out.reshape(x.shape)


@jit_ranges
def _erfc(x: Any, out: Any, begin: int, end: int) -> None:
    for i in range(begin, end):
        out[i] = math.erfc(x[i])


@jit
def _log_sum_exp(x: Any, at: int, width: int) -> Any:
    largest = np.float32(-np.inf)
    for k in range(width):
        largest = maximum(largest, load(x, at + k))
    total = np.float32(0.0)
    for k in range(width):
        total += exp_of_nonpositive(load(x, at + k) - largest)
    return largest + log(total)


@jit
def _to_weights(x: Any, width: int) -> None:
    """x = softmax(x), in place: differences to the largest, since a far gap's log-likelihoods are large and alike."""
    largest = np.float32(-np.inf)
    for k in range(width):
        largest = maximum(largest, x[k])
    total = np.float32(0.0)
    for k in range(width):
        x[k] = exp_of_nonpositive(x[k] - largest)
        total += x[k]
    for k in range(width):
        x[k] /= total


@jit_ranges
def _forward(
    log_gaps: Any, w: Any, w_stride: int, m: Any, m_stride: int, s: Any, s_stride: int, width: int, nll: Any,
    begin: int, end: int,
) -> None:  # fmt: skip
    joint = np.empty(width, np.float32)
    for row in range(begin, end):
        log_gap = np.float32(log_gaps[row])
        for k in range(width):
            log_scale = load(s, row * s_stride + k)
            z = (log_gap - load(m, row * m_stride + k)) * exp(-log_scale)
            joint[k] = load(w, row * w_stride + k) - _HALF * z * z - log_scale
        total = _log_sum_exp(joint, 0, width) - _log_sum_exp(w, row * w_stride, width)
        nll[row] = log_gap + _HALF_LOG_2PI - total


@jit_ranges
def _backward(
    dnll: Any, log_gaps: Any, w: Any, w_stride: int, m: Any, m_stride: int, s: Any, s_stride: int, width: int,
    dw: Any, dw_stride: int, dm: Any, dm_stride: int, ds: Any, ds_stride: int, begin: int, end: int,
) -> None:  # fmt: skip
    weights, shares = np.empty(width, np.float32), np.empty(width, np.float32)
    deviations, inverses = np.empty(width, np.float32), np.empty(width, np.float32)
    for row in range(begin, end):
        log_gap = np.float32(log_gaps[row])
        for k in range(width):
            log_scale = load(s, row * s_stride + k)
            inverse = exp(-log_scale)
            z = (log_gap - load(m, row * m_stride + k)) * inverse
            weights[k] = load(w, row * w_stride + k)
            shares[k] = weights[k] - _HALF * z * z - log_scale
            deviations[k] = z
            inverses[k] = inverse
        _to_weights(weights, width)
        _to_weights(shares, width)
        d = dnll[row]
        for k in range(width):
            share, z = shares[k], deviations[k]
            store(dw, row * dw_stride + k, d * (weights[k] - share))
            store(dm, row * dm_stride + k, -d * share * z * inverses[k])
            store(ds, row * ds_stride + k, d * share * (np.float32(1.0) - z * z))
