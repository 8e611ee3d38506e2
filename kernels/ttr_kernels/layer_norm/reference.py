"""Layer normalisation in float64, as the formulas stand in the docstrings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..common.arrays import Array

if TYPE_CHECKING:
    from . import LayerNormSaved


def forward(
    x: Array, weight: Array, bias: Array | None, residual: Array | None, eps: float, out: Array, sum_out: Array | None
) -> tuple[Array, Array]:
    s = x if residual is None else x + residual
    mean = s.mean(axis=-1)
    inverse = 1 / np.sqrt(s.var(axis=-1) + eps)
    if residual is not None and sum_out is not None:
        sum_out[...] = s
    out[...] = (s - mean[..., None]) * inverse[..., None] * weight + (0 if bias is None else bias)
    return mean.reshape(-1), inverse.reshape(-1)


def backward(
    dy: Array, saved: LayerNormSaved, dsum: Array | None, dx: Array, dweight: Array, dbias: Array | None
) -> None:
    lead = (*dy.shape[:-1], 1)
    r = saved.inverse_deviation.reshape(lead)
    n = (saved.x - saved.mean.reshape(lead)) * r
    g = dy * saved.weight
    dweight += (dy * n).reshape(-1, dy.shape[-1]).sum(axis=0)
    if dbias is not None:
        dbias += dy.reshape(-1, dy.shape[-1]).sum(axis=0)
    pulled = g - g.mean(axis=-1, keepdims=True) - n * (g * n).mean(axis=-1, keepdims=True)
    dx[...] = r * pulled + (0 if dsum is None else dsum)
