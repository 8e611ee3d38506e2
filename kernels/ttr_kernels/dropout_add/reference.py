"""Dropout and residual addition in float64."""

from __future__ import annotations

from ..common.arrays import Array


def apply(x: Array, residual: Array | None, rate: float, seed: int, offset: int, out: Array) -> None:
    from . import dropout_mask

    kept = dropout_mask(x.shape, rate=rate, seed=seed, offset=offset)
    out[...] = x * kept / (1 - rate) + (0 if residual is None else residual)
