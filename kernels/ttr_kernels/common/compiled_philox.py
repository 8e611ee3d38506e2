"""Philox4x32-10 inside compiled kernels: see philox.py, which does without numba."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from .compilation import jit_inline
from .philox import MULTIPLIERS, WEYL

_NONE, _LOW, _SHIFT = np.uint64(0), np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = MULTIPLIERS
_W0, _W1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])


@jit_inline
def philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Four words, each the lower half of a uint64, for a counter of four words and a key of two.

    In that form a loop over counters becomes 32 × 32-bit vector products, 5 times faster than with uint32, for which
    LLVM finds no vector code.
    """
    c0, c1, c2, c3 = np.uint64(c0), np.uint64(c1), np.uint64(c2), np.uint64(c3)
    k0, k1 = np.uint64(k0), np.uint64(k1)
    for _ in range(10):
        p0 = _M0 * (c0 & _LOW)
        p1 = _M1 * (c2 & _LOW)
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0 = (k0 + _W0) & _LOW
        k1 = (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@jit_inline
def kept_pairs(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, threshold: Any, scale_bits: Any) -> Any:
    """The dropout factors of a counter's four words as two uint64 of two float32 each, the first in the lower half.

    threshold: uint64 of the keep threshold; scale_bits: the bits of float32(1 / (1 − rate)) as uint64, see
    `factor_bits`. A word below the threshold gives 0.0.
    """
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    high_bits = scale_bits << _SHIFT
    first = (scale_bits if w0 >= threshold else _NONE) | (high_bits if w1 >= threshold else _NONE)
    second = (scale_bits if w2 >= threshold else _NONE) | (high_bits if w3 >= threshold else _NONE)
    return first, second


@functools.cache
def factor_bits(scale: float) -> np.uint64:
    """The bits of float32(scale), for `kept_pairs`."""
    return np.uint64(np.float32(scale).view(np.uint32))
