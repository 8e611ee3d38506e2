"""Rotary embedding in float64, as the formula stands in the docstring."""

from __future__ import annotations

import numpy as np

from ..common.arrays import Array


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool, backwards: bool, out: Array) -> None:
    dim = 2 * cos.shape[1]
    shape = (1,) * (x.ndim - 3) + (len(cos), 1, dim // 2)
    lead = x.shape[:-2] if int(np.prod(x.shape[:-2])) == len(cos) else (1, len(cos))
    c = cos.reshape(*lead, 1, dim // 2) if len(cos) else cos.reshape(shape)
    s = sin.reshape(c.shape) * (-1 if backwards else 1)
    first, second = (slice(0, dim, 2), slice(1, dim, 2)) if interleaved else (slice(dim // 2), slice(dim // 2, dim))
    a, b = x[..., first].copy(), x[..., second].copy()
    out[..., dim:] = x[..., dim:]
    out[..., first] = a * c - b * s
    out[..., second] = a * s + b * c
