"""RMS normalisation in float64, as the formulas stand in the docstrings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..common.arrays import Array

if TYPE_CHECKING:
    from . import RmsNormSaved


def forward(x: Array, weight: Array, residual: Array | None, eps: float, out: Array, sum_out: Array | None) -> Array:
    s = x if residual is None else x + residual
    inverse_rms: Array = 1 / np.sqrt(np.mean(s * s, axis=-1) + eps)
    if sum_out is not None:
        sum_out[...] = s
    out[...] = s * inverse_rms[..., None] * weight
    return inverse_rms.reshape(-1)


def backward(dy: Array, saved: RmsNormSaved, dsum: Array | None, dx: Array, dweight: Array) -> None:
    inverse_rms = saved.inverse_rms.reshape(*dy.shape[:-1], 1)
    n = saved.x * inverse_rms
    dn = dy * saved.weight
    dweight += (dy * n).reshape(-1, dy.shape[-1]).sum(axis=0)
    dx[...] = inverse_rms * (dn - n * np.mean(dn * n, axis=-1, keepdims=True)) + (0 if dsum is None else dsum)
