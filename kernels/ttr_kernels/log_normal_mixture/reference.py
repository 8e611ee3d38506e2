"""Log-normal mixture in float64, as the formulas stand in the docstrings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..common.arrays import Array

if TYPE_CHECKING:
    from . import LogNormalMixtureSaved


def forward(log_gaps: Array, weight_logits: Array, means: Array, log_scales: Array, out: Array) -> None:
    joint, _ = _joint(log_gaps, weight_logits, means, log_scales)
    out[...] = log_gaps - np.logaddexp.reduce(joint, axis=1)


def backward(
    dnll: Array, saved: LogNormalMixtureSaved, dweight_logits: Array, dmeans: Array, dlog_scales: Array
) -> None:
    joint, z = _joint(saved.log_gaps, saved.weight_logits, saved.means, saved.log_scales)
    share = np.exp(joint - np.logaddexp.reduce(joint, axis=1, keepdims=True))
    weights = np.exp(saved.weight_logits - np.logaddexp.reduce(saved.weight_logits, axis=1, keepdims=True))
    d = dnll[:, None]
    dweight_logits[...] = d * (weights - share)
    dmeans[...] = -d * share * z * np.exp(-saved.log_scales)
    dlog_scales[...] = d * share * (1 - z * z)


def _joint(log_gaps: Array, weight_logits: Array, means: Array, log_scales: Array) -> tuple[Array, Array]:
    """log(w_k N(log τ; μ_k, s_k)) and z_k."""
    z = (log_gaps[:, None] - means) * np.exp(-log_scales)
    log_weights = weight_logits - np.logaddexp.reduce(weight_logits, axis=1, keepdims=True)
    return log_weights - 0.5 * z * z - log_scales - 0.5 * math.log(2 * math.pi), z
