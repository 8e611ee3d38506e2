"""Dropout and residual addition in float64."""

from __future__ import annotations

import numpy as np

from ..common.arrays import Array
from ..common.philox import keep_threshold, philox_words


def apply(x: Array, residual: Array | None, rate: float, seed: int, offset: int, first: int, out: Array) -> None:
    kept = kept_elements(first, x.size, rate, seed, offset).reshape(x.shape)
    out[...] = x * kept / (1 - rate) + (0 if residual is None else residual)


def kept_elements(first: int, size: int, rate: float, seed: int, offset: int) -> Array:
    """Elements first, first + 1, … of the mask: the oracle of every backend."""
    words = philox_words(np.arange(first // 4, -(-(first + size) // 4)), seed, offset).reshape(-1)
    kept: Array = words[first % 4 : first % 4 + size] >= keep_threshold(rate)
    return kept
